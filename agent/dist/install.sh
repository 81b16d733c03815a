#!/bin/sh
# Installs the agent from the directory of this script, which also holds: prerequisites.sh and what that needs, iot-agent,
# iot-agent.service, iot-readahead.service, readahead.sh, config.toml, and perhaps archives of images (*.tar). As root. Ends with the agent
# and its podman enabled, running, and on disk: what a power cut may follow at once is synced.
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

# systemd reads a unit that it has never seen when it is first asked for it; only an upgrade's has to be read again, which takes
# longer than all the rest of this.
systemctl --no-reload enable iot-agent.service iot-readahead.service
if [ -n "$upgrade" ]; then
    systemctl daemon-reload
fi
# restart: an upgrade must not leave the old executable running.
systemctl restart iot-agent.service

uid=$(id -u "$user")
systemctl start "user@$uid.service"
if [ ! -S "$socket" ]; then
    echo "podman does not listen on $socket: see journalctl _UID=$uid" >&2
    exit 1
fi
sync
