# Undoes ahead.sh and later.sh in the tree $1 after every package is configured. Fails if a job has failed.
set -eu
root=$1
later=$root/.later
find "$later/jobs" -type f -exec flock {} true \;
failed=$(find "$later/jobs" -type f -empty -printf '%f ')
[ -z "$failed" ] || { cat "$later/log" >&2; echo "these background jobs of packages' scripts failed: $failed" >&2; exit 1; }
while read -r tool; do
    mv "$root/$tool.later" "$root/$tool"
done < "$later/list"

# A diversion has three lines: the path of the file, its new path, and the package that made the diversion.
diversions=$root/var/lib/dpkg/diversions
awk 'NR % 3 == 1 { from = $0 } NR % 3 == 2 { to = $0 } NR % 3 == 0 && to !~ /\.later$/ { print from "\n" to "\n" $0 }' \
    "$diversions" > "$diversions-new"
mv "$diversions-new" "$diversions"
rm -r "$later"
if [ -e "$root/.ahead" ]; then
    grep '^[EW]: ' "$root/.ahead/download.log" >&2 || [ $? = 1 ]
    rm -r "$root/.ahead"
fi
