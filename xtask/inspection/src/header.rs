//! The check of an executable's header alone, which every command that uses the agent makes.

use anyhow::{Context, Result};
use inspect::device;
use inspect::finding::Finding;
use xtask_core::arch::VmArchitecture;
use xtask_core::build::Agent;
use xtask_core::error::Failure;

use crate::{isa, target};

/// Checks by the header that the bytes are a 64-bit little-endian executable for `arch`.
///
/// # Errors
/// Returns an error with the header's value and the required value.
pub fn check_header(bytes: &[u8], arch: VmArchitecture) -> Result<()> {
    let device = device::default_of(isa(arch));
    let target = target(arch, &device);
    match inspect::header(bytes, &target) {
        None => Ok(()),
        Some(finding) => Err(diagnosis(&finding).into()),
    }
}

/// Checks by the header that the agent is an executable for its architecture.
///
/// # Errors
/// Returns the errors of [`check_header`] with the agent's path.
pub fn check_agent(agent: &Agent) -> Result<()> {
    check_header(&agent.content, agent.arch)
        .with_context(|| format!("check the agent {}", agent.path.display()))
}

fn diagnosis(finding: &Finding) -> Failure {
    let offers = if finding.offers.is_empty() { String::new() } else { format!("; {}", finding.offers) };
    // The offer of this finding is only the architecture's name, which `found` already contains.
    let offers = if finding.id == "elf-machine" { String::new() } else { offers };
    Failure::guest(format!("{}{offers}", finding.found), finding.remedy.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_executable_is_described_in_one_sentence() {
        let needs = "; the target needs an ELF file with valid headers";
        let table: [(&[u8], String); 4] = [
            (b"", format!("it is no 64-bit ELF file, because it is empty{needs}")),
            (
                b"text",
                format!("it is no 64-bit ELF file, because it does not begin with ELF's magic number{needs}"),
            ),
            (
                b"\x7fELF\x02",
                format!("it is no 64-bit ELF file, because it ends after 5 bytes, within its header{needs}"),
            ),
            (
                b"#!/bin/sh\n",
                "it is a script, not an executable; the target needs an ELF executable".to_owned(),
            ),
        ];
        for (bytes, expected) in table {
            let error = check_header(bytes, VmArchitecture::Aarch64).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }
}
