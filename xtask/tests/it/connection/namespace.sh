#!/bin/sh
# Runs a libvirt daemon that sees nothing of this machine. unshare(1) gives the daemon its own namespaces, and this
# script gives it private copies of the directories to which it writes. The first argument is the test's directory.
set -eu
# libvirt calls which(1) over ssh. On Debian, this program is a link into /etc/alternatives.
if [ -d /etc/alternatives ]; then cp -R -P /etc/alternatives "$1/etc/"; fi
mount --bind "$1/etc" /etc
for path in /run /var/lib /var/cache /var/log; do mount -t tmpfs tmpfs "$path"; done
# virt-ssh-helper, which runs through the fake ssh, looks for the sockets here.
mkdir /run/libvirt
ln -s "$1/run/libvirt-sock" "$1/run/libvirt-sock-ro" /run/libvirt/
# Do not `exec`: the first process of a process namespace becomes the parent of the daemons in the namespace. The shell
# reaps them. libvirt waits 40 s for the end of a QEMU that has ended but is not reaped.
libvirtd --config "$1/libvirtd.conf" --pid-file "$1/pid"
echo "libvirtd ended with $?"
