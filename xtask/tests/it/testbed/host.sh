#!/bin/sh
# Runs a host with libvirtd and sshd, and a client beside it. unshare(1) has given this shell a mount namespace and a
# network namespace, the host's. The argument is the test's directory. The shell stays in the machine's process
# namespace, where `here` and `beside` start their programs. The daemons are in a process namespace of their own.
set -eu
testbed=$1
# If the shell ends, the kernel ends the daemons. Before that, this function ends the other processes of the two mount
# namespaces. A daemon of an ordinary user's session outlives the program that has started it.
client=
end() {
    trap '' TERM
    left=yes
    while [ "$left" ]; do
        left=
        for process in /proc/[0-9]*; do
            pid=${process#/proc/}
            if [ "$pid" = $$ ] || [ "$pid" = "$client" ]; then continue; fi
            for of in $$ $client; do
                if [ "$process/ns/mnt" -ef "/proc/$of/ns/mnt" ]; then
                    kill -KILL "$pid" || true
                    left=yes
                fi
            done
        done
    done
    if [ "$client" ]; then kill -KILL "$client"; fi
    exit 0
}
trap end TERM
# Replaces a directory by an empty one with links to all entries of the machine's directory, which is read-only here.
own() {
    mkdir -p "$testbed/machine$1"
    mount --rbind "$1" "$testbed/machine$1"
    mount -o remount,bind,ro "$testbed/machine$1"
    mount -t tmpfs -o mode=755 tmpfs "$1"
    find "$testbed/machine$1" -mindepth 1 -maxdepth 1 ! -name libvirt -exec ln -s '{}' "$1/" ';'
    mkdir "$1/libvirt"
}
for path in /etc /var/lib /var/cache /var/log; do own "$path"; done
mount --bind "$testbed/etc" /etc/libvirt
# The volumes must be on a disk: QEMU opens them with O_DIRECT.
mount --bind "$testbed/lib" /var/lib/libvirt
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/sshd /run/user/65534 /run/programs
chown 65534:65534 /run/user/65534
chmod 700 /run/user/65534
# libvirt finds the namespace's bridges in a sysfs of the namespace. The mounts below the machine's sysfs are kept.
mkdir "$testbed/cgroup"
if [ -d /sys/fs/cgroup ]; then mount --rbind /sys/fs/cgroup "$testbed/cgroup"; fi
mount -t sysfs sysfs /sys
mount --rbind "$testbed/cgroup" /sys/fs/cgroup
# Mounts that a test makes here, later, must appear before the daemons, too.
mount --make-rshared /
ip link set lo up
ip link add host0 type veth peer name client0
ip address add 10.77.0.2/24 dev host0
ip link set host0 up
here=$(dirname "$0")
setpriv --pdeathsig KILL unshare --mount --net sh "$here/client.sh" "$testbed" &
client=$!
while [ ! -e "$testbed/client/ready" ]; do sleep 0.02; done
ip link set client0 netns "$client"
setpriv --pdeathsig KILL unshare --mount --propagation slave --pid --fork --kill-child --mount-proc \
    sh "$here/daemons.sh" "$testbed" &
daemons=$!
echo "$daemons" >"$testbed/daemons"
wait "$daemons" || true
echo "the daemons ended with $?"
end
