#!/bin/sh
# Runs a libvirt daemon that sees nothing of this machine: unshare(1) gives it its own namespaces, and it gets private copies of
# the directories to which it writes. The first argument is the test's directory.
set -eu
# libvirt calls which(1) over ssh. On Debian, which is one of the alternatives.
if [ -d /etc/alternatives ]; then cp -R -P /etc/alternatives "$1/etc/"; fi
mount --bind "$1/etc" /etc
for path in /run /var/lib /var/cache /var/log; do mount -t tmpfs tmpfs "$path"; done
# virt-ssh-helper, which runs through the fake ssh, looks for the sockets here.
mkdir /run/libvirt
ln -s "$1/run/libvirt-sock" "$1/run/libvirt-sock-ro" /run/libvirt/
# Do not `exec`: the first process of a process namespace becomes the parent of the daemons in it. The shell reaps them. If a QEMU
# that has ended is not reaped, libvirt waits 40 s for its end.
libvirtd --config "$1/libvirtd.conf" --pid-file "$1/pid"
echo "libvirtd ended with $?"
