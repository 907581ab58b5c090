# For ~/.zshrc:  source ~/Library/Scripts/nectar/nectar.zsh
#
#   NECTAR_FILE=~/Documents/manual.nectar
#   ask Who is Filby?

_nectar_ask() { nectar ask --quiet "${NECTAR_FILE:-$HOME/Documents/book.nectar}" -- "$@" }

# noglob: a question mark is no pattern.
alias ask='noglob _nectar_ask'
