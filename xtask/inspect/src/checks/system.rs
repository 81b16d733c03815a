//! `elf-osabi`, `isa-level`: notes about the system and the processor for which the file was linked.

use object::LittleEndian as LE;
use object::elf::{GNU_PROPERTY_X86_ISA_1_NEEDED, NoteType};

use crate::Target;
use crate::device;
use crate::elf::{Elf, shown};
use crate::finding::Finding;
use crate::isa::Isa;

/// The names of notes in which the other systems mark their executables (type 1).
const SYSTEMS: [&[u8]; 4] = [b"FreeBSD", b"NetBSD", b"OpenBSD", b"DragonFly"];

pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>, findings: &mut Vec<Finding>) {
    let mut names = elf.notes().filter(|note| note.n_type(LE) == NoteType(1)).map(|note| note.name());
    if let Some(name) = names.find(|name| SYSTEMS.contains(name)) {
        let found = format!("it is built for {}: a note says so", shown(name));
        findings.push(Finding::refused(
            "elf-osabi",
            &found,
            "the target runs Linux",
            "take the build for Linux",
        ));
    }
    findings.extend(level(elf, target));
}

/// Returns a finding if the file requires a level of x86-64 that the core lacks. glibc's loader refuses the file then
/// ("CPU ISA level is lower than required", sysdeps/x86/dl-prop.h).
fn level(elf: &Elf<'_>, target: &Target<'_>) -> Option<Finding> {
    if target.device.isa != Isa::X86_64 {
        return None;
    }
    let properties = elf.notes().filter_map(|note| note.gnu_properties(LE)).flatten().flatten();
    let mut needed = properties.filter(|property| property.pr_type() == GNU_PROPERTY_X86_ISA_1_NEEDED);
    let bits = needed.find_map(|property| property.data_u32(LE).ok())?;
    // Bit 0 is the baseline, which every processor has, and the bits 1 to 3 are the levels 2 to 4.
    let level = (1..=3).rev().find(|bit| bits >> bit & 1 == 1).map(|bit| format!("x86-64-v{}", bit + 1))?;
    let needs = device::find(Isa::X86_64, &level)?.features;
    (!(needs & !target.device.features).is_empty()).then(|| {
        let found = format!("it is marked as needing {level} (GNU_PROPERTY_X86_ISA_1_NEEDED)");
        let offers = format!("{} has a lower level, and the loader refuses it", target.device.about);
        Finding::refused(
            "isa-level",
            &found,
            &offers,
            "link it without -z x86-64-v2 and its like, and compile it for the device",
        )
    })
}
