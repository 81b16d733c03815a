//! A domain that is read before it runs: started paused, asked over QMP what QEMU made of it, judged. The rehearsal ends it
//! there; the smoke lets its guest go on.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use xtask_core::bail_host;
use xtask_core::fs::write_private;
use xtask_core::preflight::findings::{Finding, Severity};
use xtask_core::readback::ExpectedMachine;
use xtask_core::readback::diff::diff;
use xtask_core::readback::observed::Observed;

use crate::libvirt::Machine;

/// The domain's XML in the run's working directory.
pub(crate) const XML: &str = "domain.xml";
/// What the domain must become: an [`ExpectedMachine`], beside the XML.
pub(crate) const EXPECTED: &str = "expected.json";
/// What was asked of QEMU and what it answered, beside the domain's XML.
pub(crate) const TRANSCRIPT: &str = "qmp.json";

/// What speaks against a domain that was started paused, and stays so. What QEMU answered is kept in `work`.
pub(crate) fn read(machine: &Machine, expected: &ExpectedMachine, work: &Path) -> Result<Vec<Finding>> {
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

/// Reads a domain that is stopped, and lets the guest run where nothing speaks against it.
///
/// # Errors
/// A failure of the host where QEMU made something else of the domain than was asked for: nothing would be proven on it.
pub(crate) fn resume_verified(machine: Machine, expected: &ExpectedMachine, work: &Path) -> Result<Machine> {
    let findings = read(&machine, expected, work)?;
    let blocking = findings.iter().filter(|finding| finding.severity == Severity::Blocks);
    let blocking: Vec<_> =
        blocking.map(|finding| format!("{} ({})", finding.sentence, finding.evidence)).collect();
    if !blocking.is_empty() {
        bail_host!(
            "QEMU's machine does not match the requested domain: {}", blocking.join("; ");
            "run cargo xtask preflight --arch {} --rehearse, which says what to do about each; no guest \
             code has run",
            expected.architecture
        );
    }
    machine.resume()?;
    Ok(machine)
}
