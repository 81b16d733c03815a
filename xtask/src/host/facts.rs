//! What this machine has: gathered side by side, judged elsewhere.

use std::path::{Path, PathBuf};
use std::thread;

use xshell::Shell;

use super::firmware::{self, Firmware};
use super::kvm::{self, Kvm};
use super::packages::{Need, PackageManager};
use super::tools;
use crate::agent_build::{linker::Linker, rust_target_installed};
use crate::arch::VmArchitecture;
use crate::paths::Cache;
use crate::workspace::Workspace;

/// Programs that every run needs, with what brings them.
pub const PROGRAMS: &[(&str, Need)] = &[
    ("qemu-img", Need::QemuImg),
    ("ssh", Need::Ssh),
    ("ssh-keygen", Need::Ssh),
    ("nats-server", Need::NatsServer),
    ("mkfs.vfat", Need::Dosfstools),
    ("mcopy", Need::Mtools),
    ("mmdebstrap", Need::Mmdebstrap),
    ("mke2fs", Need::E2fsprogs),
    ("debugfs", Need::E2fsprogs),
    ("sfdisk", Need::Sfdisk),
    ("gpgv", Need::Gpgv),
];

/// Programs that the test suite needs beside those: a libvirt daemon of its own.
pub const CI_PROGRAMS: &[(&str, Need)] = &[("libvirtd", Need::LibvirtDaemon)];

/// Programs that build an image in a user namespace, for those who are not root.
const USER_NAMESPACE_PROGRAMS: &[(&str, Need)] = &[("newuidmap", Need::Uidmap), ("newgidmap", Need::Uidmap)];

/// Where Debian keeps the keys of its archive.
pub const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One machine, seen from one guest architecture. `Err` holds the reason in words.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The guest's architecture.
    pub arch: VmArchitecture,
    /// os-release's `PRETTY_NAME`.
    pub os: String,
    /// `uname -r`.
    pub kernel: String,
    /// Processors.
    pub cpus: usize,
    /// Whether this process is root.
    pub root: bool,
    /// `sudo` or `doas`, for those who are not.
    pub escalation: Option<PathBuf>,
    /// What installs packages.
    pub package_manager: Option<PackageManager>,
    /// Programs of [`PROGRAMS`] that are not there.
    pub missing_programs: Vec<(&'static str, Need)>,
    /// The full-system emulator and what it says of itself.
    pub emulator: Option<(PathBuf, Result<String, String>)>,
    /// The firmware pair.
    pub firmware: Result<Firmware, String>,
    /// `nats-server`'s version.
    pub nats_server: Option<String>,
    /// Whether there is a pkg-config.
    pub pkg_config: bool,
    /// libvirt's version, by the probe that the build makes.
    pub libvirt: Result<String, String>,
    /// libvirt's QEMU driver, which the embedded connection loads.
    pub libvirt_driver: Option<PathBuf>,
    /// The account that a libvirt of this distribution insists on when it runs as root, where it is missing.
    pub missing_libvirt_user: Option<&'static str>,
    /// Whether rustc has a standard library for the target.
    pub rust_target: Result<bool, String>,
    /// The linker for the target.
    pub linker: Result<Linker, String>,
    /// Whether KVM may be tried.
    pub kvm: Kvm,
    /// The cache.
    pub cache: Result<PathBuf, String>,
    /// Free bytes where the cache is.
    pub free_disk: Option<u64>,
    /// `MemAvailable`, bytes.
    pub free_memory: Option<u64>,
    /// Whether the kernel runs the guest's programs on this host, as building an image needs.
    pub runs_guest_programs: bool,
    /// Whether QEMU's emulator of the guest's programs is there, registered or not.
    pub user_emulator: bool,
    /// What registers it: Debian 12's and Ubuntu's `update-binfmts`, else systemd's own program, which needs no systemd.
    pub registers_handlers: Option<PathBuf>,
    /// Why an ordinary user cannot build an image in a user namespace here.
    pub no_user_namespace: Option<String>,
    /// Whether `binfmt_misc` is mounted.
    pub binfmt_mounted: bool,
    /// Whether Debian's archive keyring is there.
    pub debian_keyring: bool,
}

impl Facts {
    /// Gathers everything for guests of `arch`.
    pub fn gather(workspace: &Workspace, arch: VmArchitecture) -> Self {
        let profile = arch.profile();
        let cache = Cache::from_env();
        thread::scope(|scope| {
            let emulator = scope.spawn(|| {
                tools::find(profile.emulator).map(|path| {
                    let version = version(&path, "--version");
                    (path, version)
                })
            });
            let nats = scope.spawn(|| version(&tools::find("nats-server")?, "--version").ok());
            let libvirt = scope.spawn(libvirt_version);
            let rust_target = scope.spawn(|| {
                let shell = Shell::new().map_err(|error| error.to_string())?;
                rust_target_installed(&shell, profile.triple).map_err(|error| format!("{error:#}"))
            });
            let linker = scope.spawn(|| {
                let shell = Shell::new().map_err(|error| error.to_string())?;
                let linker = Linker::resolve(profile.triple, workspace.root());
                let checked = linker.and_then(|linker| linker.check(&shell, profile).map(|()| linker));
                checked.map_err(|error| format!("{error:#}"))
            });
            let firmware = firmware::discover(arch, Path::new("/")).map_err(|error| error.to_string());
            let uname = rustix::system::uname();
            Self {
                arch,
                os: os_name(),
                kernel: uname.release().to_string_lossy().into_owned(),
                cpus: thread::available_parallelism().map_or(1, usize::from),
                root: rustix::process::geteuid().is_root(),
                escalation: tools::find("sudo").or_else(|| tools::find("doas")),
                package_manager: PackageManager::find(),
                missing_programs: missing_programs(),
                firmware,
                pkg_config: tools::find("pkg-config").is_some(),
                libvirt_driver: libvirt_driver(),
                missing_libvirt_user: missing_libvirt_user(),
                kvm: kvm::look(arch, cache.as_ref().ok()),
                free_disk: cache.as_ref().ok().and_then(|cache| free_disk(cache.root())),
                cache: cache.map(|cache| cache.root().to_owned()).map_err(|error| error.to_string()),
                free_memory: available_memory(),
                runs_guest_programs: runs_guest_programs(arch),
                user_emulator: ["-static", ""]
                    .iter()
                    .any(|ending| tools::find(&format!("qemu-{}{ending}", profile.machine)).is_some()),
                registers_handlers: registers_handlers(arch),
                no_user_namespace: no_user_namespace(),
                binfmt_mounted: Path::new("/proc/sys/fs/binfmt_misc/register").exists(),
                debian_keyring: Path::new(DEBIAN_KEYRING).exists(),
                emulator: emulator.join().expect("a probe does not panic"),
                nats_server: nats.join().expect("a probe does not panic"),
                libvirt: libvirt.join().expect("a probe does not panic"),
                rust_target: rust_target.join().expect("a probe does not panic"),
                linker: linker.join().expect("a probe does not panic"),
            }
        })
    }
}

fn version(program: &Path, flag: &str) -> Result<String, String> {
    let said = tools::read(program, &[flag]).map_err(|error| format!("{error:#}"))?;
    tools::version_in(&said).ok_or_else(|| format!("{} names no version: {said:?}", program.display()))
}

/// As virt-sys' build script asks: `libvirt` and, for QEMU's monitor, `libvirt-qemu`.
fn libvirt_version() -> Result<String, String> {
    let pkg_config = tools::find("pkg-config").ok_or("there is no pkg-config to ask")?;
    let ask = |library| tools::read(&pkg_config, &["--modversion", library]);
    ask("libvirt-qemu")
        .and_then(|_| ask("libvirt"))
        .map(|version| version.trim().to_owned())
        .map_err(|error| format!("{error:#}"))
}

/// libvirt looks in its own library directory, whose place is the distribution's choice.
fn libvirt_driver() -> Option<PathBuf> {
    let triplets = ["x86_64-linux-gnu", "aarch64-linux-gnu"].map(|triplet| format!("/usr/lib/{triplet}"));
    ["/usr/lib64", "/usr/lib"]
        .map(str::to_owned)
        .into_iter()
        .chain(triplets)
        .map(|lib| Path::new(&lib).join("libvirt/connection-driver/libvirt_driver_qemu.so"))
        .find(|path| path.exists())
}

/// A libvirt that runs as root looks up the account it was built with before it reads its configuration (9.0 and
/// later), even where that says `user = "+0"`. On Debian and Ubuntu the account comes with the daemon, which nothing
/// here needs; elsewhere with the driver.
fn missing_libvirt_user() -> Option<&'static str> {
    const DEBIANS: &str = "libvirt-qemu";
    let concerned =
        rustix::process::geteuid().is_root() && PackageManager::find() == Some(PackageManager::Apt);
    let known = |database| tools::read(Path::new("/usr/bin/getent"), &[database, DEBIANS]).is_ok();
    (concerned && !(known("passwd") && known("group"))).then_some(DEBIANS)
}

/// Those that are not there.
pub fn missing(programs: &[(&'static str, Need)]) -> Vec<(&'static str, Need)> {
    programs.iter().copied().filter(|(name, _)| tools::find(name).is_none()).collect()
}

fn missing_programs() -> Vec<(&'static str, Need)> {
    let namespaces = if rustix::process::geteuid().is_root() { &[][..] } else { USER_NAMESPACE_PROGRAMS };
    [PROGRAMS, namespaces].into_iter().flat_map(missing).collect()
}

fn os_name() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.map_or_else(|| "unknown".to_owned(), |name| name.trim_matches('"').to_owned())
}

/// Of the file system that will hold the cache: of its nearest directory that exists.
fn free_disk(cache: &Path) -> Option<u64> {
    let existing = cache.ancestors().find(|path| path.exists())?;
    let stat = rustix::fs::statvfs(existing).ok()?;
    Some(stat.f_bavail * stat.f_frsize)
}

/// Bytes that a new process may have without swapping (proc(5), `MemAvailable`).
pub fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    kib.trim().trim_end_matches(" kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Debian 13's emulator is known to systemd's program alone.
fn registers_handlers(arch: VmArchitecture) -> Option<PathBuf> {
    let known = Path::new("/usr/share/binfmts").join(format!("qemu-{}", arch.profile().machine)).exists();
    let systemds = PathBuf::from("/usr/lib/systemd/systemd-binfmt");
    tools::find("update-binfmts").filter(|_| known).or_else(|| systemds.exists().then_some(systemds))
}

/// Tried, not looked up: subordinate ids, sysctls and AppArmor (Ubuntu 24.04) each may forbid it.
fn no_user_namespace() -> Option<String> {
    if rustix::process::geteuid().is_root() {
        return None;
    }
    let unshare = tools::find("unshare")?;
    let tried = tools::read(&unshare, &["--map-root-user", "--map-auto", "true"]);
    tried.err().map(|error| format!("{error:#}"))
}

fn runs_guest_programs(arch: VmArchitecture) -> bool {
    if VmArchitecture::of_host() == Some(arch) {
        return true;
    }
    let handler = format!("/proc/sys/fs/binfmt_misc/qemu-{}", arch.profile().machine);
    std::fs::read_to_string(handler).is_ok_and(|text| text.starts_with("enabled"))
}
