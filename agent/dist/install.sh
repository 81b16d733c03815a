#!/bin/sh
# Installs or upgrades the agent. Run it as root. The directory of this script must also hold iot-agent,
# iot-agent.service, iot-readahead.service, readahead.sh, uninstall.sh, prerequisites.sh and the files that
# prerequisites.sh needs. It may hold config.toml, a directory `secrets` with the files that config.toml names, and image
# archives (*.tar). Without config.toml, the device keeps its configuration.
#
# The configuration is checked before any file of the agent is replaced; prerequisites.sh replaces its own files earlier.
# All new files are written and synced before the first rename, because a power cut may come at any moment. At the end,
# the agent and its podman are enabled, running and synced.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
user=iot-agent
etc=/etc/iot-agent
lib=/usr/local/lib/iot-agent
link=/usr/local/bin/iot-agent
socket=/run/iot-agent/podman.sock

# Writes a copy of the file $2 with mode $1 as $3.new.
write() {
    install -D -m "$1" "$2" "$3.new"
}

# Renames $1.new to $1. The files of the agent are all written and synced at this time.
rename() {
    mv -fT "$1.new" "$1"
}

# Prints the directory of an executable, which is named after its digest.
version() {
    digest=$(sha256sum "$1")
    printf '%s/versions/%.16s' "$lib" "$digest"
}

# Prints the paths in the bundle's directory `secrets` for which find(1) with the arguments is true.
secrets() {
    if [ -d "$here/secrets" ]; then
        (cd "$here/secrets" && find . "$@")
    fi
}

sh "$here/prerequisites.sh"

# The group of the service may read the configuration and the secrets, and only root may change them.
install -d -m 0750 -g "$user" "$etc" "$etc/secrets"
new=$(version "$here/iot-agent")
# If this executable is installed already, the link leads to it, so it must stay whole.
if ! cmp -s "$here/iot-agent" "$new/iot-agent"; then
    write 0755 "$here/iot-agent" "$new/iot-agent"
    sync "$new/iot-agent.new"
    rename "$new/iot-agent"
fi
staged=$etc/staged
rm -rf "$staged"
install -d -m 0750 -g "$user" "$staged" "$staged/secrets"
# The check must see the device's own files with the rights that they have.
cp -RL --preserve=mode,ownership "$etc/secrets/." "$staged/secrets/"
secrets -type d | while IFS= read -r path; do
    install -d -m 0750 -g "$user" "$staged/secrets/$path"
done
secrets ! -type d | while IFS= read -r path; do
    install -m 0640 -g "$user" "$here/secrets/$path" "$staged/secrets/$path"
done
config=$here/config.toml
if [ ! -e "$config" ]; then
    config=$etc/config.toml
fi
install -m 0640 -g "$user" "$config" "$staged/config.toml"
# As root, check-config reads the files with the rights of the service.
"$new/iot-agent" check-config "$staged/config.toml"

units=/etc/systemd/system
images=/var/lib/iot-agent/images
upgrade=
if [ -e "$units/iot-agent.service" ]; then
    upgrade=yes
fi
old=
if [ -L "$link" ]; then
    old=$(dirname -- "$(readlink -f "$link")")
elif [ -e "$link" ]; then
    old=$(version "$link")
    write 0755 "$link" "$old/iot-agent"
    rename "$old/iot-agent"
fi
write 0644 "$here/iot-agent.service" "$units/iot-agent.service"
write 0644 "$here/iot-readahead.service" "$units/iot-readahead.service"
write 0644 "$here/readahead.sh" "$lib/readahead.sh"
write 0755 "$here/uninstall.sh" "$lib/uninstall.sh"
for archive in "$here"/*.tar; do
    if [ -e "$archive" ]; then
        install -m 0640 -g "$user" "$archive" "$images/${archive##*/}.new"
    fi
done
ln -sfn "$new/iot-agent" "$link.new"
sync

for archive in "$here"/*.tar; do
    if [ -e "$archive" ]; then
        rename "$images/${archive##*/}"
    fi
done
# The device's own files were copied for the check alone. They may be links, or may have been replaced meanwhile.
secrets -type d | while IFS= read -r path; do
    install -d -m 0750 -g "$user" "$etc/secrets/$path"
done
secrets ! -type d | while IFS= read -r path; do
    mv -fT "$staged/secrets/$path" "$etc/secrets/$path"
done
rename "$lib/readahead.sh"
rename "$lib/uninstall.sh"
rename "$units/iot-readahead.service"
rename "$units/iot-agent.service"
if [ "$config" != "$etc/config.toml" ]; then
    mv -f "$staged/config.toml" "$etc/config.toml"
fi
rename "$link"
rm -r "$staged"

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
# Keep the previous executable, and delete all older ones. If the same executable was installed again, the previous one
# is not known.
if [ "$old" != "$new" ]; then
    for directory in "$lib"/versions/*; do
        if [ "$directory" != "$new" ] && [ "$directory" != "$old" ]; then
            rm -r "$directory"
        fi
    done
fi
sync
