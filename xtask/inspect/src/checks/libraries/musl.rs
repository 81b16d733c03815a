//! The rules of musl's loader (ldso/dynlink.c), where they differ from those of glibc's.

use crate::elf::Elf;
use crate::inventory::Inventory;
use crate::{Offers, Target};

/// The directories that the loader searches if no file in /etc names others.
const SEARCH: [&str; 3] = ["/lib", "/usr/local/lib", "/usr/lib"];

/// The libraries of other systems that are parts of the loader itself: `libm.so.6` is none of its own.
const PARTS: [&str; 7] = ["libc.", "libpthread.", "librt.", "libm.", "libdl.", "libutil.", "libxnet."];

/// Returns whether the file asks for musl's loader.
pub(super) fn is_asked_by(elf: &Elf<'_>) -> bool {
    elf.interpreter().is_ok_and(|path| path.is_some_and(|path| memchr::memmem::find(path, b"musl").is_some()))
}

/// Returns whether a process with this file has musl's loader. A library's process has it if the library needs musl, or
/// if the target has no other loader.
pub(super) fn loads(elf: &Elf<'_>, needed: &[String], inventory: &Inventory) -> bool {
    match elf.interpreter() {
        Ok(None) => {
            needed.iter().any(|name| is_c_library(name))
                || (has_loader(inventory, "ld-musl-") && !has_loader(inventory, "ld-linux"))
        }
        _ => is_asked_by(elf),
    }
}

/// Returns whether a name is that of musl's C library: its own, or the one that Alpine Linux gives it.
pub(super) fn is_c_library(name: &str) -> bool {
    name == "libc.so" || name.starts_with("libc.musl-")
}

/// Returns whether the loader itself is the library of this name.
pub(super) fn is_part(name: &str) -> bool {
    PARTS.iter().any(|part| name.starts_with(part))
}

/// Returns whether programs of the target use glibc, and none uses musl.
pub(super) fn is_excluded(target: &Target<'_>) -> bool {
    match target.offers {
        Offers::Inventory(inventory) => {
            has_loader(inventory, "ld-linux") && !has_loader(inventory, "ld-musl-")
        }
        Offers::Release { .. } => true,
        Offers::Nothing => false,
    }
}

fn has_loader(inventory: &Inventory, start: &str) -> bool {
    loader(inventory, start).is_some()
}

/// Returns the rest of the name of a loader.
fn loader<'a>(inventory: &'a Inventory, start: &str) -> Option<&'a str> {
    let mut names = inventory.interpreters.iter().filter_map(|path| path.rsplit('/').next());
    names.find_map(|name| name.strip_prefix(start))
}

/// Returns the directories that the loader searches. `/etc/ld-musl-aarch64.path` replaces the usual ones.
pub(super) fn search(target: &Target<'_>, inventory: &Inventory) -> Vec<String> {
    let arch = loader(inventory, "ld-musl-").and_then(|rest| rest.split('.').next());
    let file = arch.and_then(|arch| target.tree?.read(&format!("/etc/ld-musl-{arch}.path")));
    match file {
        None => SEARCH.map(str::to_owned).to_vec(),
        Some(text) => {
            let text = String::from_utf8_lossy(&text);
            let paths = text.split([':', '\n']).map(str::trim).filter(|path| path.starts_with('/'));
            paths.map(|path| path.trim_end_matches('/').to_owned()).collect()
        }
    }
}
