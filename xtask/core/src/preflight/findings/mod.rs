//! The evaluation of facts. It is pure, so each finding can be tested on any machine. [`virtualisation`] is about QEMU,
//! firmware, libvirt and KVM, [`build`] about building the agent and `xtask-vm`, [`image`] about the programs of a run
//! and of an image build, and [`room`] about the cache, disk, memory, clock and dead runs.

mod build;
pub mod finding;
mod image;
mod room;
mod virtualisation;

use crate::host::facts::Facts;
pub use finding::{CI_PROGRAM, Finding, Remedy, Severity};
pub(super) use room::{MEMORY_BESIDE, MIB};

/// Returns all findings of a machine.
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
