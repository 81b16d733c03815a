#!/bin/sh
# What the agent needs and is not the agent: the distribution's podman, a user of its own, and podman at work for that user. From the
# directory of this script, which also holds: iot-agent.sysusers, iot-agent.tmpfiles, iot-podman.socket, iot-podman.service,
# iot-user.conf, containers.conf, storage.conf. As root; install.sh runs it, and whoever prepares a device without the agent may. What is
# as it should be stays.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
user=iot-agent
home=/var/lib/iot-agent
# What iot-user.conf names.
units=/usr/local/lib/iot-agent/user-units
generators=/usr/local/lib/iot-agent/environment-generators

# podman and, for a user's own, newuidmap. Ubuntu's cloud image has neither.
if ! command -v podman || ! command -v newuidmap; then
    export DEBIAN_FRONTEND=noninteractive
    # The distribution's own updater may have apt's locks soon after a boot; only dpkg's can be waited for by an option.
    tries=24
    until apt-get update; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ]
        sleep 5
    done
    apt-get -o DPkg::Lock::Timeout=120 install --yes podman uidmap dbus-user-session
fi

# What the user's own systemd and podman need comes first, since they take longest to start.
systemd-sysusers "$here/iot-agent.sysusers"
systemd-tmpfiles --create "$here/iot-agent.tmpfiles"
changed=
for unit in iot-podman.socket iot-podman.service; do
    if [ ! -e "$units/$unit" ] || ! cmp -s "$here/$unit" "$units/$unit"; then
        install -D -m 0644 -t "$units" "$here/$unit"
        changed=yes
    fi
done
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
if [ -n "$changed" ] && [ -S "/run/user/$uid/systemd/private" ]; then
    # An upgrade: it runs, and has not seen the units of now.
    of_user="runuser -u $user -- env XDG_RUNTIME_DIR=/run/user/$uid systemctl --user"
    $of_user daemon-reload
    $of_user start iot-podman.socket
fi
lingers=
if [ ! -e "/var/lib/systemd/linger/$user" ]; then
    loginctl enable-linger "$user" &
    lingers=$!
fi
install -D -m 0644 "$here/iot-agent.sysusers" /etc/sysusers.d/iot-agent.conf
install -D -m 0644 "$here/iot-agent.tmpfiles" /etc/tmpfiles.d/iot-agent.conf
if [ -n "$lingers" ]; then
    wait "$lingers"
fi
