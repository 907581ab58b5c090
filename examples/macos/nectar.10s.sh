#!/bin/sh
# A plugin for SwiftBar: is `nectar serve` running, start and stop it (after `nectar serve ... --install-agent`), ask.
# <swiftbar.title>Nectar</swiftbar.title>
# <swiftbar.hideAbout>true</swiftbar.hideAbout>
set -u

label=org.nectar-mlx.serve
address=http://127.0.0.1:${NECTAR_PORT:-8080}
scripts="$HOME/Library/Scripts/nectar"
agent="$HOME/Library/LaunchAgents/$label.plist"

if curl --silent --fail --max-time 1 --output /dev/null "$address/v1/models"; then
    echo "🍯"
    echo "---"
    echo "Open the page | href=$address"
    echo "Stop | bash=/bin/launchctl param1=bootout param2=gui/$(id -u)/$label terminal=false refresh=true"
else
    echo "🍯 off"
    echo "---"
    if [ -f "$agent" ]; then
        echo "Start | bash=/bin/launchctl param1=bootstrap param2=gui/$(id -u) param3='$agent' terminal=false refresh=true"
    else
        echo "To start it here: nectar serve book.nectar --install-agent"
    fi
fi
echo "Ask | bash='$scripts/ask-dialog.sh' terminal=false"
