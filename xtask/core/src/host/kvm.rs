//! Whether KVM may be tried here, by evidence, and what an earlier run learned of it.
//!
//! A `/dev/kvm` that opens is no proof: nested and software KVM exist that run a BIOS and never a stock kernel. What tells
//! them apart without starting anything is the processor: hardware virtualisation shows as `vmx` or `svm` among its flags,
//! and as one of the kernel's modules for it. A run that has seen KVM fail writes that down for as long as the host stays up.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::arch::VmArchitecture;
use crate::cache::Cache;
use crate::fs::{entries, make_private_dir, remove_file, write_private};
use crate::processes::boot_id;

/// What speaks for or against KVM. Each reason is in words, for the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// It opens, and the processor's own virtualisation stands behind it.
    Opens,
    /// The same, and this host is itself a virtual machine.
    Nested,
    /// It opens, and nothing in the processor stands behind it: it may run a BIOS, and no stock kernel.
    Software(String),
    /// An earlier run of this host's boot saw it fail; why.
    Failed(String),
    /// The guest's architecture is not the host's.
    Foreign(String),
    /// There is no `/dev/kvm`; why.
    Absent(String),
    /// There is one that this user may not open; why.
    Denied(String),
}

impl Kvm {
    /// Why an automatic choice does not take it; `None` where it may be tried.
    pub fn against(&self) -> Option<&str> {
        match self {
            Self::Opens | Self::Nested => None,
            Self::Software(why)
            | Self::Failed(why)
            | Self::Foreign(why)
            | Self::Absent(why)
            | Self::Denied(why) => Some(why),
        }
    }

    /// Whether it can be tried at all, by whoever asks for it by name.
    pub fn opens(&self) -> bool {
        matches!(self, Self::Opens | Self::Nested | Self::Software(_) | Self::Failed(_))
    }
}

/// What the processor and the kernel say of hardware virtualisation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Processor {
    /// Neither `vmx` nor `svm` is in /proc/cpuinfo; never on Arm, which has no such flag that the kernel shows.
    lacks_flag: bool,
    /// `hypervisor` in /proc/cpuinfo: this is a virtual machine.
    guest: bool,
    /// `/sys/module/kvm_*`.
    modules: Vec<String>,
}

/// Looks, without starting anything.
pub fn look(guest: VmArchitecture, cache: Option<&Cache>) -> Kvm {
    let host = VmArchitecture::of_host();
    if host != Some(guest) {
        return Kvm::Foreign(format!("the host is {}, the guest {guest}", std::env::consts::ARCH));
    }
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm").map(drop);
    let failed = cache.and_then(remembered_failure);
    evaluate(opened.map_err(|error| (error.kind(), error.to_string())), &processor(guest), failed)
}

fn evaluate(opened: Result<(), (ErrorKind, String)>, processor: &Processor, failed: Option<String>) -> Kvm {
    if let Err((kind, error)) = opened {
        let why = format!("/dev/kvm does not open: {error}");
        return if kind == ErrorKind::PermissionDenied { Kvm::Denied(why) } else { Kvm::Absent(why) };
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

fn remembered_failure(cache: &Cache) -> Option<String> {
    let path = note_path(cache);
    let note = std::fs::read_to_string(&path).ok()?;
    let (_, reason) = note.split_once('\n').filter(|(boot_id, _)| *boot_id == host_boot_id())?;
    Some(format!("{} (remembered in {})", reason.trim(), path.display()))
}

/// Forgets an earlier failure: KVM has been seen to work.
///
/// # Errors
/// Where the note cannot be deleted.
pub fn forget_failure(cache: &Cache) -> Result<()> {
    remove_file(&note_path(cache))
}

/// Writes down that KVM was tried and did not run a kernel, until this host boots again.
///
/// # Errors
/// Where the cache cannot be written.
pub fn remember_failure(cache: &Cache, reason: &str) -> Result<()> {
    make_private_dir(&cache.history())?;
    write_private(&note_path(cache), format!("{}\n{reason}\n", host_boot_id()))
}

fn note_path(cache: &Cache) -> PathBuf {
    cache.history().join("kvm-unusable")
}

/// A kernel without the file has no boot to tell apart; the note then holds until it is deleted.
fn host_boot_id() -> String {
    boot_id().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_guest_never_gets_kvm() {
        for guest in VmArchitecture::ALL {
            if Some(guest) != VmArchitecture::of_host() {
                assert!(matches!(look(guest, None), Kvm::Foreign(reason) if reason.contains("the guest")));
            }
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
        assert!(lies.opens() && lies.against().is_some(), "who asks for it by name may try it");
        assert_eq!(evaluate(Ok(()), &hardware, Some("x".into())), Kvm::Failed("x".into()));
        let denied = evaluate(Err((ErrorKind::PermissionDenied, "no".into())), &hardware, None);
        assert!(matches!(denied, Kvm::Denied(_)) && !denied.opens());
        let absent = evaluate(Err((ErrorKind::NotFound, "none".into())), &hardware, None);
        assert!(matches!(absent, Kvm::Absent(_)) && absent.against().is_some());
    }
}
