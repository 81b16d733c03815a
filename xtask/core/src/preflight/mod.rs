//! What this machine has and lacks: facts (gathered by [`crate::host`]) → [`findings`] (pure) → remedies ([`fix`]).
//! [`remote`] is about another libvirt.

pub mod findings;
pub mod fix;
pub mod remote;
pub mod show;

use std::thread;

use crate::arch::VmArchitecture;
use crate::cli::MachineArgs;
use crate::error::Failure;
use crate::host::facts::{Facts, Guest};
use crate::host::local::LocalHost;
use crate::workspace::Workspace;
use findings::{Finding, Severity};

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
    /// A usage error where the image that was asked for cannot be one.
    pub fn check(workspace: &Workspace, asked: &PreflightRequest<'_>) -> Result<Self, Failure> {
        let guests =
            asked.architectures.iter().map(|arch| Ok((*arch, Guest::from_args(asked.machine, *arch)?)));
        let guests: Vec<_> = guests.collect::<Result<_, Failure>>()?;
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
}
