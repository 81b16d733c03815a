//! Reads the machine of a paused domain over QMP and compares it with the requested one. After that, the rehearsal
//! destroys the domain, and the smoke lets the guest run.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use xtask_core::bail_host;
use xtask_core::fs::write_private;
use xtask_core::preflight::findings::{Finding, Severity};
use xtask_core::readback::ExpectedMachine;
use xtask_core::readback::diff::diff;
use xtask_core::readback::live;
use xtask_core::readback::observed::Observed;

use crate::libvirt::{Condition, Machine};

/// The file with the domain's XML, in the run's working directory.
pub(crate) const XML: &str = "domain.xml";
/// The file with the [`ExpectedMachine`], beside the XML.
pub(crate) const EXPECTED: &str = "expected.json";
/// The file with libvirt's description of the running domain, if QEMU could not be asked.
pub(crate) const LIVE_XML: &str = "live.xml";
/// The file with the commands to QEMU and its answers, beside the XML.
pub(crate) const TRANSCRIPT: &str = "qmp.json";

/// Compares a paused domain with the expected machine and returns the differences. The domain stays paused. QEMU's
/// answers are written to `work`.
pub(crate) fn read(machine: &Machine, expected: &ExpectedMachine, work: &Path) -> Result<Vec<Finding>> {
    if !machine.answers_qmp() {
        return read_from_libvirt(machine, expected, work);
    }
    let mut transcript = Vec::new();
    let mut ask = |command: &str, arguments: &Value| {
        let answer = machine.qmp(command, arguments);
        let told = |error: &anyhow::Error| json!({ "error": error.root_cause().to_string() });
        let described = answer.as_ref().map_or_else(told, Value::clone);
        transcript.push(json!({ "execute": command, "arguments": arguments, "return": described }));
        answer
    };
    let seen = Observed::read(expected, &mut ask).context("read QEMU's machine back over QMP");
    write_private(&work.join(TRANSCRIPT), format!("{:#}\n", Value::from(transcript)))?;
    Ok(diff(expected, &seen?))
}

/// Compares a paused domain with the expected machine by libvirt's description of it. A daemon may refuse to pass
/// commands on to QEMU.
fn read_from_libvirt(machine: &Machine, expected: &ExpectedMachine, work: &Path) -> Result<Vec<Finding>> {
    let xml = machine.live_xml()?;
    write_private(&work.join(LIVE_XML), &xml)?;
    if machine.condition() != Condition::Paused {
        bail_host!(
            "the guest runs, although it was started paused";
            "run again; if it happens again, compare with another version of libvirt"
        );
    }
    live::diff(expected, &xml).map_err(anyhow::Error::msg).context("read the domain back from libvirt")
}

/// Compares a paused domain with the expected machine, and lets the guest run if no difference blocks.
///
/// # Errors
/// Returns a failure of the host if QEMU's machine does not match the requested domain: a run on it would prove
/// nothing.
pub(crate) fn resume_verified(machine: Machine, expected: &ExpectedMachine, work: &Path) -> Result<Machine> {
    let machine = verified(machine, expected, work)?;
    machine.resume()?;
    Ok(machine)
}

/// Compares a paused domain with the expected machine like [`resume_verified`], and leaves the domain paused.
///
/// # Errors
/// Returns the errors of [`resume_verified`].
pub(crate) fn verified(machine: Machine, expected: &ExpectedMachine, work: &Path) -> Result<Machine> {
    let findings = read(&machine, expected, work)?;
    let blocking = findings.iter().filter(|finding| finding.severity == Severity::Blocks);
    let blocking: Vec<_> =
        blocking.map(|finding| format!("{} ({})", finding.sentence, finding.evidence)).collect();
    if !blocking.is_empty() {
        bail_host!(
            "QEMU's machine does not match the requested domain: {}", blocking.join("; ");
            "run cargo xtask preflight --arch {} --rehearse, which lists each difference with its remedy; no guest \
             code has run",
            expected.architecture
        );
    }
    Ok(machine)
}
