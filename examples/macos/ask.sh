#!/bin/sh
# Answers a question about a text: the answer, and nothing else, goes to stdout. The question is the arguments or, without
# any, standard input. For Raycast, Alfred ("Run Script", input as argv) and Shortcuts ("Run Shell Script").
#
# @raycast.schemaVersion 1
# @raycast.title Ask Nectar
# @raycast.mode fullOutput
# @raycast.packageName Nectar
# @raycast.argument1 { "type": "text", "placeholder": "question" }
set -eu

file=${NECTAR_FILE:-"$HOME/Documents/book.nectar"} # your file
here=$(cd -- "$(dirname -- "$0")" && pwd)

if [ $# -gt 0 ]; then
    printf '%s' "$*" | "$here/nectar.sh" ask --quiet "$file" -
else
    "$here/nectar.sh" ask --quiet "$file" -
fi
