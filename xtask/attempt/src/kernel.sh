#!/bin/sh
# Downloads the newest version of a kernel, and unpacks the files from which xtask/attempt/src/kernel.rs takes what a
# machine needs. Runs in the directory of the kernel. $1 is the package that depends on the newest version. APT_CONFIG
# names the configuration of apt, which verifies the signature of each Release file, and the digests of the package
# lists and of the package.
set -eu
apt-get --quiet -o APT::Update::Error-Mode=any update
package=$(apt-cache depends --important "$1" | sed -n 's/^ *Depends: //p' | head -n 1)
test -n "$package" || { echo "the package $1 does not exist, or depends on no kernel"; exit 1; }
apt-get --quiet download "$package"
mkdir tree
dpkg-deb --fsys-tarfile "$package"_*.deb > data.tar
tar --extract --file data.tar --directory tree --no-same-owner --wildcards \
    './boot/vmlinuz-*' '*/modules.builtin' '*/kernel/fs/*' '*/kernel/net/9p/*' '*/kernel/lib/*' '*/kernel/crypto/*' \
    '*/kernel/drivers/block/*' '*/kernel/drivers/char/*' '*/kernel/drivers/virtio/*'
