#!/bin/sh
# Runs the host's daemons as the first process of their process namespace. If this process ends, the kernel ends all
# processes of the namespace. The argument is the test's directory.
set -eu
# Do not `exec` the last of them: the first process of a process namespace becomes the parent of the daemons in the
# namespace. The shell reaps them. libvirt waits 40 s for the end of a QEMU that has ended but is not reaped.
virtlogd --daemon
# sshd(8) demands an absolute path.
"$(command -v sshd)" -f "$1/sshd/config" -E "$1/sshd/log"
libvirtd
echo "libvirtd ended with $?"
