//! What a status says of a deployment, and what a workload says of itself: pure.

use std::collections::BTreeSet;

use iot_agent::protocol::{DeploymentStatus, Phase};
use xtask::exit::Diagnosis;
use xtask::report::WorkloadEvidence;

use super::verify::Judgement;
use crate::broker::Seen;

/// A deployment that failed in so many statuses does not get right by itself. Once may be a podman that is just starting.
const MOST_TROUBLED_STATUSES: usize = 4;

/// A wait for one deployment.
#[derive(Debug)]
pub(crate) struct Wanted {
    name: &'static str,
    revision: u64,
    phase: Phase,
    troubled: BTreeSet<u64>,
}

impl Wanted {
    /// That it runs, as desired at `revision`.
    pub(crate) fn running(name: &'static str, revision: u64) -> Self {
        Self { name, revision, phase: Phase::Running, troubled: BTreeSet::new() }
    }

    /// That it is gone, as desired at `revision`.
    pub(crate) fn removed(name: &'static str, revision: u64) -> Self {
        Self { name, revision, phase: Phase::Removed, troubled: BTreeSet::new() }
    }

    /// Whether this status shows it.
    pub(crate) fn judge(&mut self, seen: &Seen) -> Judgement {
        let line = seen.status.deployment(self.name);
        let Some(line) = line.filter(|line| line.desired_revision >= self.revision) else {
            return Judgement::NotYet;
        };
        if line.phase == self.phase && agrees(line) {
            return Judgement::Proven;
        }
        let Some(error) = &line.last_error else { return Judgement::NotYet };
        self.troubled.insert(seen.revision);
        let hopeless = match line.phase {
            Phase::Refused => true,
            Phase::BackingOff | Phase::Removing => self.troubled.len() >= MOST_TROUBLED_STATUSES,
            _ => false,
        };
        if !hopeless {
            return Judgement::NotYet;
        }
        Judgement::Refuted(Diagnosis::new(
            format!("the deployment {} is {}: {error}", self.name, word(line.phase)),
            "the agent's journal in the report's directory has the rest; podman's too",
        ))
    }

    /// What the status says of it, for a wait that ran out of time.
    pub(crate) fn told(&self, seen: Option<&Seen>) -> String {
        let line = seen.and_then(|seen| seen.status.deployment(self.name));
        line.map_or("has no line for it".to_owned(), |line| {
            let error = line.last_error.as_ref().map_or(String::new(), |error| format!(" ({error})"));
            format!("says {} at revision {}{error}", word(line.phase), line.desired_revision)
        })
    }
}

/// A phase and the container beside it.
fn agrees(line: &DeploymentStatus) -> bool {
    match (line.phase, &line.container) {
        (Phase::Running, Some(container)) => container.state == "running",
        (Phase::Removed, None) => true,
        _ => false,
    }
}

/// The phase as it is written in the status.
fn word(phase: Phase) -> String {
    let value = serde_json::to_value(phase).expect("a phase is plain data");
    value.as_str().unwrap_or_default().to_owned()
}

/// What the workload must say.
#[derive(Debug)]
pub(crate) struct Answer<'a> {
    /// `uname -m` of the machine that was asked for.
    pub(crate) machine: &'a str,
    /// The generation that the fleet desires.
    pub(crate) generation: u64,
    /// What it said last.
    pub(crate) before: Option<&'a WorkloadEvidence>,
}

impl Answer<'_> {
    /// `None` where it is another generation's, which may still run; else whether it is as it must be.
    pub(crate) fn judge(&self, said: &WorkloadEvidence) -> Result<Option<()>, Diagnosis> {
        if said.machine != self.machine {
            return Err(Diagnosis::new(
                format!("the workload runs on {}, and {} was asked for", said.machine, self.machine),
                "something else answers on the workload's port than the container in the guest",
            ));
        }
        if said.generation != self.generation {
            return Ok(None);
        }
        if let Some(before) = self.before.filter(|before| said.starts <= before.starts) {
            return Err(Diagnosis::new(
                format!(
                    "the workload has counted {} starts, and {} before: it lost its volume",
                    said.starts, before.starts
                ),
                "a deployment's volumes stay until it is purged, whatever becomes of its container or of the power",
            ));
        }
        Ok(Some(()))
    }
}
