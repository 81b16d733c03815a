# mmdebstrap's setup hook runs this with the new tree as $1, which has apt's configuration and no package yet. The hook
# is used only if the tree is in memory. mmdebstrap and dpkg do one thing after the other. This script starts jobs in
# .ahead, which use the other processors at the same time:
# - While dpkg installs the essential packages, the jobs download the other packages.
# - While apt downloads packages, the jobs run store.sh (IOT_STORE), which decompresses the packages that apt has
#   verified. Just before dpkg runs, the decompressed packages replace the others. Otherwise dpkg would decompress one
#   package at a time, and the essential packages twice.
# If a download ahead fails, mmdebstrap's own apt downloads the missing packages, or reports why it cannot.
#
# finish.sh deletes .ahead. mmdebstrap itself deletes apt's configuration.
set -eu
root=$1
ahead=$root/.ahead
mkdir -p "$ahead/archives" "$ahead/essential/stored" "$ahead/others"
printf '%s' "$IOT_STORE" > "$ahead/store.sh"

# apt runs take.sh before dpkg: outside of the tree for the essential packages, and then once inside for the others
# (DPkg::Chroot-Directory).
cat > "$ahead/take.sh" <<'END'
set -eu
cat > /dev/null
if [ "$PWD" = /.ahead ]; then
    while [ -e go ] && [ ! -e ended ] && ! flock -n worker true; do sleep 0.02; done
    stored=others
else
    : > go
    until [ -e essential/ended ] || flock -n worker true; do sleep 0.02; done
    stored=essential/stored
fi
find "$stored" -name '*.deb' -exec mv -t ../var/cache/apt/archives {} +
END
printf 'DPkg::Pre-Install-Pkgs { "cd %s 2> /dev/null || cd /.ahead; exec sh take.sh"; };\n' "$ahead" >> "$MMDEBSTRAP_APT_CONFIG"

# Links each new package in $1 to $2. A package with a second link is not new. Prints the packages that are worth a
# decompressed copy: decompressing a smaller package takes less time than making a copy. apt has verified these
# packages: it keeps unverified packages in a directory of its own.
fresh() {
    find "$1" -maxdepth 1 -name '*.deb' -links 1 -exec ln -t "$2" {} + -size +100k -print0
}
store() {
    xargs -0 -r -P "$(nproc)" -n "$1" sh store.sh "$2" || echo "W: not every package could be stored" >> download.log
}
download() {
    export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" TMPDIR="$root/tmp"
    IFS=,
    apt-get --yes --download-only -oDebug::NoLocking=1 -oDir::Cache::archives="$ahead/archives" install $MMDEBSTRAP_INCLUDE \
        '?and(?priority(required),?not(?essential))'
}
cd "$ahead"
# The worker holds a lock on this file. If the worker is killed, the lock is free, and no process waits any more.
exec 9> worker
flock 9
(
    until [ -e go ]; do
        # The parent is mmdebstrap. It may end before dpkg runs.
        kill -0 "$PPID" 2> /dev/null || exit 0
        sleep 0.05
        [ ! -d ../var/cache/apt/archives ] || fresh ../var/cache/apt/archives essential
    done | store 1 essential/stored
    [ -e go ] || exit 0
    fresh ../var/cache/apt/archives essential > last
    ln -t archives essential/*.deb
    { download || echo "W: the packages could not be downloaded ahead" >> download.log; : > fetched; } >> download.log 2>&1 &
    store 1 essential/stored < last
    : > essential/ended
    {
        while [ ! -e fetched ]; do
            sleep 0.05
            fresh archives ../var/cache/apt/archives
        done
        fresh archives ../var/cache/apt/archives
        : > linked
    } | store 4 others
    : > ended
) < /dev/null > /dev/null 2>&1 &
