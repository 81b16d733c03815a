//! Whether KVM may be tried here, and what an earlier run learned of it.
//!
//! A `/dev/kvm` that opens is no proof: nested and software KVM exist that run a BIOS and never a stock kernel. So
//! a run that has seen KVM fail writes that down for as long as the host stays up.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::arch::VmArchitecture;
use crate::paths::{Cache, make_private_dir, write_private};

/// What speaks for or against KVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// It opens, and nothing is known against it.
    Opens,
    /// An earlier run of this host's boot saw it fail; why.
    Failed(String),
    /// It cannot be used; why.
    No(String),
}

/// Looks, without starting anything.
pub fn look(guest: VmArchitecture, cache: Option<&Cache>) -> Kvm {
    if VmArchitecture::of_host() != Some(guest) {
        return Kvm::No(format!("the host is {} and the guest {guest}", std::env::consts::ARCH));
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Kvm::No(format!("/dev/kvm does not open: {error}"));
    }
    let Some(cache) = cache else { return Kvm::Opens };
    match std::fs::read_to_string(note_path(cache)) {
        Ok(note) => match note.split_once('\n') {
            Some((boot_id, reason)) if boot_id == host_boot_id() => {
                Kvm::Failed(format!("{} (remembered in {})", reason.trim(), note_path(cache).display()))
            }
            _ => Kvm::Opens,
        },
        Err(_no_note) => Kvm::Opens,
    }
}

/// Forgets an earlier failure: KVM has been seen to work.
///
/// # Errors
/// Where the note cannot be deleted.
pub fn forget_failure(cache: &Cache) -> Result<()> {
    match std::fs::remove_file(note_path(cache)) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("delete {}", note_path(cache).display())),
    }
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

fn host_boot_id() -> String {
    // A kernel without the file has no boot to tell apart; the note then holds until it is deleted.
    let text = std::fs::read_to_string(Path::new("/proc/sys/kernel/random/boot_id"));
    text.map(|id| id.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_guest_never_gets_kvm() {
        for guest in VmArchitecture::ALL {
            if Some(guest) != VmArchitecture::of_host() {
                assert!(matches!(look(guest, None), Kvm::No(reason) if reason.contains("the guest")));
            }
        }
    }
}
