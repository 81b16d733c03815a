# mmdebstrap's setup hook runs this with the new tree as $1, which has apt's configuration and no package yet. The hook
# is used only if the tree is in memory. mmdebstrap and dpkg do one thing after the other. From here on, jobs in .ahead
# use the other processors:
# - While dpkg installs the essential packages, the other packages are downloaded.
# - While apt downloads packages, store.sh (IOT_STORE) decompresses the ones that apt has verified. Just before dpkg
#   runs, these copies replace the packages. Otherwise one process at a time would decompress packages, the essential
#   ones twice.
# Nothing depends on the download ahead: mmdebstrap's own apt downloads packages that are missing, or reports why it
# cannot.
#
# finish.sh deletes .ahead. mmdebstrap itself deletes apt's configuration.
set -eu
root=$1
ahead=$root/.ahead
mkdir -p "$ahead/archives" "$ahead/essential/stored" "$ahead/others"
printf '%s' "$IOT_STORE" > "$ahead/store.sh"

# apt runs this outside of the tree for the essential packages, then once inside for the others
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

# Links each new package in $1, which has no second link yet, to $2. Prints the ones that are worth a decompressed copy:
# smaller packages are decompressed faster than a copy is made. apt has verified these packages. It keeps unverified
# packages in a directory of its own.
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
# The file is locked while the worker runs, so that no process waits for a worker that was killed.
exec 9> worker
flock 9
(
    until [ -e go ]; do
        # The parent is mmdebstrap, which may end before it gets this far.
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
