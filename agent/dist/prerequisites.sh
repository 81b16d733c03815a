#!/bin/sh
# Prepares a device for the agent: installs the distribution's podman, makes a user for the agent, and starts podman
# for that user. Run it as root. install.sh runs it. It may also run on its own, to prepare a device without the agent.
# The directory of this script must also hold check-host.sh, iot-agent.sysusers, iot-agent.tmpfiles, iot-podman.socket,
# iot-podman.service, iot-user.conf, containers.conf and storage.conf. The script leaves parts alone that are already
# as they must be.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
user=iot-agent
home=/var/lib/iot-agent
# The directories that iot-user.conf names.
units=/usr/local/lib/iot-agent/user-units
generators=/usr/local/lib/iot-agent/environment-generators

# Podman needs newuidmap to run for an ordinary user, the D-Bus of the user's systemd to set limits, and a network
# program. Ubuntu's cloud image has none of these packages. An image without recommended packages lacks the last two.
install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    # Soon after a boot, the distribution's own updater may hold apt's locks. apt-get can wait for dpkg's locks
    # (DPkg::Lock::Timeout), but not for the lock that `update` takes. Therefore this loop repeats `apt-get update`.
    tries=24
    until apt-get update; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ]
        sleep 5
    done
    apt-get -o DPkg::Lock::Timeout=120 install --yes "$@"
}
if ! command -v podman || ! command -v newuidmap || [ ! -e /usr/lib/systemd/user/dbus.socket ]; then
    install_packages podman uidmap dbus-user-session
fi
# Podman 5 and newer use pasta for the network. Podman 4 uses slirp4netns (podman-run(1), --network).
if ! command -v pasta && ! command -v slirp4netns; then
    install_packages passt slirp4netns
fi
sh "$here/check-host.sh"

# Gives the file $3 the mode $1 and the content of $2. The content is on the disk before the file gets its name, because a
# power cut may come at any moment. A file that has the content already is left alone.
replace() {
    if ! cmp -s "$2" "$3"; then
        install -D -m "$1" "$2" "$3.new"
        sync "$3.new"
        mv -fT "$3.new" "$3"
    fi
}

# The files for the user's systemd and podman come first, since these take longest to start.
systemd-sysusers "$here/iot-agent.sysusers"
systemd-tmpfiles --create "$here/iot-agent.tmpfiles"
changed=
for unit in iot-podman.socket iot-podman.service; do
    if ! cmp -s "$here/$unit" "$units/$unit"; then
        replace 0644 "$here/$unit" "$units/$unit"
        changed=yes
    fi
done
for file in containers.conf storage.conf; do
    replace 0644 "$here/$file" "$home/.config/containers/$file"
done
# Subordinate ids for the users of containers: 65536 ids behind the last range in use (subuid(5)). useradd gives none to
# a system user. The loop starts no programs, since each would take a tenth of a second on an emulated processor.
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

# The user's own systemd runs from boot on, and podman's socket is one of its units. A link enables the socket, so that
# this systemd need not run yet. It starts while the agent is installed.
uid=$(id -u "$user")
install -d "$units/sockets.target.wants" "$generators"
ln -sf /usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator "$generators/"
ln -sf ../iot-podman.socket "$units/sockets.target.wants/"
replace 0644 "$here/iot-user.conf" "/etc/systemd/system/user@$uid.service.d/iot-agent.conf"
if [ -n "$changed" ] && [ -S "/run/user/$uid/systemd/private" ]; then
    # In an upgrade, the user's systemd runs already and has not read the new units.
    of_user="runuser -u $user -- env XDG_RUNTIME_DIR=/run/user/$uid systemctl --user"
    $of_user daemon-reload
    $of_user start iot-podman.socket
fi
lingers=
if [ ! -e "/var/lib/systemd/linger/$user" ]; then
    loginctl enable-linger "$user" &
    lingers=$!
fi
replace 0644 "$here/iot-agent.sysusers" /etc/sysusers.d/iot-agent.conf
replace 0644 "$here/iot-agent.tmpfiles" /etc/tmpfiles.d/iot-agent.conf
if [ -n "$lingers" ]; then
    wait "$lingers"
fi
