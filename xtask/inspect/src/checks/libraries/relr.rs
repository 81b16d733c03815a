//! `relr`: checks that the target's loader processes packed relative relocations.
//!
//! glibc knows `DT_RELR` since 2.36. From then on, it refuses a file that has `DT_RELR`, needs `libc.so.…` and does not
//! need the version `GLIBC_ABI_DT_RELR` (elf/dl-version.c). An older loader ignores `DT_RELR`, and the program then uses
//! addresses that were not relocated. A file with that version is refused by the older loader, as `symbol-version` says.

use object::elf::DT_RELR;

use super::numbers;
use crate::Target;
use crate::elf::Elf;
use crate::finding::Finding;
use crate::inventory::Library;

const VERSION: &str = "GLIBC_ABI_DT_RELR";

/// Returns whether the loader of this C library processes `DT_RELR`.
pub(super) fn is_known_to(libc: &Library) -> bool {
    libc.versions.iter().any(|version| version == VERSION)
}

/// Returns whether the loader of this release of glibc processes `DT_RELR`.
pub(super) fn is_known_since(glibc: &str) -> bool {
    numbers(glibc) >= vec![2, 36]
}

/// `is_known` is `None` if the target has no glibc.
pub(super) fn check(
    elf: &Elf<'_>,
    needed: &[String],
    target: &Target<'_>,
    is_known: Option<bool>,
) -> Option<Finding> {
    elf.dynamic.value(DT_RELR)?;
    let says_so = elf.dynamic.required().any(|required| required.version == VERSION.as_bytes());
    let needs_libc = needed.iter().any(|name| name.starts_with("libc.so."));
    let offers = match is_known? {
        true if needs_libc && !says_so => {
            format!("the loader of {} stops: DT_RELR without {VERSION} dependency", target.place)
        }
        false if !says_so => {
            format!("the loader of {} is older than glibc 2.36 and does not relocate them", target.place)
        }
        _ => return None,
    };
    let found = format!("it has packed relative relocations (DT_RELR) without the version {VERSION}");
    let remedy = "link with -Wl,-z,pack-relative-relocs instead of --pack-dyn-relocs=relr (binutils 2.38, lld 15, mold 1.11), or without either";
    Some(Finding::refused("relr", &found, &offers, remedy))
}
