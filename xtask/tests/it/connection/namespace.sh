#!/bin/sh
# A libvirt daemon that sees nothing of this machine's: in namespaces of its own (unshare), with private copies of what it
# writes to. The first argument is the test's directory.
set -eu
# which(1), which libvirt asks over ssh, is one of these on Debian.
if [ -d /etc/alternatives ]; then cp -R -P /etc/alternatives "$1/etc/"; fi
mount --bind "$1/etc" /etc
for path in /run /var/lib /var/cache /var/log; do mount -t tmpfs tmpfs "$path"; done
# Where virt-ssh-helper looks, through the fake ssh.
mkdir /run/libvirt
ln -s "$1/run/libvirt-sock" "$1/run/libvirt-sock-ro" /run/libvirt/
# Not `exec`: the first process of a process namespace is the parent of the daemons in it, and libvirt waits 40 s for the
# end of a QEMU that has ended and that nobody has collected. The shell collects.
libvirtd --config "$1/libvirtd.conf" --pid-file "$1/pid"
echo "libvirtd ended with $?"
