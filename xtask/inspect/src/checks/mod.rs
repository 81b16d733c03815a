//! The checks, in the order in which a loader would fail. Each check has a stable id. It reports the fact in the file,
//! what the target offers, and the remedy.

mod allocator;
pub(super) mod header;
mod identity;
mod instructions;
mod interpreter;
mod judgement;
mod libraries;
mod paths;
mod protections;
mod segments;

use crate::Target;
use crate::elf::Elf;
use crate::finding::Finding;

/// Runs every check on a file with valid headers.
pub(crate) fn all(elf: &Elf<'_>, target: &Target<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    header::entry(elf, &mut findings);
    interpreter::check(elf, target, &mut findings);
    libraries::check(elf, target, &mut findings);
    segments::check(elf, target, &mut findings);
    allocator::check(elf, target, &mut findings);
    instructions::check(elf, target, &mut findings);
    paths::check(elf, &mut findings);
    protections::check(elf, target, &mut findings);
    identity::check(elf, &mut findings);
    findings
}
