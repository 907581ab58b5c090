#!/bin/sh
# One dialog takes the question, another shows the answer. For a key binding, the menu bar, or a Quick Action.
#
#   ask-dialog.sh ~/Documents/manual.nectar
set -eu

NECTAR_FILE=${1:-${NECTAR_FILE:-"$HOME/Documents/book.nectar"}}
export NECTAR_FILE
name=$(basename -- "$NECTAR_FILE" .nectar)
here=$(cd -- "$(dirname -- "$0")" && pwd)

# What a person typed goes to AppleScript as an argument, never as part of its text.
question=$(osascript \
    -e 'on run argv' \
    -e 'text returned of (display dialog (item 1 of argv) default answer "" buttons {"Cancel", "Ask"} default button 2)' \
    -e 'end run' \
    "Ask about $name") || exit 0 # cancelled

messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
# `nectar` says what is wrong in one line, its last.
answer=$(printf '%s' "$question" | "$here/ask.sh" 2>"$messages") || answer="No answer: $(tail -n 1 "$messages")"

osascript \
    -e 'on run argv' \
    -e 'display dialog (item 2 of argv) with title (item 1 of argv) buttons {"OK"} default button 1' \
    -e 'end run' \
    "$name" "$answer" >/dev/null
