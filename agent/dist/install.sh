#!/bin/sh
# Installs the agent. Run it as root. The directory of this script must also hold iot-agent, iot-agent.service,
# iot-readahead.service, readahead.sh, config.toml, prerequisites.sh and the files that prerequisites.sh needs. It may
# hold image archives (*.tar). At the end, the agent and its podman are enabled, running and synced to disk, because a
# power cut may follow at once.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
user=iot-agent
socket=/run/iot-agent/podman.sock

sh "$here/prerequisites.sh"

install -D -m 0755 "$here/iot-agent" /usr/local/bin/iot-agent
install -d -m 0700 /etc/iot-agent
install -m 0600 "$here/config.toml" /etc/iot-agent/config.toml
/usr/local/bin/iot-agent check-config /etc/iot-agent/config.toml

upgrade=
if [ -e /etc/systemd/system/iot-agent.service ]; then
    upgrade=yes
fi
install -D -m 0644 -t /etc/systemd/system "$here/iot-agent.service" "$here/iot-readahead.service"
install -D -m 0644 "$here/readahead.sh" /usr/local/lib/iot-agent/readahead.sh
for archive in "$here"/*.tar; do
    if [ -e "$archive" ]; then
        install -m 0640 -g "$user" "$archive" /var/lib/iot-agent/images/
    fi
done

# systemd reads a unit file when the unit is used for the first time. Only an upgrade needs a daemon-reload, which
# takes longer than the rest of this script.
systemctl --no-reload enable iot-agent.service iot-readahead.service
if [ -n "$upgrade" ]; then
    systemctl daemon-reload
fi
# Restart instead of start: an upgrade must not leave the old executable running.
systemctl restart iot-agent.service

uid=$(id -u "$user")
systemctl start "user@$uid.service"
if [ ! -S "$socket" ]; then
    echo "podman does not listen on $socket: see journalctl _UID=$uid" >&2
    exit 1
fi
sync
