//! Gathers the facts about this machine that do not depend on the guest: distribution, user, programs, libvirt, disk,
//! memory and clock.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Access, Mode, OFlags, access};
use rustix::io::Errno;

use super::memory::{self, Memory};
use super::mounts;
use super::network::{LoopbackServices, may_supervise};
use super::packages::{Need, PackageManager};
use super::pkg_config::PkgConfig;
use super::tools;
use crate::arch::VmArchitecture;
use crate::cache::{Cache, Unusable};
use crate::os_release::OsRelease;
use crate::runs;

/// The purpose for which a program is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Every run needs the program.
    Always,
    /// The build of an image from packages needs the program.
    Building,
    /// The build of an image by a user other than root needs the program, because such a build uses a user namespace.
    BuildingAsUser,
    /// `torture` and the test suite need the program.
    Torturing,
    /// The test suite needs the program.
    Testing,
}

/// The runs for which this machine is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A run that needs no more programs than every run.
    Run,
    /// A run of `torture`.
    Torture,
    TestSuite,
}

impl Purpose {
    /// Returns whether these runs need a program besides those of every run and of an image build.
    pub fn needs(self, when: When) -> bool {
        match when {
            When::Torturing => self != Self::Run,
            When::Testing => self == Self::TestSuite,
            When::Always | When::Building | When::BuildingAsUser => false,
        }
    }
}

/// The programs that `cargo xtask` starts. Each has its row in the table of packages and the purpose for which it is
/// needed.
pub const PROGRAMS: &[(&str, Need, When)] = &[
    ("qemu-img", Need::QemuImg, When::Always),
    ("ssh", Need::Ssh, When::Always),
    ("ssh-keygen", Need::Ssh, When::Always),
    ("nats-server", Need::NatsServer, When::Always),
    ("mkfs.vfat", Need::Dosfstools, When::Always),
    ("mcopy", Need::Mtools, When::Always),
    ("mmdebstrap", Need::Mmdebstrap, When::Building),
    ("mke2fs", Need::E2fsprogs, When::Building),
    ("debugfs", Need::E2fsprogs, When::Building),
    ("sfdisk", Need::Sfdisk, When::Building),
    ("mount", Need::Mount, When::Building),
    ("gpgv", Need::Gpgv, When::Building),
    ("newuidmap", Need::Uidmap, When::BuildingAsUser),
    ("newgidmap", Need::Uidmap, When::BuildingAsUser),
    ("libvirtd", Need::LibvirtDaemon, When::Testing),
    ("virsh", Need::LibvirtClient, When::Testing),
    ("dnsmasq", Need::Dnsmasq, When::Testing),
    ("iptables", Need::Iptables, When::Testing),
    ("ip", Need::Iproute, When::Testing),
    ("sshd", Need::Sshd, When::Testing),
    ("podman", Need::Podman, When::Testing),
    ("runc", Need::Podman, When::Testing),
    ("docker-registry", Need::Registry, When::Torturing),
    ("aarch64-linux-gnu-g++", Need::CrossCxx, When::Testing),
    ("musl-gcc", Need::Musl, When::Testing),
    ("readelf", Need::Binutils, When::Testing),
    ("e2fsck", Need::E2fsprogs, When::Torturing),
];

/// The possible paths of the program with which libvirt writes a machine's memory to a file. Debian, Ubuntu and Arch
/// use the first path, Fedora and openSUSE the second one, and older versions of openSUSE the third one.
pub const LIBVIRT_IOHELPERS: [&str; 3] = [
    "/usr/lib/libvirt/libvirt_iohelper",
    "/usr/libexec/libvirt_iohelper",
    "/usr/lib64/libvirt/libvirt_iohelper",
];

/// The path at which Debian installs the keyring of its archive.
pub const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The exit code of getent(1) if the database does not contain the key.
const GETENT_MISSING: i32 = 2;

/// The facts about this machine. An `Err` contains the reason in words.
#[derive(Debug, Clone)]
pub struct LocalHost {
    /// The distribution, from os-release(5).
    pub os: OsRelease,
    /// The kernel's release, as `uname -r` prints it.
    pub kernel: String,
    /// The kernel's active security modules, separated by commas; `None` if securityfs is not mounted.
    pub security_modules: Option<String>,
    /// True if a process can decide about each connection of a guest.
    pub supervises: bool,
    pub loopback_services: LoopbackServices,
    pub cpus: usize,
    pub root: bool,
    /// The path of `sudo` or `doas`, for users other than root. An `Err` says why this user cannot become root.
    pub escalation: Result<PathBuf, &'static str>,
    /// True if rustup is installed. The Rust of a distribution comes without rustup.
    pub rustup: bool,
    /// The file that shows that this is a container; `None` if it is not a container.
    pub container: Option<String>,
    /// True if systemd runs here (sd_booted(3)).
    pub systemd: bool,
    pub package_manager: Option<PackageManager>,
    /// The programs of [`PROGRAMS`] that are missing.
    pub missing_programs: Vec<(&'static str, Need, When)>,
    /// The version of `nats-server`; `None` if the program is missing.
    pub nats_server: Option<Result<String, String>>,
    pub pkg_config: PkgConfig,
    /// The version of libvirt, by the same query that the build of `xtask-vm` makes.
    pub libvirt: Result<String, String>,
    /// True if libvirt's headers are in the system's include directory, even if pkg-config does not find them.
    pub libvirt_header: bool,
    /// The path of libvirt's QEMU driver, which libvirt loads for the embedded connection.
    pub libvirt_driver: Option<PathBuf>,
    /// True if one of [`LIBVIRT_IOHELPERS`] is installed.
    pub libvirt_iohelper: bool,
    /// The missing account without which libvirt does not run as root; `None` if the account exists or is not needed.
    /// An `Err` says why the account cannot be looked up.
    pub missing_libvirt_user: Result<Option<&'static str>, String>,
    pub cache: Result<PathBuf, Unusable>,
    /// `Ok` if this user, as which QEMU runs too, may read, write and enter the cache.
    pub cache_access: Result<(), String>,
    /// The free space in bytes on the file system of the cache.
    pub free_disk: Option<u64>,
    /// `Ok` if files in the cache can be opened with O_DIRECT, as QEMU opens the disks of a guest.
    pub direct_io: Result<(), String>,
    pub free_memory: Option<Memory>,
    /// The reason why this user cannot mount a file system as an image build does; `None` if this user can.
    pub no_mounts: Option<String>,
    /// True if `binfmt_misc` is mounted.
    pub binfmt_mounted: bool,
    /// True if Debian's archive keyring is installed.
    pub debian_keyring: bool,
    /// The time of this machine's clock, in seconds since 1970.
    pub now: u64,
    /// The time at which this program was built, in seconds since 1970. A correct clock shows a later time.
    pub built: u64,
    /// The ids of the dead runs that were not collected yet.
    pub dead_runs: Vec<String>,
}

impl LocalHost {
    pub fn gather() -> Self {
        let cache = Cache::from_env();
        let known = cache.as_ref().ok().cloned();
        let known = known.as_ref();
        let uname = rustix::system::uname();
        let is_missing = |(name, ..): &&(&str, Need, When)| tools::find(name).is_none();
        thread::scope(|scope| {
            let nats = scope.spawn(|| tools::find("nats-server").map(|path| version(&path, "--version")));
            let pkg_config = PkgConfig::find();
            let asked = pkg_config.clone();
            let libvirt = scope.spawn(move || asked.libvirt_version());
            let user = scope.spawn(missing_libvirt_user);
            Self {
                os: OsRelease::parse(&std::fs::read_to_string("/etc/os-release").unwrap_or_default()),
                loopback_services: LoopbackServices::read(),
                supervises: may_supervise(),
                security_modules: std::fs::read_to_string("/sys/kernel/security/lsm").ok(),
                kernel: uname.release().to_string_lossy().into_owned(),
                cpus: thread::available_parallelism().map_or(1, usize::from),
                root: rustix::process::geteuid().is_root(),
                escalation: tools::find("sudo")
                    .or_else(|| tools::find("doas"))
                    .ok_or("neither sudo nor doas is installed"),
                rustup: tools::find("rustup").is_some(),
                container: container(),
                systemd: Path::new("/run/systemd/system").is_dir(),
                package_manager: PackageManager::find(),
                missing_programs: PROGRAMS.iter().filter(is_missing).copied().collect(),
                pkg_config,
                libvirt_header: Path::new("/usr/include/libvirt/libvirt.h").exists(),
                libvirt_driver: libvirt_driver(),
                libvirt_iohelper: LIBVIRT_IOHELPERS.iter().any(|path| tools::is_executable(Path::new(path))),
                cache_access: known.map_or(Ok(()), |cache| {
                    let inside = [
                        cache.runs(),
                        cache.images(),
                        cache.history(),
                        cache.workloads(),
                        cache.kernels(),
                        cache.libvirt(),
                    ];
                    may_use(cache.root()).and_then(|()| inside.iter().try_for_each(|path| may_use(path)))
                }),
                free_disk: known.and_then(|cache| free_disk(cache.root())),
                direct_io: known.map_or(Ok(()), |cache| direct_io(cache.root())),
                free_memory: memory::available(),
                no_mounts: mounts::refusal(),
                binfmt_mounted: Path::new("/proc/sys/fs/binfmt_misc/register").exists(),
                debian_keyring: Path::new(DEBIAN_KEYRING).exists(),
                now: seconds(SystemTime::now()),
                built: built(),
                dead_runs: known.map(runs::dead).unwrap_or_default(),
                nats_server: nats.join().expect("a probe does not panic"),
                libvirt: libvirt.join().expect("a probe does not panic"),
                missing_libvirt_user: user.join().expect("a probe does not panic"),
                cache: cache.map(|cache| cache.root().to_owned()),
            }
        })
    }

    /// Describes the user and the system: `root in a container without systemd`.
    pub fn describe(&self) -> String {
        let who = if self.root { "root" } else { "an ordinary user" };
        let container = if self.container.is_some() { " in a container" } else { "" };
        let systemd = if self.systemd { "" } else { " without systemd" };
        format!("{who}{container}{systemd}")
    }
}

fn version(program: &Path, flag: &str) -> Result<String, String> {
    let output = tools::read(program, &[flag]).map_err(|error| format!("{error:#}"))?;
    tools::version_in(&output).ok_or_else(|| format!("{} printed no version: {output:?}", program.display()))
}

/// Returns the path of libvirt's QEMU driver. Its directory depends on the distribution.
fn libvirt_driver() -> Option<PathBuf> {
    let triplets = VmArchitecture::ALL.map(|arch| format!("/usr/lib/{}", arch.profile().multiarch));
    ["/usr/lib64", "/usr/lib"]
        .map(str::to_owned)
        .into_iter()
        .chain(triplets)
        .map(|lib| Path::new(&lib).join("libvirt/connection-driver/libvirt_driver_qemu.so"))
        .find(|path| path.exists())
}

/// Returns the account that libvirt needs, or `None` if the account exists or is not needed. If libvirt 9.0 or later
/// runs as root, it looks up an account before it reads its configuration, even if the configuration says
/// `user = "+0"`. On Debian and Ubuntu, the package of libvirt's daemon creates this account, and `cargo xtask` does
/// not need the daemon. On other distributions, the package of the driver creates it.
fn missing_libvirt_user() -> Result<Option<&'static str>, String> {
    const DEBIANS: &str = "libvirt-qemu";
    if !rustix::process::geteuid().is_root() || !Path::new("/etc/debian_version").exists() {
        return Ok(None);
    }
    let missing = |database| {
        let answer = tools::exit_code(Path::new("/usr/bin/getent"), &[database, DEBIANS]);
        match answer.map_err(|error| format!("{error:#}"))? {
            Some(0) => Ok(false),
            Some(GETENT_MISSING) => Ok(true),
            Some(code) => Err(format!("/usr/bin/getent {database} {DEBIANS}: exit code {code}")),
            None => Err(format!("/usr/bin/getent {database} {DEBIANS}: ended by a signal")),
        }
    };
    Ok((missing("passwd")? || missing("group")?).then_some(DEBIANS))
}

/// Returns the file that shows that this is a container: the file of podman, of docker, or of
/// systemd.io/CONTAINER_INTERFACE.
fn container() -> Option<String> {
    let files = ["/run/.containerenv", "/.dockerenv", "/run/systemd/container"];
    files.into_iter().find(|path| Path::new(path).exists()).map(str::to_owned)
}

/// Checks that this user may read, write and enter the cache. If the cache does not exist yet, checks its nearest
/// existing parent directory.
fn may_use(cache: &Path) -> Result<(), String> {
    let everything = Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK;
    for path in cache.ancestors() {
        match access(path, Access::EXISTS) {
            Ok(()) => {
                return access(path, everything).map_err(|error| format!("{}: {error}", path.display()));
            }
            Err(Errno::NOENT) => {}
            Err(error) => return Err(format!("{}: {error}", path.display())),
        }
    }
    Ok(())
}

/// Returns the cache's directory, or its nearest existing parent directory if the cache does not exist yet.
fn existing(cache: &Path) -> Option<&Path> {
    cache.ancestors().find(|path| path.exists())
}

/// Returns the free bytes on the file system of the cache; `None` if the file system does not know its size.
fn free_disk(cache: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(existing(cache)?).ok()?;
    (stat.f_blocks > 0).then_some(stat.f_bavail * stat.f_frsize)
}

/// Checks that a file in the cache can be opened with O_DIRECT (open(2), EINVAL), as QEMU opens the guest's disks. A
/// file system without O_DIRECT creates the file nevertheless, so the file is deleted in both cases. Other errors have
/// findings of their own.
fn direct_io(cache: &Path) -> Result<(), String> {
    let Some(directory) = existing(cache) else { return Ok(()) };
    let path = directory.join(format!(".iot-xtask-direct-{}", std::process::id()));
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let opened = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR);
    let deleted = std::fs::remove_file(&path);
    match (opened, deleted) {
        (Ok(_), Err(error)) => Err(format!("delete {}: {error}", path.display())),
        (Err(Errno::INVAL), _) => {
            Err(format!("open a file in {} with O_DIRECT: {}", directory.display(), Errno::INVAL))
        }
        _ => Ok(()),
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Returns the time at which this program was built, in seconds since 1970; 0 if the time is unknown.
fn built() -> u64 {
    let own = std::env::current_exe().and_then(|path| path.metadata()?.modified());
    own.map_or(0, seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_below_a_file_is_no_cache() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(may_use(&directory.path().join("a/b")), Ok(()));
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(may_use(&file.join("cache")).unwrap_err().contains("Not a directory"));
    }
}
