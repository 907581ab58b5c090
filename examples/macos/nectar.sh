#!/bin/sh
# Runs `nectar` from where it is installed. Automator, Shortcuts, launchd, Raycast and Alfred do not know your PATH.
set -eu

for folder in "$HOME/.local/bin" /opt/homebrew/bin /usr/local/bin "$HOME/.local/share/uv/tools/nectar-mlx/bin" \
    "$HOME/.local/pipx/venvs/nectar-mlx/bin" "$HOME/Library/Application Support/pipx/venvs/nectar-mlx/bin"; do
    if [ -x "$folder/nectar" ]; then
        exec "$folder/nectar" "$@"
    fi
done
if found=$(command -v nectar); then
    exec "$found" "$@"
fi
echo "nectar is not in ~/.local/bin, Homebrew, /usr/local/bin, uv or pipx: link it to ~/.local/bin/nectar" >&2
exit 127
