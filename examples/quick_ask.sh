#!/bin/sh
# Asks a .nectar from anywhere on a Mac: one dialog takes the question, another shows the answer. For a Quick Action of
# Automator ("Run Shell Script"), Shortcuts, or a key binding.
#
#   examples/quick_ask.sh ~/Documents/manual.nectar
set -eu

file=$1
name=$(basename "$file" .nectar)

# What a person typed goes to AppleScript as an argument, never as part of its text.
question=$(osascript \
    -e 'on run argv' \
    -e 'text returned of (display dialog (item 1 of argv) default answer "" buttons {"Cancel", "Ask"} default button 2)' \
    -e 'end run' \
    "Ask about $name") || exit 0 # cancelled

# `nectar` tells what is wrong in one line on stderr.
answer=$(nectar ask "$file" "$question" --max-tokens 300 2>&1) || answer="No answer: $answer"

osascript \
    -e 'on run argv' \
    -e 'display dialog (item 2 of argv) with title (item 1 of argv) buttons {"OK"} default button 1' \
    -e 'end run' \
    "$name" "$answer" >/dev/null
