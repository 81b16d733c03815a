# Runs by mmdebstrap's extract hook with the new tree as $1: its essential packages are there and none is configured, and
# beside the loader's new place is a tree of this host's architecture. Puts its build of the tools that maintainer scripts
# call (the shell, coreutils, perl, python, dpkg) in the place of the guest's, so that they run without emulation, which costs
# 26 to 45 ms for each process. dpkg keeps the guest's files beside them, under the names that these diversions give;
# restore.sh puts them back. Same suite, same versions: what the scripts write is what the guest's own would have written.
#
# IOT_HOST_ARCH and IOT_GUEST_ARCH as dpkg names them; IOT_LOADER and IOT_LIBRARIES, where this host's programs expect their
# loader and libraries; IOT_OTHER_LOADER and IOT_OTHER_LIBRARIES, where they are, paths of the same lengths: nothing of this
# is below /usr, where scripts look around.
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
# Not by the path that programs know it by: that is a link, in some suites an absolute one, and leads to this host's own.
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
        # What tells the machine, or handles the guest's libraries, must be the guest's.
        arch | chroot | getconf | hwclock | iconv | ldconfig | lscpu | setarch | uname) continue ;;
        # Of ssh's programs the one that makes keys is called; its agent is given a group of its own.
        ssh-keygen) ;;
        scp | sftp | ssh | ssh-*) continue ;;
        # dpkg's own architecture is a constant in it.
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
[ "$found" = "$IOT_GUEST_ARCH" ] || { echo "dpkg takes itself for $found, not $IOT_GUEST_ARCH" >&2; exit 1; }
