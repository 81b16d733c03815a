//! `segment-alignment`, `writable-code`: checks that the kernel can map the file with the target's page size.

use crate::Target;
use crate::elf::{Elf, Load};
use crate::finding::Finding;

pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>, findings: &mut Vec<Finding>) {
    let loads: Vec<Load> = elf.loads().filter(|load| load.memory_size > 0).collect();
    for load in &loads {
        if load.align > 1 && !load.align.is_power_of_two() {
            let found = format!("a segment is aligned to {}, which is no power of two", load.align);
            findings.push(Finding::refused("segment-alignment", &found, "powers of two", "link it again"));
            return;
        }
    }
    if loads.iter().any(|load| load.writable() && load.executable()) {
        let offers = "hardened kernels and services (MemoryDenyWriteExecute=) refuse it";
        let (found, remedy) =
            ("a segment is writable and executable", "link without -N and without --omagic");
        findings.push(Finding::warned("writable-code", found, offers, remedy));
    }
    let smallest = loads.iter().map(|load| load.align).min().unwrap_or(0);
    let mut fits = Vec::new();
    for page in &target.pages {
        match fault(&loads, page.bytes, elf.is_library()) {
            None => fits.push(page.bytes.to_string()),
            Some(why) => {
                let found = format!("segments aligned to {smallest}: {why}");
                let offers = format!("{} with pages of {} bytes", page.whose, page.bytes);
                let remedy = "link with -Wl,-z,max-page-size=65536 (the default of GNU ld for aarch64; gold, mold and old lld \
                              take 4096). An old patchelf also causes this: patchelf --page-size 65536";
                findings.push(Finding::refused_if(
                    page.certain,
                    "segment-alignment",
                    &found,
                    &offers,
                    remedy,
                ));
            }
        }
    }
    if !fits.is_empty() {
        let found = format!("aligned to {smallest}; pages of {} bytes are possible", fits.join(", "));
        findings.push(Finding::informs("segment-alignment", found));
    }
}

/// Returns the reason why the segments cannot be mapped with pages of this size, if there is one. Linux maps whole
/// pages (fs/binfmt_elf.c), so the address and the file offset of a segment must have the same place in a page. If two
/// segments share a page, the access rights of the later one apply to both.
fn fault(loads: &[Load], page: u64, library: bool) -> Option<String> {
    // This rule is in glibc's elf/dl-load.c, because the loader maps a library, and not the kernel.
    if library && loads.iter().any(|load| load.align % page != 0) {
        return Some(
            "the dynamic loader refuses a library whose alignment is smaller than a page (\"ELF load command address/offset \
             not page-aligned\")"
                .to_owned(),
        );
    }
    let crooked = loads.iter().find(|load| load.offset % page != load.address % page && load.file_size > 0);
    if let Some(Load { address, .. }) = crooked {
        return Some(format!("the one at {address:#x} has another offset in its page than in the file"));
    }
    let shared = loads.windows(2).find(|pair| {
        let end = pair[0].address.saturating_add(pair[0].memory_size);
        end > pair[1].address & !(page - 1)
            && (pair[0].flags != pair[1].flags || !contiguous(&pair[0], &pair[1]))
    });
    shared.map(|pair| {
        format!(
            "those at {:#x} and {:#x} share a page, but have different access rights or content",
            pair[0].address, pair[1].address
        )
    })
}

/// Returns whether two segments have the same distance in memory as in the file. The pages of the second segment then
/// also contain the right bytes of the first one.
fn contiguous(one: &Load, other: &Load) -> bool {
    other.address.wrapping_sub(one.address) == other.offset.wrapping_sub(one.offset)
}
