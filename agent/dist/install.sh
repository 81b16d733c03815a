#!/bin/sh
# Installs or upgrades the agent. Run it as root. The directory of this script must also hold iot-agent,
# iot-agent.service, iot-readahead.service, readahead.sh, uninstall.sh, prerequisites.sh and the files that
# prerequisites.sh needs. It may hold config.toml, a directory `secrets` with the files that config.toml names, and image
# archives (*.tar). Without config.toml, the device keeps its configuration.
#
# The configuration is checked before anything is replaced. Each file is written beside the old one, synced and renamed,
# because a power cut may come at any moment. At the end, the agent and its podman are enabled, running and synced.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
user=iot-agent
etc=/etc/iot-agent
lib=/usr/local/lib/iot-agent
link=/usr/local/bin/iot-agent
socket=/run/iot-agent/podman.sock

# Installs the file $2 as $3 with mode $1 by renaming a copy.
place() {
    install -D -m "$1" "$2" "$3.new"
    mv -f "$3.new" "$3"
}

# Prints the directory of an executable, which is named after its digest.
version() {
    digest=$(sha256sum "$1")
    printf '%s/versions/%.16s' "$lib" "$digest"
}

sh "$here/prerequisites.sh"

# The group of the service may read the configuration and the secrets, and only root may change them.
install -d -m 0750 -g "$user" "$etc" "$etc/secrets"
new=$(version "$here/iot-agent")
place 0755 "$here/iot-agent" "$new/iot-agent"
staged=$etc/staged
rm -rf "$staged"
install -d -m 0750 -g "$user" "$staged" "$staged/secrets"
for file in "$etc"/secrets/* "$here"/secrets/*; do
    if [ -e "$file" ]; then
        install -m 0640 -g "$user" "$file" "$staged/secrets/"
    fi
done
config=$here/config.toml
if [ ! -e "$config" ]; then
    config=$etc/config.toml
fi
install -m 0640 -g "$user" "$config" "$staged/config.toml"
# As root, check-config reads the files with the rights of the service.
"$new/iot-agent" check-config "$staged/config.toml"

# Everything is on the disk before the first rename. The link is renamed last.
old=
if [ -L "$link" ]; then
    old=$(dirname -- "$(readlink -f "$link")")
elif [ -e "$link" ]; then
    old=$(version "$link")
    place 0755 "$link" "$old/iot-agent"
fi
ln -sfn "$new/iot-agent" "$link.new"
sync
for file in "$staged"/secrets/*; do
    if [ -e "$file" ]; then
        mv -f "$file" "$etc/secrets/"
    fi
done
mv -f "$staged/config.toml" "$etc/config.toml"
rm -r "$staged"
upgrade=
if [ -e /etc/systemd/system/iot-agent.service ]; then
    upgrade=yes
fi
place 0644 "$here/iot-agent.service" /etc/systemd/system/iot-agent.service
place 0644 "$here/iot-readahead.service" /etc/systemd/system/iot-readahead.service
place 0644 "$here/readahead.sh" "$lib/readahead.sh"
place 0755 "$here/uninstall.sh" "$lib/uninstall.sh"
mv -fT "$link.new" "$link"
for archive in "$here"/*.tar; do
    if [ -e "$archive" ]; then
        name=/var/lib/iot-agent/images/${archive##*/}
        install -m 0640 -g "$user" "$archive" "$name.new"
        mv -f "$name.new" "$name"
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
# The executable before this one stays on the device. Others go.
for directory in "$lib"/versions/*; do
    if [ "$directory" != "$new" ] && [ "$directory" != "$old" ]; then
        rm -r "$directory"
    fi
done
sync
