# mmdebstrap's customize hook runs this with the new tree as $1 after every package is configured. IOT_LAYOUT,
# IOT_LOGIN_USER and IOT_SUITE describe the image.
set -eu
root=$1

# The newest date in the packages is the image's date, so that the same packages give the same image.
epoch=$(find "$root/usr/share/doc" -name 'changelog*' -type f -printf '%T@\n' | sort -n | tail -n 1 | cut -d . -f 1)
mkdir "$root/.manifest"
echo "$epoch" > "$root/.manifest/epoch"
for list in "$root"/var/lib/apt/lists/*_InRelease; do
    sed -n '/^\(Suite\|Codename\|Date\): /p; /^SHA256:/q' "$list"
done > "$root/.manifest/mirror"

printf 'LABEL=rootfs / ext4 defaults,errors=remount-ro 0 1\n' > "$root/etc/fstab"
echo iot-device > "$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 iot-device\n::1 localhost ip6-localhost ip6-loopback\n' > "$root/etc/hosts"
echo 'LANG=C.UTF-8' > "$root/etc/default/locale"
printf 'system_info: { default_user: { name: %s } }\n' "$IOT_LOGIN_USER" > "$root/etc/cloud/cloud.cfg.d/90_image.cfg"

if [ "$IOT_LAYOUT" = grub ]; then
    printf 'LABEL=BOOT /boot ext4 defaults 0 2\nLABEL=UEFI /boot/efi vfat umask=0077 0 1\n' >> "$root/etc/fstab"
    mkdir -p "$root/boot/efi"
    printf 'system_info: { network: { renderers: [ netplan ] } }\n' > "$root/etc/cloud/cloud.cfg.d/91_netplan.cfg"
    # On Ubuntu, cloud-init waits for snapd's seeding (cloud-config.service, After=snapd.seeded.service) at the first
    # boot.
    cat > "$root/etc/systemd/system/first-boot-seed.service" <<'UNIT'
[Unit]
Description=A slow first boot, as snapd's seeding makes it
Before=cloud-config.service
ConditionPathExists=!/var/lib/first-boot-seed

[Service]
Type=oneshot
ExecStart=/bin/sleep 20
ExecStart=/bin/touch /var/lib/first-boot-seed

[Install]
WantedBy=multi-user.target
UNIT
    chroot "$root" systemctl enable first-boot-seed.service
fi

chroot "$root" systemctl enable systemd-networkd systemd-resolved ssh

# The mirror and the resolvers are those of this host. They are removed, so that the image is the same on another host.
printf '# %s main: no mirror is named, since a device has its own.\n' "$IOT_SUITE" > "$root/etc/apt/sources.list"
rm -f "$root"/etc/apt/sources.list.d/* "$root/etc/.resolv.conf.systemd-resolved.bak"

# Files that must differ between two machines are made at the first boot.
rm -f "$root"/etc/ssh/ssh_host_*
: > "$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"
# These files contain the day of the build: the last change of passwords, and dates in backups and caches.
for file in shadow shadow-; do
    awk -F : -v OFS=: -v day="$((epoch / 86400))" '{ $3 = day; print }' "$root/etc/$file" > "$root/.manifest/shadow"
    cat "$root/.manifest/shadow" > "$root/etc/$file"
done
rm "$root/.manifest/shadow"
rm -f "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old "$root"/var/cache/ldconfig/aux-cache
