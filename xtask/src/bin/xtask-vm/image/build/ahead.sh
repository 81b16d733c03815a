# Runs by mmdebstrap's setup hook with the new tree as $1, which has apt's configuration and no package yet; only where the tree
# is in memory. mmdebstrap and dpkg do one thing after the other; from here on, in .ahead, the other processors have work too:
# - what is not essential is downloaded while dpkg installs what is;
# - store.sh (IOT_STORE) takes the compression off packages that apt has verified, and they replace the others just before
#   dpkg runs: else one process at a time decompresses, the essential packages twice.
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
    while [ -e go ] && [ ! -e ended ]; do sleep 0.02; done
    stored=others
else
    ln -t archives ../var/cache/apt/archives/*.deb
    ln -t essential archives/*.deb
    : > go
    stored=essential/stored
    find essential -maxdepth 1 -name '*.deb' -size +100k -print0 | xargs -0 -r -P "$(nproc)" -n 4 sh store.sh "$stored"
fi
find "$stored" -name '*.deb' -exec mv -t ../var/cache/apt/archives {} +
END
printf 'DPkg::Pre-Install-Pkgs { "cd %s 2> /dev/null || cd /.ahead; exec sh take.sh"; };\n' "$ahead" >> "$MMDEBSTRAP_APT_CONFIG"

# What a second link shows to be known (the essential packages, and what was linked before) is passed by.
fresh() {
    find archives -name '*.deb' -links 1 -exec ln -t ../var/cache/apt/archives {} + -size +100k -print0
}
download() {
    export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" TMPDIR="$root/tmp"
    IFS=,
    apt-get --yes --download-only -oDebug::NoLocking=1 -oDir::Cache::archives="$ahead/archives" install $MMDEBSTRAP_INCLUDE \
        '?and(?priority(required),?not(?essential))'
}
cd "$ahead"
(
    until [ -e go ]; do
        # mmdebstrap, which may end without having come that far.
        kill -0 "$PPID" 2> /dev/null || exit 0
        sleep 0.02
    done
    { download || echo "W: the packages could not be downloaded ahead"; : > fetched; } > download.log 2>&1 &
    {
        while [ ! -e fetched ]; do
            sleep 0.05
            fresh
        done
        fresh
        : > linked
    } | xargs -0 -r -P "$(nproc)" -n 4 sh store.sh others || echo "W: not every package could be stored" >> download.log
    : > ended
) < /dev/null > /dev/null 2>&1 &
