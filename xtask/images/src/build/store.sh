# Writes each package (deb(5): an ar(5) archive of three members) to the directory $1, with uncompressed members.
set -eu
directory=$1
shift
entry='%-16s%-12s%-6s%-6s%-8s%-10s`\n'
for deb; do
    new=$directory/${deb##*/}
    # No other process uses this directory, since two processes may write the same package.
    parts=$(mktemp -d "$directory/parts.XXXXXX")
    dpkg-deb --ctrl-tarfile "$deb" > "$parts/control"
    dpkg-deb --fsys-tarfile "$deb" > "$parts/data"
    {
        printf "!<arch>\n$entry" debian-binary 0 0 0 100644 4
        printf "2.0\n$entry" control.tar 0 0 0 100644 "$(stat --format %s "$parts/control")"
        cat "$parts/control"
        printf "$entry" data.tar 0 0 0 100644 "$(stat --format %s "$parts/data")"
        cat "$parts/data"
    } > "$parts/whole"
    mv "$parts/whole" "$new"
    rm -r "$parts"
done
