# Writes each package (deb(5): an ar(5) archive of three members) again in the directory $1, its parts not compressed.
set -eu
directory=$1
shift
entry='%-16s%-12s%-6s%-6s%-8s%-10s`\n'
for deb; do
    new=$directory/${deb##*/}
    dpkg-deb --ctrl-tarfile "$deb" > "$new.control"
    dpkg-deb --fsys-tarfile "$deb" > "$new.data"
    {
        printf "!<arch>\n$entry" debian-binary 0 0 0 100644 4
        printf "2.0\n$entry" control.tar 0 0 0 100644 "$(stat --format %s "$new.control")"
        cat "$new.control"
        printf "$entry" data.tar 0 0 0 100644 "$(stat --format %s "$new.data")"
        cat "$new.data"
    } > "$new.new"
    rm "$new.control" "$new.data"
    mv "$new.new" "$new"
done
