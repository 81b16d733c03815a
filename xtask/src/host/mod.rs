//! What this machine has and lacks: [`facts`] (gathered, IO) → [`findings`] (judged, pure) → remedies
//! ([`packages`], [`fix`]).

pub mod connection;
pub mod facts;
pub mod findings;
pub mod firmware;
pub mod fix;
pub mod kvm;
pub mod packages;
pub mod qemu;
pub mod tools;

use anyhow::Result;

use crate::arch::VmArchitecture;
use crate::cli::MachineArgs;
use crate::exit::Unavailable;
use crate::workspace::Workspace;
use facts::Facts;
use findings::{Finding, Remedy, Severity};
use packages::Need;

/// What a machine is looked at for.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
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
    pub fn check(workspace: &Workspace, asked: &Asked<'_>) -> Self {
        let facts: Vec<_> = asked.architectures.iter().map(|arch| Facts::gather(workspace, *arch)).collect();
        let mut found: Vec<_> = facts.iter().flat_map(findings::judge).collect();
        if asked.for_ci {
            found.extend(judge_ci(&facts::missing(facts::CI_PROGRAMS)));
        }
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
            } else if blocking.iter().any(|finding| finding.id == CI_PROGRAM) {
                "cargo xtask ci --fix".to_owned()
            } else {
                format!("cargo xtask preflight{arch} --fix")
            },
        }
        .into())
    }
}

/// The id of what the test suite alone lacks.
const CI_PROGRAM: &str = "ci-program";

/// What the test suite lacks, beside what every run needs.
fn judge_ci(missing: &[(&'static str, Need)]) -> Vec<Finding> {
    let finding = |(program, need): &(&str, Need)| Finding {
        id: CI_PROGRAM,
        severity: Severity::Blocks,
        sentence: format!("{program}, which the test suite starts, is missing"),
        evidence: "not on PATH nor in the system directories".to_owned(),
        // No guest has a part in this; any column of the table will do.
        remedy: Some(Remedy::Install(*need, VmArchitecture::default())),
    };
    missing.iter().map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_test_suite_lacks_is_installed_by_name() {
        assert_eq!(judge_ci(&[]), []);
        let found = judge_ci(&[("libvirtd", Need::LibvirtDaemon)]);
        let preflight = Preflight { facts: vec![findings::tests::sound()], findings: found };
        let commands = fix::plan(&preflight);
        assert_eq!(commands[1].join(" "), "apt-get install --yes --no-install-recommends libvirt-daemon");
        let error = preflight.verdict().unwrap_err();
        assert_eq!(crate::exit::hint(&error), Some("cargo xtask ci --fix"));
    }

    #[test]
    fn what_only_a_person_can_do_is_told_at_the_end() {
        let refusal = connection::refusal::Refusal::Said("Permission denied".to_owned());
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
