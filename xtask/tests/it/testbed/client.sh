#!/bin/sh
# Keeps the namespaces of the client: a machine beside the host, which has no libvirt of its own and sees no file of
# the host's. The argument is the test's directory.
set -eu
for path in /run /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
    mount -t tmpfs -o mode=755 tmpfs "$path"
done
mkdir /run/lock
mount -t sysfs sysfs /sys
mount --rbind "$1/cgroup" /sys/fs/cgroup
# ssh(1) reads `.ssh` in the home directory that passwd(5) names, not in the one that `$HOME` names.
mount --bind "$1/client/passwd" /etc/passwd
ip link set lo up
: >"$1/client/ready"
while [ ! -e /sys/class/net/client0 ]; do sleep 0.02; done
ip address add 10.77.0.1/24 dev client0
ip link set client0 up
echo "$$" >"$1/client/up"
exec sleep infinity
