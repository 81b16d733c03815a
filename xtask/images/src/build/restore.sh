# Undoes accelerate.sh in the tree $1 after every package is configured. Fails if anything is left of it.
set -eu
root=$1
own=${IOT_OTHER_LOADER%/*}
while read -r path; do
    # If a maintainer script has changed the mode or the owner, the guest's file should have got this change.
    found=$(stat --format '%a %u %g' "$root/$path")
    [ "$found" = '755 0 0' ] || { echo "$path was given the mode, owner and group $found: leave it out of accelerate.sh" >&2; exit 1; }
    rm "$root/$path"
    [ ! -e "$root/$path.guest" ] || mv "$root/$path.guest" "$root/$path"
done < "$root$own/list"
rm -r "$root$own"

# A diversion has three lines: the path of the file, its new path, and the package that made the diversion. Diversions
# of packages stay.
diversions=$root/var/lib/dpkg/diversions
awk 'NR % 3 == 1 { from = $0 } NR % 3 == 2 { to = $0 } NR % 3 == 0 && to !~ /\.guest$/ { print from "\n" to "\n" $0 }' \
    "$diversions" > "$diversions-new"
mv "$diversions-new" "$diversions"
left=$(find "$root/usr" "$root/etc" -name '*.guest' -print -quit)
[ -z "$left" ] || { echo "accelerate.sh has left $left in the tree" >&2; exit 1; }
