# Makes a fresh Debian in memory and becomes its first process, which ends when its stdin ends. Everything here is in
# its own namespaces and ends with this process. The script prints one line about the table of executable formats:
# `fresh` if the Debian has a table of its own, or `used` if it has this host's. $1 is the suite, $2 an empty
# directory, $3 the workspace, $4 Rust (rustc's sysroot), $5 cargo's registry, and $6 the target whose standard library
# a fresh Rust lacks.
set -eu
suite=$1 memory=$2 workspace=$3 rust=$4 registry=$5 target=$6
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

mount -t tmpfs -o size=10g,mode=755 tmpfs "$memory"
# From Linux 6.7 on, a user namespace has its own table of executable formats, which is empty as after a boot. With an
# older kernel, the Debian sees this host's table. It is mounted read-only, because it must not be changed.
formats=/proc/sys/fs/binfmt_misc kernel=fresh
mkdir "$memory/formats"
if ! mount -t binfmt_misc binfmt_misc "$memory/formats"; then
    kernel=used
    mount --bind "$formats" "$memory/formats"
    mount -o remount,bind,ro "$memory/formats"
fi
mount -t proc proc /proc
mkdir "$memory/tmp" "$memory/root"
root=$memory/root

# Use this host's mirror and proxies for the new suite. Pass them in files, since their addresses may contain
# passwords.
apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' 'Origin: Debian' |
while read -r uri release; do
    case $release in
    *-security) echo "deb $uri $suite-security main" ;;
    *-*) ;;
    *) printf '%s\n' "deb $uri $suite main" "deb $uri $suite-updates main" ;;
    esac
done | sort -u > "$memory/sources"
apt-config dump --no-empty Acquire | grep -E '^Acquire::https?::Proxy ' > "$memory/proxies" || [ "$?" -eq 1 ]
set -- "$suite" "$root"
[ ! -s "$memory/sources" ] || set -- "$@" "$memory/sources"
[ ! -s "$memory/proxies" ] || set -- "--aptopt=$memory/proxies" "$@"

# Rust needs a linker and the C library's headers, so `gcc` and `libc6-dev` count as part of Rust.
TMPDIR=$memory/tmp mmdebstrap --mode=root --variant=minbase --include=gcc,libc6-dev,ca-certificates \
    --keyring="$keyring" "$@" < /dev/null > "$memory/log" 2>&1 || { tail -n 20 "$memory/log" >&2; exit 1; }

# Mount the file systems that a container has.
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
[ "$kernel" = fresh ] || mount --move "$memory/formats" "$root$formats"
mount --rbind /sys "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in null zero full random urandom tty; do
    : > "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
cp --remove-destination --dereference /etc/resolv.conf /etc/hosts "$root/etc/"

# Add Rust, read-only and without the target's standard library. Add the crates too, because there is no network later.
mkdir "$root/rust" "$root/rust-std" "$root/registry" "$root/cargo" "$root/target" "$root/project"
mount --bind -o ro "$rust" "$root/rust"
mount --bind -o ro "$rust/lib/rustlib/$target" "$root/rust-std"
mount -t tmpfs -o mode=1777 tmpfs "$root/rust/lib/rustlib/$target"
mount --bind -o ro "$registry" "$root/registry"
ln -s /registry "$root/cargo/registry"
cat > "$root/usr/local/bin/rustup" <<EOF
#!/bin/sh
# Replaces rustup: installs the standard library that was hidden, instead of downloading it.
[ "\$*" = "target add $target" ] && cp -r /rust-std/. "/rust/lib/rustlib/$target/"
EOF
chmod 755 "$root/usr/local/bin/rustup"

# Copy the workspace, including uncommitted changes.
tar --create --directory "$workspace" --exclude ./target --exclude ./.git . | tar --extract --no-same-owner --directory "$root/project"

# Add an ordinary user. The subordinate ids are among the ids of this namespace.
chroot "$root" /usr/sbin/useradd --create-home --shell /bin/sh ordinary
echo ordinary:10000:50000 | tee "$root/etc/subuid" > "$root/etc/subgid"

mkdir "$root/host"
cd "$root"
pivot_root . host
umount --lazy /host
rmdir /host
echo $kernel
exec cat
