//! What this machine has and lacks: [`facts`] (gathered, IO) → [`findings`] (judged, pure) → remedies
//! ([`packages`], [`fix`]). [`readback`] judges a domain that `xtask-vm` has started.

pub mod connection;
pub mod edk2;
pub mod facts;
pub mod findings;
pub mod firmware;
pub mod fix;
pub mod kvm;
pub mod local;
pub mod packages;
pub mod qemu;
pub mod readback;
pub mod tools;

use std::thread;

use anyhow::Result;

use crate::arch::VmArchitecture;
use crate::cli::MachineArgs;
use crate::exit::{Unavailable, Usage};
use crate::image::Choice;
use crate::workspace::Workspace;
use facts::{Facts, Guest};
use findings::{Finding, Severity};
use local::LocalHost;

/// What a machine is looked at for.
#[derive(Debug, Clone, Copy)]
pub struct PreflightRequest<'a> {
    /// The guests' architectures.
    pub architectures: &'a [VmArchitecture],
    /// The guest, with its image.
    pub machine: &'a MachineArgs,
    /// Whether the test suite's own programs are wanted too.
    pub for_ci: bool,
}

/// What preflight found for some architectures.
#[derive(Debug)]
pub struct Preflight {
    /// This machine, per architecture asked.
    pub facts: Vec<Facts>,
    /// What was judged of it, worst first, each once.
    pub findings: Vec<Finding>,
}

impl Preflight {
    /// Gathers and judges; about a quarter of a second.
    ///
    /// # Errors
    /// [`Usage`] where the image that was asked for cannot be one.
    pub fn check(workspace: &Workspace, asked: &PreflightRequest<'_>) -> Result<Self, Usage> {
        let guests = asked.architectures.iter().map(|arch| {
            Ok((*arch, Guest::new(asked.machine, &Choice::from_args(&asked.machine.image, *arch)?)))
        });
        let guests: Vec<_> = guests.collect::<Result<_, Usage>>()?;
        let host = LocalHost::gather();
        let facts = thread::scope(|scope| {
            let gather = |(arch, guest)| {
                let host = host.clone();
                let for_ci = asked.for_ci;
                scope.spawn(move || Facts { for_ci, ..Facts::gather(workspace, host, arch, guest) })
            };
            let probes: Vec<_> = guests.into_iter().map(gather).collect();
            probes.into_iter().map(|probe| probe.join().expect("a probe does not panic")).collect()
        });
        Ok(Self::evaluate(facts))
    }

    /// Judges what was gathered.
    pub fn evaluate(facts: Vec<Facts>) -> Self {
        let found: Vec<_> = facts.iter().flat_map(findings::evaluate).collect();
        let mut preflight = Self { facts, findings: Vec::new() };
        preflight.add(found);
        preflight
    }

    /// Adds what was found elsewhere: what both architectures lack is one lack; worst first.
    pub fn add(&mut self, findings: Vec<Finding>) {
        for finding in findings {
            let same = |known: &&Finding| (known.id, &known.sentence) == (finding.id, &finding.sentence);
            if !self.findings.iter().any(|known| same(&known)) {
                self.findings.push(finding);
            }
        }
        self.findings.sort_by_key(|finding| finding.severity);
    }

    /// What stands in the way.
    pub fn blocking(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.severity == Severity::Blocks)
    }

    /// Nothing where this machine can do it.
    ///
    /// # Errors
    /// [`Unavailable`], with every blocking finding named and the command that fixes what can be fixed.
    pub fn verdict(&self) -> Result<()> {
        let blocking: Vec<_> = self.blocking().collect();
        if blocking.is_empty() {
            return Ok(());
        }
        let sentences: Vec<_> = blocking.iter().map(|finding| finding.sentence.as_str()).collect();
        let elsewhere = blocking.iter().all(|finding| finding.id.starts_with("connect-"));
        let subject = if elsewhere { "the libvirt asked" } else { "this machine" };
        let by_hand: Vec<_> = blocking.iter().filter_map(|finding| finding.by_hand()).collect();
        let architectures: Vec<_> = self.facts.iter().map(|facts| facts.arch.to_string()).collect();
        let arch = match architectures.as_slice() {
            [one] => format!(" --arch {one}"),
            _ => String::new(),
        };
        Err(Unavailable {
            error: format!(
                "{subject} is not ready for {}: {}",
                architectures.join(" and "),
                sentences.join("; ")
            ),
            hint: if by_hand.len() == blocking.len() {
                by_hand.join("; ")
            } else if fix::plan(self).is_empty() {
                "--fix knows no package for it on this distribution: install it by hand".to_owned()
            } else if blocking.iter().any(|finding| finding.id == findings::CI_PROGRAM) {
                "cargo xtask ci --fix".to_owned()
            } else {
                format!("cargo xtask preflight{arch} --fix")
            },
        }
        .into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_a_person_can_do_is_told_at_the_end() {
        let refusal = connection::refusal::Refusal::Message("Permission denied".to_owned());
        let findings = vec![refusal.finding(&"qemu:///system".parse().unwrap())];
        let preflight = Preflight { facts: vec![findings::tests::sound()], findings };
        assert_eq!(fix::plan(&preflight), Vec::<Vec<String>>::new(), "nothing that --fix would run");
        let error = preflight.verdict().unwrap_err();
        assert!(
            error.to_string().starts_with("the libvirt asked is not ready for aarch64: qemu:///system: ")
        );
        assert!(crate::exit::hint(&error).unwrap().contains("usermod --append --groups libvirt"));
    }
}
