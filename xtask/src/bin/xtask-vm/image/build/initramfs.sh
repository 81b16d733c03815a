# Makes the initramfs of the tree $1, once, when everything else is in its place. IOT_ELF_MACHINE is the guest's e_machine;
# IOT_OTHER_LOADER is set where accelerate.sh ran.
set -eu
export LC_ALL=C
root=$1

# An initramfs takes copies of programs, and those must be the guest's: of the natives only the tools of shell scripts stay.
if [ -n "${IOT_OTHER_LOADER:-}" ]; then
    list=$root${IOT_OTHER_LOADER%/*}/list
    while read -r path; do
        case $path in
        usr/sbin/* | usr/bin/*mount* | usr/bin/kmod | usr/bin/lsblk)
            found=$(stat --format '%a %u %g' "$root/$path")
            [ "$found" = '755 0 0' ] || { echo "$path was given the mode, owner and group $found: leave it out of accelerate.sh" >&2; exit 1; }
            rm "$root/$path"
            [ ! -e "$root/$path.guest" ] || mv "$root/$path.guest" "$root/$path"
            ;;
        *) echo "$path" ;;
        esac
    done < "$list" > "$list-new"
    mv "$list-new" "$list"
fi

# What a virtual machine's root file system needs, not every driver there is.
printf 'virtio_pci\nvirtio_blk\nvirtio_net\next4\n' >> "$root/etc/initramfs-tools/modules"
mkdir -p "$root/etc/initramfs-tools/conf.d"
echo 'MODULES=list' > "$root/etc/initramfs-tools/conf.d/modules"
SOURCE_DATE_EPOCH=$(cat "$root/.manifest/epoch") chroot "$root" update-initramfs -c -k all

# As the kernel's own installation links them, where it makes the initramfs (linux-update-symlinks).
for kernel in vmlinuz vmlinuz.old; do
    [ -L "$root/$kernel" ] || continue
    target=$(readlink "$root/$kernel")
    ln -s "boot/initrd.img-${target#boot/vmlinuz-}" "$root/initrd.img${kernel#vmlinuz}"
done

mkdir "$root/.initramfs"
chroot "$root" sh -c 'unmkinitramfs /boot/initrd.img-* /.initramfs'
programs=0
for file in $(find "$root/.initramfs" -type f); do
    [ "$(head -c 4 "$file" | tail -c 3)" = ELF ] || continue
    programs=$((programs + 1))
    machine=$(od -A n -t u2 -j 18 -N 2 "$file" | tr -d ' ')
    [ "$machine" = "$IOT_ELF_MACHINE" ] || {
        echo "the initramfs holds ${file#"$root/.initramfs/"}, for the ELF machine $machine and not $IOT_ELF_MACHINE" >&2
        exit 1
    }
done
[ "$programs" -gt 20 ] || { echo "the initramfs holds $programs programs and modules: too few to boot" >&2; exit 1; }
rm -r "$root/.initramfs"
