#!/bin/sh
# Installs the agent from the directory of this script, which also holds: prerequisites.sh, iot-agent, iot-agent.service, iot-podman.socket,
# iot-podman.service, iot-user.conf, iot-readahead.service, readahead.sh, iot-agent.sysusers, iot-agent.tmpfiles, containers.conf,
# storage.conf, config.toml, and perhaps archives of images (*.tar). As root. Ends with the agent and its podman enabled, running, and on disk: what a power cut may follow at
# once is synced.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
user=iot-agent
home=/var/lib/iot-agent
socket=/run/iot-agent/podman.sock
# What iot-user.conf names.
units=/usr/local/lib/iot-agent/user-units
generators=/usr/local/lib/iot-agent/environment-generators

sh "$here/prerequisites.sh"

# What the user's own systemd and podman need comes first, since they take longest to start.
systemd-sysusers "$here/iot-agent.sysusers"
systemd-tmpfiles --create "$here/iot-agent.tmpfiles"
install -D -m 0644 -t "$units" "$here/iot-podman.socket" "$here/iot-podman.service"

install -m 0644 "$here/containers.conf" "$here/storage.conf" "$home/.config/containers/"
# Users of containers: 65536 ids behind the last that somebody has (subuid(5)); useradd gives none to a system user. Without a program
# started for it: each takes a tenth of a second where the processor is emulated.
for file in /etc/subuid /etc/subgid; do
    if [ ! -e "$file" ]; then
        : > "$file"
    fi
    first=100000
    known=
    while IFS=: read -r name start count; do
        if [ "$name" = "$user" ]; then
            known=yes
        elif [ "$((${start:-0} + ${count:-0}))" -gt "$first" ]; then
            first=$((start + count))
        fi
    done < "$file"
    if [ -z "$known" ]; then
        echo "$user:$first:65536" >> "$file"
    fi
done

# The user's own systemd runs from boot on, and in it podman's socket. By a link, since there is no session to ask. It starts while the
# agent is installed.
uid=$(id -u "$user")
install -d "$units/sockets.target.wants" "$generators"
ln -sf /usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator "$generators/"
ln -sf ../iot-podman.socket "$units/sockets.target.wants/"
install -D -m 0644 "$here/iot-user.conf" "/etc/systemd/system/user@$uid.service.d/iot-agent.conf"
if [ -S "/run/user/$uid/systemd/private" ]; then
    # An upgrade: it runs, and has not seen the units of now.
    of_user="runuser -u $user -- env XDG_RUNTIME_DIR=/run/user/$uid systemctl --user"
    $of_user daemon-reload
    $of_user start iot-podman.socket
fi
loginctl enable-linger "$user" &
lingers=$!

install -D -m 0644 "$here/iot-agent.sysusers" /etc/sysusers.d/iot-agent.conf
install -D -m 0644 "$here/iot-agent.tmpfiles" /etc/tmpfiles.d/iot-agent.conf
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
        install -m 0640 -g "$user" "$archive" "$home/images/"
    fi
done

wait "$lingers"
# systemd reads a unit that it has never seen when it is first asked for it; only an upgrade's has to be read again, which takes
# longer than all the rest of this.
systemctl --no-reload enable iot-agent.service iot-readahead.service
if [ -n "$upgrade" ]; then
    systemctl daemon-reload
fi
# restart: an upgrade must not leave the old executable running.
systemctl restart iot-agent.service

systemctl start "user@$uid.service"
if [ ! -S "$socket" ]; then
    echo "podman does not listen on $socket: see journalctl _UID=$uid" >&2
    exit 1
fi
sync
