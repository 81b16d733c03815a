# Makes the initramfs of the tree $1 once, after everything else is in place. IOT_ELF_MACHINE is the guest's e_machine.
# IOT_OTHER_LOADER is set if accelerate.sh has run.
set -eu
export LC_ALL=C
root=$1

# An initramfs contains copies of programs, and these must be the guest's. Of the native tools, only those stay that
# shell scripts call.
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

# The initramfs contains only the drivers for the root file system of a virtual machine.
printf 'virtio_pci\nvirtio_blk\nvirtio_net\next4\n' >> "$root/etc/initramfs-tools/modules"
mkdir -p "$root/etc/initramfs-tools/conf.d"
# The usual level of zstd here is 19. It takes longer than everything else together, and makes a file of a few MB only
# a tenth smaller.
printf 'MODULES=list\nCOMPRESSLEVEL=3\n' > "$root/etc/initramfs-tools/conf.d/modules"
SOURCE_DATE_EPOCH=$(cat "$root/.manifest/epoch") chroot "$root" update-initramfs -c -k all

# The installation of the kernel makes these links if it makes the initramfs (linux-update-symlinks).
for kernel in vmlinuz vmlinuz.old; do
    [ -L "$root/$kernel" ] || continue
    target=$(readlink "$root/$kernel")
    ln -s "boot/initrd.img-${target#boot/vmlinuz-}" "$root/initrd.img${kernel#vmlinuz}"
done

mkdir "$root/.initramfs"
chroot "$root" sh -c 'unmkinitramfs /boot/initrd.img-* /.initramfs'
# One process checks the e_machine (elf(5)) of all files. perl exists, since mmdebstrap needs it.
find "$root/.initramfs" -type f -print0 | perl -0 -ne '
    chomp;
    open(my $file, "<", $_) or die "open $_: $!\n";
    read($file, my $head, 20);
    next unless $head =~ /^\x7fELF/;
    $programs++;
    my $machine = unpack("x18 v", $head);
    die "the initramfs holds $_, for the ELF machine $machine and not $ENV{IOT_ELF_MACHINE}\n" if $machine != $ENV{IOT_ELF_MACHINE};
    END { $? or $programs > 20 or die "the initramfs holds $programs programs and modules: too few to boot\n" }
'
rm -r "$root/.initramfs"
