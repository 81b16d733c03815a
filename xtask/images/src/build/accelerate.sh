# mmdebstrap's extract hook runs this with the new tree as $1, after the essential packages are unpacked and before one
# is configured. Maintainer scripts call the shell, coreutils, perl, python and dpkg. This script replaces the guest's
# builds of these tools with this host's builds, which run without emulation. Emulation costs 26 to 45 ms for each
# process. This host's builds come from a tree of its architecture, which was unpacked beside IOT_OTHER_LOADER. The
# diversions that this script makes let dpkg keep the guest's files under other names. restore.sh puts them back. The
# suite and the versions are the same, so the maintainer scripts write the same files as with the guest's own tools.
#
# IOT_HOST_ARCH and IOT_GUEST_ARCH are dpkg's names of the architectures. This host's programs expect their loader at
# IOT_LOADER and their libraries at IOT_LIBRARIES. In the tree, these are at IOT_OTHER_LOADER and IOT_OTHER_LIBRARIES.
# Those paths have the same lengths, and are not below /usr, which maintainer scripts search.
set -eu
export LC_ALL=C
root=$1
own=${IOT_OTHER_LOADER%/*}
tools=$root$own/tree

relocate() {
    sed -e "s#$IOT_LOADER#$IOT_OTHER_LOADER#; s#$IOT_LIBRARIES#$IOT_OTHER_LIBRARIES#g; $3" "$1" > "$2"
    chmod 755 "$2"
}
mkdir -p "$root$IOT_OTHER_LIBRARIES" "$root/var/lib/dpkg"
rm -rf "$tools$IOT_LIBRARIES/gconv"
# The loader is copied from its place among the libraries. The path that programs know is a link. In some suites the
# link is absolute, and would lead to this host's own loader.
relocate "$tools$IOT_LIBRARIES/${IOT_LOADER##*/}" "$root$IOT_OTHER_LOADER" ''
cp -a "$tools$IOT_LIBRARIES/." "$root$IOT_OTHER_LIBRARIES/"

divert() {
    printf '/%s\n/%s.guest\n:\n' "$1" "$1" >> "$root/var/lib/dpkg/diversions"
}
for directory in usr/bin usr/sbin; do
    for file in "$tools/$directory"/*; do
        [ -f "$file" ] && [ ! -L "$file" ] && [ "$(head -c 4 "$file" | tail -c 3)" = ELF ] || continue
        name=${file##*/}
        change=
        case $name in
        # Programs that report the machine or handle the guest's libraries must be the guest's.
        arch | chroot | getconf | hwclock | iconv | ldconfig | lscpu | setarch | uname) continue ;;
        # Of ssh's programs, maintainer scripts call only ssh-keygen, and they change the group of ssh-agent.
        ssh-keygen) ;;
        scp | sftp | ssh | ssh-*) continue ;;
        # Each of these programs contains the name of its own architecture.
        dpkg* | update-alternatives) change="s/$IOT_HOST_ARCH/$IOT_GUEST_ARCH/g" ;;
        esac
        echo "$directory/$name" >> "$root$own/list"
        [ ! -e "$root/$directory/$name" ] || mv "$root/$directory/$name" "$root/$directory/$name.guest"
        relocate "$file" "$root/$directory/$name" "$change"
        # Packages name their files with or without /usr.
        divert "$directory/$name"
        divert "${directory#usr/}/$name"
    done
done
rm -r "$tools"
found=$(chroot "$root" dpkg --print-architecture)
[ "$found" = "$IOT_GUEST_ARCH" ] || { echo "dpkg reports the architecture $found, expected $IOT_GUEST_ARCH" >&2; exit 1; }
