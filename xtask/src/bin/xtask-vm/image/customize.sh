# Runs by mmdebstrap's customize hook with the new tree as $1, when every package is configured.
set -eu
root=$1

cat > "$root/etc/fstab" <<'FSTAB'
LABEL=rootfs / ext4 defaults,errors=remount-ro 0 1
FSTAB
echo iot-device > "$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 iot-device\n::1 localhost ip6-localhost ip6-loopback\n' > "$root/etc/hosts"
echo 'LANG=C.UTF-8' > "$root/etc/default/locale"
# The seed is a disk: cloud-init need not look for a network that would serve one.
printf 'datasource_list: [ NoCloud, None ]\n' > "$root/etc/cloud/cloud.cfg.d/90_datasource.cfg"

# What a virtual machine's root file system needs, not every driver there is: made once, at the end.
printf 'virtio_pci\nvirtio_blk\nvirtio_net\next4\n' >> "$root/etc/initramfs-tools/modules"
mkdir -p "$root/etc/initramfs-tools/conf.d"
echo 'MODULES=list' > "$root/etc/initramfs-tools/conf.d/modules"
chroot "$root" update-initramfs -c -k all

chroot "$root" systemctl enable systemd-networkd systemd-resolved ssh

# What must differ between two machines is made at the first boot.
rm -f "$root"/etc/ssh/ssh_host_*
: > "$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"
