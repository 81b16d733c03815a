# Makes disk.raw out of root.tar, both in directory $1: a GPT with an ESP that holds systemd-boot, and an ext4 root.
# $2 the loader's name on the ESP, $3 its name in the package, $4 the kernel's console, $5 the disk's MiB.
set -eu
cd "$1"
esp_mib=128
root_mib=$(( $5 - esp_mib - 2 ))

mkdir tree
# Without the device nodes, which no user namespace may make: the kernel mounts its own /dev over them.
tar --extract --file root.tar --directory tree --numeric-owner --same-owner --exclude='./dev/*'

sfdisk --quiet disk.raw <<TABLE
label: gpt
start=1MiB, size=${esp_mib}MiB, type=uefi, name=esp
start=$(( esp_mib + 1 ))MiB, size=${root_mib}MiB, type=linux, name=root
TABLE

truncate --size "${esp_mib}M" esp.img
mkfs.vfat -n ESP esp.img
printf 'timeout 0\ndefault linux.conf\neditor no\n' > loader.conf
printf 'title Linux\nlinux /linux/vmlinuz\ninitrd /linux/initrd.img\noptions root=LABEL=rootfs ro console=%s\n' "$4" > linux.conf
mmd -i esp.img ::EFI ::EFI/BOOT ::loader ::loader/entries ::linux
mcopy -i esp.img "tree/usr/lib/systemd/boot/efi/$3" "::EFI/BOOT/$2"
mcopy -i esp.img tree/boot/vmlinuz-* ::linux/vmlinuz
mcopy -i esp.img tree/boot/initrd.img-* ::linux/initrd.img
mcopy -i esp.img loader.conf ::loader/loader.conf
mcopy -i esp.img linux.conf ::loader/entries/linux.conf
dd if=esp.img of=disk.raw bs=1M seek=1 conv=notrunc,sparse status=none

mke2fs -q -F -t ext4 -L rootfs -d tree -E "offset=$(( (esp_mib + 1) * 1048576 ))" disk.raw "${root_mib}M"
rm -rf tree esp.img
