# Runs by mmdebstrap's setup hook with the new tree as $1, which has apt's configuration and no package yet; only where the tree
# is in memory. mmdebstrap and dpkg do one thing after the other; from here on, in .ahead, the other processors have work too:
# - what is not essential is downloaded while dpkg installs what is;
# - store.sh (IOT_STORE) takes the compression off packages that apt has verified, while it downloads more of them, and they
#   replace the others just before dpkg runs: else one process at a time decompresses, the essential packages twice.
# Nothing relies on the first: what is missing then is downloaded by mmdebstrap's own apt, which says why it cannot.
#
# finish.sh takes .ahead away; apt's configuration is mmdebstrap's own to delete.
set -eu
root=$1
ahead=$root/.ahead
mkdir -p "$ahead/archives" "$ahead/essential/stored" "$ahead/others"
printf '%s' "$IOT_STORE" > "$ahead/store.sh"

# apt runs this outside of the tree for the essential packages, then once inside for the others (DPkg::Chroot-Directory).
# Packages below this size are decompressed sooner than their copy is made.
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

# The packages in $1 that no second link shows to be known are linked to $2, and those that are worth it printed. apt has verified
# them; what it has not is in a directory of its own.
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
# Locked as long as somebody works: nobody waits for a worker that was killed.
exec 9> worker
flock 9
(
    until [ -e go ]; do
        # mmdebstrap, which may end without having come that far.
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
