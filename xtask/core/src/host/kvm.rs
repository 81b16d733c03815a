//! The check whether KVM may be tried on this host, and the record of an earlier failure.
//!
//! A `/dev/kvm` that opens proves little: a nested or emulated KVM may run a BIOS but no stock kernel. Hardware
//! virtualisation can be detected without a guest: `/proc/cpuinfo` has the flag `vmx` or `svm`, and the kernel has
//! loaded a module for it. A run in which KVM fails records this for its architecture, CPU and image. The record is
//! valid until the host boots again, but no longer than a day.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::arch::VmArchitecture;
use crate::cache::Cache;
use crate::fs::{entries, make_private_dir, remove_file, write_private};
use crate::limits;
use crate::processes::boot_id;

/// The device of KVM.
const DEVICE: &str = "/dev/kvm";

/// The state of KVM. Each reason is a text for the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// `/dev/kvm` opens, and the processor has hardware virtualisation.
    Opens,
    /// `/dev/kvm` opens, and the processor has hardware virtualisation, but this host is itself a virtual machine.
    Nested,
    /// `/dev/kvm` opens, but the processor has no hardware virtualisation. Such a KVM may run a BIOS but no stock
    /// kernel.
    Software(String),
    /// KVM failed in an earlier run since this host's boot; the reason follows.
    Failed(String),
    /// The guest's architecture is not the host's.
    Foreign(String),
    /// `/dev/kvm` does not exist or cannot be opened; the reason follows.
    Absent(String),
    /// This user may not open `/dev/kvm`.
    Denied {
        why: String,
        /// The group whose members may open `/dev/kvm`; `None` if there is no such group except root's.
        group: Option<String>,
    },
}

impl Kvm {
    /// Returns the reason why KVM is not chosen automatically; `None` if it may be tried.
    pub fn against(&self) -> Option<&str> {
        match self {
            Self::Opens | Self::Nested => None,
            Self::Software(why)
            | Self::Failed(why)
            | Self::Foreign(why)
            | Self::Absent(why)
            | Self::Denied { why, .. } => Some(why),
        }
    }

    /// Returns whether KVM can be tried if the user requests it explicitly.
    pub fn opens(&self) -> bool {
        matches!(self, Self::Opens | Self::Nested | Self::Software(_) | Self::Failed(_))
    }
}

/// The signs of hardware virtualisation in the processor and the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Processor {
    /// Neither `vmx` nor `svm` is in /proc/cpuinfo. This is never set on Arm, for which the kernel shows no such flag.
    lacks_flag: bool,
    /// `hypervisor` is in /proc/cpuinfo: this host is a virtual machine.
    guest: bool,
    /// The names of `/sys/module/kvm_*`.
    modules: Vec<String>,
}

/// A machine for which KVM was or may be tried. KVM can work for one such machine and fail for another.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    pub arch: VmArchitecture,
    /// The value of `--cpu`; `None` for the default.
    pub cpu: Option<&'a str>,
    /// The name of the image.
    pub image: &'a str,
}

/// Returns the state of KVM for a machine without starting a guest.
pub fn look(candidate: Candidate<'_>, cache: Option<&Cache>) -> Kvm {
    let (host, guest) = (VmArchitecture::of_host(), candidate.arch);
    if host != Some(guest) {
        return Kvm::Foreign(format!("the host is {}, the guest {guest}", std::env::consts::ARCH));
    }
    let opened = OpenOptions::new().read(true).write(true).open(DEVICE).map(drop);
    let failed = cache.and_then(|cache| remembered_failure(cache, candidate));
    evaluate(opened.map_err(|error| (error.kind(), error.to_string())), &processor(guest), failed)
}

fn evaluate(opened: Result<(), (ErrorKind, String)>, processor: &Processor, failed: Option<String>) -> Kvm {
    if let Err((kind, error)) = opened {
        let why = format!("/dev/kvm does not open: {error}");
        let denied = kind == ErrorKind::PermissionDenied;
        return if denied {
            Kvm::Denied { why, group: group_of(Path::new(DEVICE)) }
        } else {
            Kvm::Absent(why)
        };
    }
    if let Some(reason) = failed {
        return Kvm::Failed(reason);
    }
    if processor.lacks_flag {
        let modules = match processor.modules.as_slice() {
            [] => "no KVM module".to_owned(),
            modules => format!("the module {}", modules.join(" and ")),
        };
        return Kvm::Software(format!(
            "/dev/kvm opens, but the processor has neither vmx nor svm ({modules} in /sys/module): KVM without \
             hardware support does not run a stock kernel"
        ));
    }
    if processor.guest { Kvm::Nested } else { Kvm::Opens }
}

/// Returns the group whose members may read and write the file. Root's group does not count, because no user should
/// become a member of it.
fn group_of(file: &Path) -> Option<String> {
    let metadata = file.metadata().ok()?;
    let may_open = metadata.mode() & 0o060 == 0o060 && metadata.gid() != 0;
    let id = may_open.then(|| metadata.gid().to_string())?;
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let named = groups.lines().find_map(|line| {
        let (name, rest) = line.split_once(':')?;
        (rest.split(':').nth(1) == Some(&id)).then(|| name.to_owned())
    });
    // usermod(8) accepts the number of a group that has no name here.
    Some(named.unwrap_or(id))
}

fn processor(arch: VmArchitecture) -> Processor {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |wanted: &str| flags.split_whitespace().any(|flag| flag == wanted);
    let names =
        entries(Path::new("/sys/module")).filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
    let mut modules: Vec<_> = names.filter(|name| name.starts_with("kvm_")).collect();
    modules.sort();
    let wanted = arch.profile().virtualisation_flags;
    Processor {
        lacks_flag: !wanted.is_empty() && !wanted.iter().any(|flag| has(flag)),
        guest: has("hypervisor"),
        modules,
    }
}

fn remembered_failure(cache: &Cache, candidate: Candidate<'_>) -> Option<String> {
    let path = note_path(cache, candidate);
    let note = std::fs::read_to_string(&path).ok()?;
    let is_recent = path.metadata().ok()?.modified().ok()?.elapsed().is_ok_and(|age| age < limits::KVM_AGAIN);
    let (_, reason) = note.split_once('\n').filter(|(boot_id, _)| *boot_id == host_boot_id() && is_recent)?;
    Some(format!("{} (recorded in {})", reason.trim(), path.display()))
}

/// Deletes the record of an earlier failure, because KVM has worked.
///
/// # Errors
/// Returns an error if the record cannot be deleted.
pub fn forget_failure(cache: &Cache, candidate: Candidate<'_>) -> Result<()> {
    remove_file(&note_path(cache, candidate))
}

/// Records that KVM was tried for a machine and did not run the guest's kernel. The record is valid until this host
/// boots again, but no longer than [`limits::KVM_AGAIN`].
///
/// # Errors
/// Returns an error if the cache cannot be written.
pub fn remember_failure(cache: &Cache, candidate: Candidate<'_>, reason: &str) -> Result<()> {
    make_private_dir(&cache.history())?;
    write_private(&note_path(cache, candidate), format!("{}\n{reason}\n", host_boot_id()))
}

fn note_path(cache: &Cache, candidate: Candidate<'_>) -> PathBuf {
    let Candidate { arch, cpu, image } = candidate;
    let name = format!("kvm-unusable-{arch}-{}-{image}", cpu.unwrap_or("default"));
    // The name of a user's own image is its path.
    cache.history().join(name.replace('/', "_"))
}

/// Returns the id of this boot. If the kernel does not provide it, the id is empty, and a reboot does not end the
/// validity of the record.
fn host_boot_id() -> String {
    boot_id().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_guest_never_gets_kvm() {
        for arch in VmArchitecture::ALL {
            if Some(arch) != VmArchitecture::of_host() {
                let found = look(Candidate { arch, cpu: None, image: "debian-12" }, None);
                assert!(matches!(found, Kvm::Foreign(reason) if reason.contains("the guest")));
            }
        }
    }

    #[test]
    fn a_failure_is_that_of_one_machine_and_expires() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let pi5 = Candidate { arch: VmArchitecture::Aarch64, cpu: Some("pi5"), image: "/images/a" };
        remember_failure(&cache, pi5, "not supported for this CPU").unwrap();
        assert!(
            remembered_failure(&cache, pi5).unwrap().starts_with("not supported for this CPU (recorded in")
        );
        for other in [
            Candidate { cpu: None, ..pi5 },
            Candidate { image: "/images/b", ..pi5 },
            Candidate { arch: VmArchitecture::X86_64, ..pi5 },
        ] {
            assert_eq!(remembered_failure(&cache, other), None, "{other:?}");
        }
        let note = fs_err::File::options().write(true).open(note_path(&cache, pi5)).unwrap();
        note.file().set_modified(std::time::SystemTime::now() - limits::KVM_AGAIN).unwrap();
        assert_eq!(remembered_failure(&cache, pi5), None, "it is a day old");
        remember_failure(&cache, pi5, "again").unwrap();
        forget_failure(&cache, pi5).unwrap();
        assert_eq!(remembered_failure(&cache, pi5), None);
    }

    #[test]
    fn only_a_group_that_may_open_the_device_is_advised() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mode = |mode| {
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(file.path(), permissions).unwrap();
            group_of(file.path())
        };
        let own = rustix::process::getegid();
        assert_eq!(mode(0o600), None);
        assert_eq!(mode(0o660).is_some(), !own.is_root(), "root's group is not advised");
        if rustix::process::geteuid().is_root() {
            let disk = std::fs::read_to_string("/etc/group").unwrap();
            let disk = disk.lines().find_map(|line| line.strip_prefix("disk:x:")).unwrap();
            let gid = disk.trim_end_matches(':').parse().unwrap();
            std::os::unix::fs::chown(file.path(), None, Some(gid)).unwrap();
            assert_eq!((mode(0o660).as_deref(), mode(0o640)), (Some("disk"), None));
            std::os::unix::fs::chown(file.path(), None, Some(4_000_000)).unwrap();
            assert_eq!(mode(0o660).as_deref(), Some("4000000"));
        }
    }

    #[test]
    fn a_kvm_that_lies_is_known_by_its_processor() {
        let processor = |lacks_flag, guest, modules: &[&str]| Processor {
            lacks_flag,
            guest,
            modules: modules.iter().map(ToString::to_string).collect(),
        };
        let hardware = processor(false, false, &["kvm_intel"]);
        let nested = processor(false, true, &["kvm_intel"]);
        let software = processor(true, true, &["kvm_pvm"]);
        let arm = processor(false, false, &[]);
        assert_eq!(evaluate(Ok(()), &hardware, None), Kvm::Opens);
        assert_eq!(evaluate(Ok(()), &nested, None), Kvm::Nested);
        assert_eq!(evaluate(Ok(()), &arm, None), Kvm::Opens);
        let lies = evaluate(Ok(()), &software, None);
        assert!(
            matches!(&lies, Kvm::Software(why) if why.contains("kvm_pvm") && why.contains("neither vmx nor svm"))
        );
        assert!(lies.opens() && lies.against().is_some(), "an explicit request may try it");
        assert_eq!(evaluate(Ok(()), &hardware, Some("x".into())), Kvm::Failed("x".into()));
        let denied = evaluate(Err((ErrorKind::PermissionDenied, "no".into())), &hardware, None);
        assert!(matches!(denied, Kvm::Denied { .. }) && !denied.opens());
        let absent = evaluate(Err((ErrorKind::NotFound, "none".into())), &hardware, None);
        assert!(matches!(absent, Kvm::Absent(_)) && absent.against().is_some());
    }
}
