#!/bin/sh
# Removes the agent and its containers from this device. Run it as root. The state of the deployments, their volumes and
# images, the configuration and the user stay, so that a later installation goes on with them. With --purge, they are
# removed too. The distribution's packages stay in both cases.
set -eu
user=iot-agent
home=/var/lib/iot-agent
lib=/usr/local/lib/iot-agent
purge=
case "${1-}" in
    '') ;;
    --purge) purge=yes ;;
    *)
        echo "uninstall.sh: $1: unknown argument; there is only --purge" >&2
        exit 2
        ;;
esac

# The units may be missing if an earlier call was interrupted.
for unit in iot-agent.service iot-readahead.service; do
    if [ -e "/etc/systemd/system/$unit" ]; then
        systemctl disable --now "$unit"
        rm "/etc/systemd/system/$unit"
    fi
done
if uid=$(id -u "$user" 2>/dev/null); then
    socket=/run/iot-agent/podman.sock
    if [ -S "$socket" ]; then
        containers=$(podman --url "unix://$socket" ps --all --quiet --filter label=io.iot-agent.device)
        for container in $containers; do
            podman --url "unix://$socket" rm --force "$container"
        done
    fi
    loginctl disable-linger "$user"
    systemctl stop "user@$uid.service"
    directory=/etc/systemd/system/user@$uid.service.d
    rm -f "$directory/iot-agent.conf"
    if [ -d "$directory" ]; then
        rmdir --ignore-fail-on-non-empty "$directory"
    fi
fi
rm -rf "$lib" /usr/local/bin/iot-agent /usr/local/bin/iot-agent.new /run/iot-agent \
    /etc/sysusers.d/iot-agent.conf /etc/tmpfiles.d/iot-agent.conf
systemctl daemon-reload
if [ -n "$purge" ]; then
    rm -rf "$home" /etc/iot-agent
    if [ -n "$uid" ]; then
        userdel "$user"
    fi
    sed -i "/^$user:/d" /etc/subuid /etc/subgid
fi
sync
