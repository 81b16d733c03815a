# Makes a fresh Debian in memory and becomes its first process, which ends when its stdin does: everything here is in
# namespaces of its own and ends with it. Its one line says whose table of executable formats it has: `fresh` or `used`.
# $1 the suite, $2 an empty directory, $3 the workspace, $4 Rust (rustc's sysroot), $5 cargo's registry, $6 the target whose
# standard library a fresh Rust lacks.
set -eu
suite=$1 memory=$2 workspace=$3 rust=$4 registry=$5 target=$6
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

mount -t tmpfs -o size=10g,mode=755 tmpfs "$memory"
# From Linux 6.7 on a user namespace has a table of executable formats for itself, empty as a fresh kernel's. An older kernel
# shows this host's, which is only to be read.
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

# This host's own mirror and proxies, for the new suite; in files, since their addresses may hold passwords.
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

# Rust itself asks for a linker and the C library's headers: `gcc` and `libc6-dev` come with "Rust copied in".
TMPDIR=$memory/tmp mmdebstrap --mode=root --variant=minbase --include=gcc,libc6-dev,ca-certificates \
    --keyring="$keyring" "$@" < /dev/null > "$memory/log" 2>&1 || { tail -n 20 "$memory/log" >&2; exit 1; }

# What a container has.
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

# Rust, read-only and without the target's standard library, and the crates that a network would bring.
mkdir "$root/rust" "$root/rust-std" "$root/registry" "$root/cargo" "$root/target" "$root/project"
mount --bind -o ro "$rust" "$root/rust"
mount --bind -o ro "$rust/lib/rustlib/$target" "$root/rust-std"
mount -t tmpfs -o mode=1777 tmpfs "$root/rust/lib/rustlib/$target"
mount --bind -o ro "$registry" "$root/registry"
ln -s /registry "$root/cargo/registry"
cat > "$root/usr/local/bin/rustup" <<EOF
#!/bin/sh
# Stands in for rustup, which would download what was hidden.
[ "\$*" = "target add $target" ] && cp -r /rust-std/. "/rust/lib/rustlib/$target/"
EOF
chmod 755 "$root/usr/local/bin/rustup"

# The workspace as it is, committed or not.
tar --create --directory "$workspace" --exclude ./target --exclude ./.git . | tar --extract --no-same-owner --directory "$root/project"

# An ordinary user, with subordinate ids out of those that exist here.
chroot "$root" /usr/sbin/useradd --create-home --shell /bin/sh ordinary
echo ordinary:10000:50000 | tee "$root/etc/subuid" > "$root/etc/subgid"

mkdir "$root/host"
cd "$root"
pivot_root . host
umount --lazy /host
rmdir /host
echo $kernel
exec cat
