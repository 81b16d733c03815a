//! Turns facts into findings, without side effects, so that each finding can be tested on any machine.
//! [`virtualisation`] is about QEMU, firmware, libvirt, KVM and nats-server. [`build`] is about the build of the agent
//! and of `xtask-vm`. [`image`] is about the programs that a run or an image build needs. [`network`] is about the
//! services that the guest can reach. [`room`] is about the cache, disk, memory, clock and dead runs.

mod build;
pub mod finding;
mod image;
mod network;
mod room;
mod virtualisation;

use crate::error::shortage;
use crate::host::facts::Facts;
pub use finding::{CI_PROGRAM, Finding, Remedy, Severity, TORTURE_PROGRAM};
pub(crate) use room::{MEMORY_BESIDE, MIB};

/// Returns all findings about a machine.
pub fn evaluate(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    virtualisation::evaluate(facts, &mut findings);
    build::evaluate(facts, &mut findings);
    image::evaluate(facts, &mut findings);
    findings.extend(network::evaluate(facts));
    room::evaluate(facts, &mut findings);
    // A check that failed because this host lacks memory or open files does not show that a package is missing.
    for finding in &mut findings {
        if let Some(remedy) = shortage(&anyhow::Error::msg(finding.evidence.clone())) {
            finding.remedy = Some(remedy.into());
        }
    }
    findings
}

#[cfg(test)]
pub(crate) mod tests;
