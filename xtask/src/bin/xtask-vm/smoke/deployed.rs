//! Checks of a deployment in a status and of a workload's answer, as pure functions.

use std::collections::BTreeSet;

use agent_protocol::{DeploymentStatus, DeviceStatus, Phase as DeploymentPhase};
use xtask_core::bail_guest;
use xtask_core::error::Failure;
use xtask_core::report::WorkloadEvidence;

use xtask_fleet::ReceivedStatus;

/// The number of different statuses with an error after which a deployment counts as failed. A single error may come
/// from a podman that is just starting.
const MAX_TROUBLED_STATUSES: usize = 4;

/// The hint for an answer that is not from the workload's container.
pub(super) const FIND_LISTENER: &str = "find out what listens on the workload's port in the guest: run again \
    with --keep, then cargo xtask vm ssh";

/// The expected state of one deployment, and the statuses that reported an error while this state was awaited.
#[derive(Debug)]
pub(crate) struct ExpectedDeployment {
    name: &'static str,
    revision: u64,
    phase: DeploymentPhase,
    troubled: BTreeSet<u64>,
    /// The exit code with which the deployment's container has ended; `None` if no container has failed.
    pub(crate) failed_with: Option<i32>,
}

impl ExpectedDeployment {
    /// Returns the expectation that the deployment runs with the document of `revision`.
    pub(crate) fn running(name: &'static str, revision: u64) -> Self {
        Self { name, revision, phase: DeploymentPhase::Running, troubled: BTreeSet::new(), failed_with: None }
    }

    /// Returns the expectation that the deployment, which was deleted at `revision`, is gone. A status that
    /// acknowledges the deletion then has no line for the deployment. In the status of an earlier agent, the line
    /// stays.
    pub(crate) fn removed(name: &'static str, revision: u64) -> Self {
        Self { phase: DeploymentPhase::Removed, ..Self::running(name, revision) }
    }

    /// Returns whether this status shows the expected state. Returns an error if the status shows that the expected
    /// state will not be reached.
    pub(crate) fn check(&mut self, seen: &ReceivedStatus) -> Result<bool, Failure> {
        let line = seen.status.deployment(self.name);
        if line.is_none() && self.phase == DeploymentPhase::Removed {
            let DeviceStatus { desired_revision, deployments_omitted, .. } = &seen.status;
            return Ok(*desired_revision >= self.revision && *deployments_omitted == 0);
        }
        let Some(line) = line.filter(|line| line.desired_revision >= self.revision) else {
            return Ok(false);
        };
        let exit_code = line.container.as_ref().and_then(|container| container.exit_code);
        self.failed_with = exit_code.filter(|code| *code != 0).or(self.failed_with);
        if line.phase == self.phase && agrees(line) {
            return Ok(true);
        }
        let Some(error) = &line.last_error else { return Ok(false) };
        self.troubled.insert(seen.revision);
        let hopeless = match line.phase {
            DeploymentPhase::Refused | DeploymentPhase::RolledBack => true,
            DeploymentPhase::BackingOff | DeploymentPhase::Removing => {
                self.troubled.len() >= MAX_TROUBLED_STATUSES
            }
            _ => false,
        };
        if hopeless {
            bail_guest!(
                "the deployment {} is {}: {error}", self.name, word(line.phase);
                "read the journals of the agent and of podman in the report's directory"
            );
        }
        Ok(false)
    }

    /// Describes the status of the deployment, for the message of a wait that ran out of time.
    pub(crate) fn describe(&self, seen: Option<&ReceivedStatus>) -> String {
        let line = seen.and_then(|seen| seen.status.deployment(self.name));
        line.map_or("has no entry for it".to_owned(), |line| {
            let error = line.last_error.as_ref().map_or(String::new(), |error| format!(" ({error})"));
            format!("says {} at revision {}{error}", word(line.phase), line.desired_revision)
        })
    }
}

/// Returns whether the phase is running or removed, and the reported container agrees with the phase.
fn agrees(line: &DeploymentStatus) -> bool {
    match (line.phase, &line.container) {
        (DeploymentPhase::Running, Some(container)) => container.state == "running",
        (DeploymentPhase::Removed, None) => true,
        _ => false,
    }
}

/// Returns the phase as it is written in the status.
pub(super) fn word(phase: DeploymentPhase) -> String {
    let value = serde_json::to_value(phase).expect("a phase is plain data");
    value.as_str().unwrap_or_default().to_owned()
}

/// The expected answer of the workload.
#[derive(Debug)]
pub(crate) struct ExpectedAnswer<'a> {
    /// The output of `uname -m` on the requested machine.
    pub(crate) machine: &'a str,
    /// The generation of the deployment's current document.
    pub(crate) generation: u64,
    /// An earlier answer, which must have counted fewer starts; `None` if the starts are not compared.
    pub(crate) before: Option<&'a WorkloadEvidence>,
}

impl ExpectedAnswer<'_> {
    /// Returns whether an answer is the expected one. An answer of another generation is no error, because that
    /// generation may still run for a while.
    pub(crate) fn check(&self, answer: &WorkloadEvidence) -> Result<bool, Failure> {
        if answer.machine != self.machine {
            bail_guest!(
                "the workload runs on {}, expected {}", answer.machine, self.machine;
                "{FIND_LISTENER}"
            );
        }
        if answer.generation != self.generation {
            return Ok(false);
        }
        if let Some(before) = self.before.filter(|before| answer.starts <= before.starts) {
            bail_guest!(
                "the workload has counted {} starts in its volume, expected at least {}: it lost its volume",
                answer.starts, before.starts + 1;
                "a deployment's volumes must outlive its container and power cuts, until it is purged"
            );
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smoke::verify::tests::{refuted, seen};
    use agent_protocol::ObservedContainer;

    fn with(
        revision: u64,
        desired_revision: u64,
        phase: DeploymentPhase,
        state: &str,
        error: Option<&str>,
    ) -> ReceivedStatus {
        let mut seen = seen(revision, "b1");
        let container =
            ObservedContainer { id: "c".into(), state: state.into(), exit_code: None, image: String::new() };
        seen.status.deployments = vec![DeploymentStatus {
            name: "persistent".into(),
            desired_revision,
            phase,
            container: (!state.is_empty()).then_some(container),
            running_revision: None,
            missing_limits: Vec::new(),
            downloaded_bytes: None,
            last_error: error.map(str::to_owned),
            restarts: 0,
        }];
        seen
    }

    #[test]
    fn it_runs_once_phase_container_and_revision_say_so() {
        let mut wanted = ExpectedDeployment::running("persistent", 7);
        let table = [
            (seen(1, "b1"), false),
            (with(2, 6, DeploymentPhase::Running, "running", None), false),
            (with(3, 7, DeploymentPhase::Pending, "running", None), false),
            (with(4, 7, DeploymentPhase::Running, "exited", None), false),
            (with(5, 7, DeploymentPhase::Running, "", None), false),
            (with(6, 7, DeploymentPhase::Running, "running", None), true),
            (with(7, 8, DeploymentPhase::Running, "running", Some("it had ended once")), true),
        ];
        for (seen, proven) in table {
            assert_eq!(wanted.check(&seen).unwrap(), proven, "{seen:?}");
        }
    }

    #[test]
    fn it_is_gone_once_there_is_no_container_or_no_line() {
        let mut wanted = ExpectedDeployment::removed("persistent", 7);
        for seen in [
            with(1, 6, DeploymentPhase::Running, "running", None),
            with(2, 7, DeploymentPhase::Removing, "running", None),
            with(3, 7, DeploymentPhase::Removed, "exited", None),
        ] {
            assert!(!wanted.check(&seen).unwrap(), "{seen:?}");
        }
        assert!(wanted.check(&with(4, 7, DeploymentPhase::Removed, "", None)).unwrap());
        let mut without = seen(5, "b1");
        for (desired_revision, deployments_omitted, is_gone) in [(6, 0, false), (7, 1, false), (7, 0, true)] {
            (without.status.desired_revision, without.status.deployments_omitted) =
                (desired_revision, deployments_omitted);
            assert_eq!(wanted.check(&without).unwrap(), is_gone, "{without:?}");
        }
        assert!(!ExpectedDeployment::running("persistent", 7).check(&without).unwrap());
        let describe =
            wanted.describe(Some(&with(5, 7, DeploymentPhase::Removing, "running", Some("podman is away"))));
        assert_eq!(describe, "says removing at revision 7 (podman is away)");
        assert_eq!(wanted.describe(None), "has no entry for it");
    }

    #[test]
    fn a_failure_that_stays_ends_the_wait_with_its_own_words() {
        let refused = with(1, 7, DeploymentPhase::Refused, "", Some("kind \"wasm\" is unknown"));
        let diagnosis = refuted(ExpectedDeployment::running("persistent", 7).check(&refused));
        assert_eq!(diagnosis, "the deployment persistent is refused: kind \"wasm\" is unknown");
        let back = with(1, 7, DeploymentPhase::RolledBack, "running", Some("its container has ended"));
        let diagnosis = refuted(ExpectedDeployment::running("persistent", 7).check(&back));
        assert_eq!(diagnosis, "the deployment persistent is rolled-back: its container has ended");
        let mut wanted = ExpectedDeployment::running("persistent", 7);
        let mut check = |revision| {
            wanted.check(&with(revision, 7, DeploymentPhase::BackingOff, "", Some("no such image")))
        };
        // A status that is seen several times counts once.
        for revision in [1, 2, 2, 2, 2, 3] {
            assert!(!check(revision).unwrap(), "{revision}");
        }
        assert_eq!(refuted(check(4)), "the deployment persistent is backing-off: no such image");
    }

    #[test]
    fn a_container_that_has_failed_is_remembered() {
        let mut wanted = ExpectedDeployment::running("persistent", 7);
        assert_eq!(wanted.failed_with, None);
        let mut ended = with(9, 7, DeploymentPhase::BackingOff, "exited", Some("it has ended"));
        for (exit_code, failed_with) in [(Some(0), None), (Some(133), Some(133)), (None, Some(133))] {
            ended.status.deployments[0].container.as_mut().unwrap().exit_code = exit_code;
            assert!(!wanted.check(&ended).unwrap());
            assert_eq!(wanted.failed_with, failed_with, "{exit_code:?}");
        }
    }

    #[test]
    fn an_answer_is_of_the_machine_the_generation_and_the_volume() {
        let answer = |machine: &str, generation, starts| WorkloadEvidence {
            machine: machine.into(),
            page_size: Some(4096),
            boot_id: "b1".into(),
            generation,
            starts,
        };
        let before = answer("aarch64", 1, 3);
        let wanted = ExpectedAnswer { machine: "aarch64", generation: 2, before: Some(&before) };
        assert!(wanted.check(&answer("aarch64", 2, 4)).unwrap());
        assert!(!wanted.check(&answer("aarch64", 1, 3)).unwrap(), "still the one of before");
        assert!(refuted(wanted.check(&answer("x86_64", 2, 4))).contains("runs on x86_64"));
        for starts in [1, 3] {
            let error = refuted(wanted.check(&answer("aarch64", 2, starts)));
            assert!(error.contains("lost its volume"), "{error}");
        }
    }
}
