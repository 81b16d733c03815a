# Makes disk.raw from root.tar. Both are in the directory $1. The disk has a GPT with an ESP and an ext4 root, and with
# IOT_LAYOUT=grub also a /boot. The facts for the manifest are left in manifest/. The same tree gives the same bytes
# with the same version of e2fsprogs.
#
# Variables: IOT_LAYOUT, IOT_CONSOLE (the kernel's console), IOT_DISK_MIB, IOT_EFI_FILE (the loader's name on the ESP),
# IOT_LOADER_FILE (the loader's path in the tree), IOT_UUID (36 characters; the first one is replaced), IOT_TMPFS (the
# size of the tmpfs, or empty to use the disk).
set -eu
export LC_ALL=C MTOOLS_SKIP_CHECK=1 TZ=UTC
cd "$1"
esp_mib=128
boot_mib=0
[ "$IOT_LAYOUT" != grub ] || boot_mib=512
root_mib=$((IOT_DISK_MIB - esp_mib - boot_mib - 2))

# If there is enough memory, the tree is unpacked in a tmpfs, which is faster.
mkdir tree
[ -z "$IOT_TMPFS" ] || mount -t tmpfs -o "size=$IOT_TMPFS,mode=755" tmpfs tree
# Device nodes are left out, since no user namespace may make them. The kernel mounts its own /dev over them.
echo "I: unpacking the tree"
tar --extract --file root.tar --directory tree --numeric-owner --same-owner --xattrs --xattrs-include='*' --exclude='./dev/*'
# These two directories belong to root if root has built the image, and to _apt otherwise.
chown 0:0 tree/var/cache/apt/archives/partial tree/var/lib/apt/lists/partial
mv tree/.manifest manifest
cp tree/var/lib/dpkg/status tree/usr/lib/os-release manifest/
cp tree/boot/config-* manifest/kernel-config
epoch=$(cat manifest/epoch)
export SOURCE_DATE_EPOCH="$epoch" E2FSPROGS_FAKE_TIME="$epoch"
find tree -newermt "@$epoch" -exec touch --no-dereference --date "@$epoch" {} +

# Makes an ext4 of $3 MiB in the file $1, with the label $2, the number $4 in its UUID, and the content of the directory
# $5.
ext4() {
    truncate --size "${3}M" "$1"
    uuid=$4${IOT_UUID#?}
    mke2fs -q -F -t ext4 -L "$2" -U "$uuid" -E "hash_seed=$uuid" -d "$5" "$1"
    # mke2fs 1.47.0 copies the times of access and of change into the image, and the latter cannot be set on the files.
    # mke2fs 1.47.1 does not copy them.
    (cd "$5" && find . -mindepth 1 -printf '%P\n') | awk -v e="@$epoch" '{
        for (n = split("ctime atime crtime", f, " "); n > 0; n--) {
            print "sif \"/" $0 "\" " f[n] " " e; print "sif \"/" $0 "\" " f[n] "_extra 0"
        }
    }' > times
    debugfs -w -f times "$1" > /dev/null 2> times.log
    # debugfs reports errors on stderr, after its own name and version, and still ends with 0.
    if grep -v '^debugfs ' times.log; then exit 1; fi
    rm times times.log
}

echo "I: making the file systems"
kernel=$(echo tree/boot/vmlinuz-*)
initrd=$(echo tree/boot/initrd.img-*)
mkdir esp
mkdir -p "esp/EFI/BOOT"
cp "tree/$IOT_LOADER_FILE" "esp/EFI/BOOT/$IOT_EFI_FILE"
options="root=LABEL=rootfs ro console=$IOT_CONSOLE"
boot_start=$((1 + esp_mib))
root_start=$((boot_start + boot_mib))
if [ "$IOT_LAYOUT" = grub ]; then
    mkdir esp/EFI/debian
    printf 'search --no-floppy --label BOOT --set=root\nset prefix=($root)/grub\nconfigfile $prefix/grub.cfg\n' \
        > esp/EFI/debian/grub.cfg
    mv tree/boot boot
    mkdir tree/boot
    mkdir -p boot/grub boot/efi
    printf 'set timeout=0\nmenuentry Linux {\n  linux /%s %s\n  initrd /%s\n}\n' "${kernel##*/}" "$options" "${initrd##*/}" \
        > boot/grub/grub.cfg
    find boot tree/boot -newermt "@$epoch" -exec touch --no-dereference --date "@$epoch" {} +
    label=UEFI
else
    mkdir -p esp/loader/entries esp/linux
    cp "$kernel" esp/linux/vmlinuz
    cp "$initrd" esp/linux/initrd.img
    printf 'timeout 0\ndefault linux.conf\neditor no\n' > esp/loader/loader.conf
    printf 'title Linux\nlinux /linux/vmlinuz\ninitrd /linux/initrd.img\noptions %s\n' "$options" \
        > esp/loader/entries/linux.conf
    label=ESP
fi
find esp -exec touch --date "@$epoch" {} +

# This is Ubuntu's order: the root partition has the first number and is the last on the disk.
{
    printf 'label: gpt\nlabel-id: %s\n' "9${IOT_UUID#?}"
    printf '%s : start=1MiB, size=%sMiB, type=uefi, name=esp, uuid=%s\n' \
        disk.raw15 "$esp_mib" "a${IOT_UUID#?}"
    [ "$boot_mib" = 0 ] || printf '%s : start=%sMiB, size=%sMiB, type=linux, name=boot, uuid=%s\n' \
        disk.raw16 "$boot_start" "$boot_mib" "b${IOT_UUID#?}"
    printf '%s : start=%sMiB, size=%sMiB, type=linux, name=root, uuid=%s\n' \
        disk.raw1 "$root_start" "$root_mib" "c${IOT_UUID#?}"
} > table
sfdisk --quiet disk.raw < table

place() {
    dd if="$1" of=disk.raw bs=1M seek="$2" conv=notrunc,sparse status=none
    rm "$1"
}
truncate --size "${esp_mib}M" esp.img
mkfs.vfat --invariant -n "$label" esp.img
# Sort the paths: `mcopy -s` takes the files of a directory in the order in which the file system lists them.
(cd esp && find . -mindepth 1 -type d -printf '%P\n' | sort) > list
while read -r path; do mmd -i esp.img "::$path"; done < list
(cd esp && find . -type f -printf '%P\n' | sort) > list
while read -r path; do mcopy -m -i esp.img "esp/$path" "::$path"; done < list
rm list
place esp.img 1
if [ "$boot_mib" != 0 ]; then
    ext4 boot.img BOOT "$boot_mib" b boot
    place boot.img "$boot_start"
fi
ext4 root.img rootfs "$root_mib" c tree
place root.img "$root_start"

[ -z "$IOT_TMPFS" ] || umount tree
rm -rf tree esp boot table root.tar tools.tar memory sources.list
