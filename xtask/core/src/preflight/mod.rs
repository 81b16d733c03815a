//! Checks this machine. [`crate::host`] gathers facts, [`findings`] turns them into findings without side effects, and
//! [`fix`] chooses the commands that repair findings, and [`repair`] runs them. [`remote`] checks another libvirt.

pub mod findings;
pub mod fix;
pub mod remote;
mod repair;
pub mod show;

use std::thread;

use crate::arch::VmArchitecture;
use crate::cache::Cache;
use crate::cli::{MachineArgs, PlaceArgs};
use crate::error::Failure;
use crate::host::facts::{Facts, Guest};
use crate::host::local::LocalHost;
pub use crate::host::local::Purpose;
use crate::workspace::Workspace;
use findings::{Finding, Severity};

/// The guests for which this machine is checked.
#[derive(Debug, Clone, Copy)]
pub struct PreflightRequest<'a> {
    /// The guests' architectures.
    pub architectures: &'a [VmArchitecture],
    /// The machine of the guest, with its image.
    pub machine: &'a MachineArgs,
    /// The libvirt that runs the guest. With `--connect`, the emulator and the firmware are those of that libvirt's
    /// host, and this host needs none.
    pub place: &'a PlaceArgs,
    pub purpose: Purpose,
}

/// The result of a check.
#[derive(Debug)]
pub struct Preflight {
    /// The facts about this machine, once for each requested architecture.
    pub facts: Vec<Facts>,
    /// The findings without duplicates, the most severe first.
    pub findings: Vec<Finding>,
    /// The commands that `--fix` ran last.
    pub tried: Vec<Vec<String>>,
}

impl Preflight {
    /// Gathers the facts and evaluates them.
    ///
    /// # Errors
    /// Returns a usage error if the requested image is not valid.
    pub fn check(workspace: &Workspace, asked: &PreflightRequest<'_>) -> Result<Self, Failure> {
        // The test suite builds images, even if they are in the cache.
        let cache = if asked.purpose == Purpose::TestSuite { None } else { Cache::from_env().ok() };
        let guest = |arch| Guest::from_args(asked.machine, arch, cache.as_ref());
        let guests = asked.architectures.iter().map(|arch| Ok((*arch, guest(*arch)?)));
        let guests: Vec<_> = guests.collect::<Result<_, Failure>>()?;
        let host = LocalHost::gather();
        let facts = thread::scope(|scope| {
            let gather = |(arch, guest)| {
                let host = host.clone();
                let (purpose, is_on_daemon) = (asked.purpose, asked.place.connect.is_some());
                scope.spawn(move || Facts {
                    purpose,
                    is_on_daemon,
                    ..Facts::gather(workspace, host, arch, guest)
                })
            };
            let probes: Vec<_> = guests.into_iter().map(gather).collect();
            probes.into_iter().map(|probe| probe.join().expect("a probe does not panic")).collect()
        });
        Ok(Self::evaluate(facts))
    }

    /// Returns the result of the check for these facts.
    pub fn evaluate(facts: Vec<Facts>) -> Self {
        let found: Vec<_> = facts.iter().flat_map(findings::evaluate).collect();
        let mut preflight = Self { facts, findings: Vec::new(), tried: Vec::new() };
        preflight.add(found);
        preflight
    }

    /// Adds findings, and sorts all findings by severity. If a finding is already in the list, it is not added again.
    pub fn add(&mut self, findings: Vec<Finding>) {
        for finding in findings {
            let same = |known: &&Finding| (known.id, &known.sentence) == (finding.id, &finding.sentence);
            if !self.findings.iter().any(|known| same(&known)) {
                self.findings.push(finding);
            }
        }
        self.findings.sort_by_key(|finding| finding.severity);
    }

    /// Returns the findings that block.
    pub fn blocking(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.severity == Severity::Blocks)
    }
}
