//! The checks, in the order in which a loader would fail. Each check has a stable id. It reports the fact in the file,
//! what the target offers, and the remedy.

mod allocator;
mod assumptions;
pub(super) mod header;
mod identity;
mod instructions;
mod interpreter;
mod judgement;
mod libraries;
mod name_service;
mod packed;
mod paths;
mod protections;
mod segments;
mod system;

use crate::Target;
use crate::elf::Elf;
use crate::finding::Report;

/// Runs every check on a file with valid headers.
pub(crate) fn all(elf: &Elf<'_>, target: &Target<'_>) -> Report {
    let (mut findings, mut loaded) = (Vec::new(), Vec::new());
    header::entry(elf, &mut findings);
    system::check(elf, target, &mut findings);
    let packed = packed::check(elf, target);
    let is_packed = packed.is_some();
    findings.extend(packed);
    segments::check(elf, target, &mut findings);
    // Of a packed file, only the part that unpacks it can be read. The rest is compressed data, and no code.
    if !is_packed {
        interpreter::check(elf, target, &mut findings);
        loaded = libraries::check(elf, target, &mut findings);
        findings.extend(name_service::check(elf, target));
        allocator::check(elf, target, &mut findings);
        assumptions::check(elf, target, &mut findings);
        instructions::check(elf, target, &mut findings);
    }
    paths::check(elf, &mut findings);
    protections::check(elf, target, &mut findings);
    identity::check(elf, &mut findings);
    Report { libraries: loaded, ..Report::new(findings) }
}
