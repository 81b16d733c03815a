//! Facts judged: pure, so that every finding can be tested without the machine that has it. [`virtualisation`] is about
//! QEMU, firmware, libvirt and KVM, [`build`] about building the agent and `xtask-vm`, [`image`] about what an image is
//! built with, [`room`] about the cache, disk, memory, clock and what dead runs left.

mod build;
pub mod finding;
mod image;
mod room;
mod virtualisation;

use crate::host::facts::Facts;
pub use finding::{CI_PROGRAM, Finding, Remedy, Severity};
pub(super) use room::{MEMORY_BESIDE, MIB};

/// Everything that is to be said of a machine.
pub fn evaluate(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    virtualisation::evaluate(facts, &mut findings);
    build::evaluate(facts, &mut findings);
    image::evaluate(facts, &mut findings);
    room::evaluate(facts, &mut findings);
    findings
}

#[cfg(test)]
pub(crate) mod tests;
