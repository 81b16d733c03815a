//! The reconciler's state between two steps. It is behind a lock, since several deployments are processed in
//! parallel. The lock is never held across an await.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use agent_protocol::status::shortened;
use agent_protocol::{DeploymentStatus, Phase};
use tokio::time::Instant;

use super::damage::Damage;
use super::foreign::Foreign;
use super::leftovers::Leftovers;
use super::memory::Unsupported;
use crate::backoff::Backoff;
use crate::desired::{Desired, Target};
use crate::device_state::{self, DeviceState, Events};
use crate::host::DeviceIdentity;
use crate::managed::{ManagedDeployment, Role};
use crate::plan::{self, Step};

#[derive(Default)]
pub(super) struct State {
    pub(super) desired: Desired,
    /// True if `desired` has changes that are not on disk yet.
    pub(super) unsaved: bool,
    /// The revision of the desired state on disk.
    pub(super) saved_revision: u64,
    /// True if the desired state has been read from disk or from the bus. Until then, no container counts as
    /// an orphan.
    pub(super) known: bool,
    pub(super) events: Events,
    /// The status of each deployment after its last pass.
    pub(super) lines: BTreeMap<String, DeploymentStatus>,
    /// The time of the next pass, if a deployment needs one.
    pub(super) due: Option<Instant>,
    /// The containers of no known deployment.
    pub(super) foreign: Foreign,
    pub(super) leftovers: Leftovers,
    pub(super) damage: Damage,
    backoffs: HashMap<(String, Role), Backoff>,
    /// The times at which rolled-back documents are tried again.
    retries: HashMap<String, Instant>,
}

impl State {
    pub(super) fn backoff(&mut self, deployment: &ManagedDeployment) -> &mut Backoff {
        self.backoffs.entry((deployment.name.clone(), deployment.role)).or_default()
    }

    /// Ends all pauses, since the cause of the failures is gone.
    pub(super) fn end_pauses(&mut self) {
        self.backoffs.clear();
    }

    /// Drops the status and the backoff of deployments that the desired state no longer contains.
    pub(super) fn drop_forgotten(&mut self) {
        let Self { desired, lines, backoffs, retries, damage, .. } = self;
        damage.retain(|name| desired.deployments.contains_key(name));
        retries.retain(|name, _| desired.deployments.contains_key(name));
        lines.retain(|name, _| desired.deployments.contains_key(name));
        backoffs.retain(|(name, _), _| desired.deployments.contains_key(name));
    }

    /// Returns the deployments without their containers: first the deployments to remove, whose ports and
    /// names others may need, and then the deployments to run.
    pub(super) fn deployments(&self) -> [Vec<ManagedDeployment>; 2] {
        let all = self.desired.deployments.iter().map(|(name, entry)| ManagedDeployment::new(name, entry));
        let (to_run, to_remove) = all.partition(|deployment| matches!(deployment.target, Target::Run { .. }));
        [to_remove, to_run]
    }

    /// Resets the deployment's backoff if its target has changed since the last pass. If it is time to try a
    /// rolled-back document again, makes it the target.
    pub(super) fn begin(&mut self, deployment: &mut ManagedDeployment) {
        if deployment.role == Role::Current && self.must_try_again(&deployment.name) {
            self.unsaved |= self.desired.try_again(&deployment.name);
            self.events.push(&format!("{}: trying revision {} again", deployment.name, deployment.revision));
            self.refresh(deployment);
        }
        let digest = match deployment.target.digest() {
            Some(digest) => digest.to_owned(),
            None => deployment.revision.to_string(),
        };
        self.backoff(deployment).begin(&digest);
    }

    fn must_try_again(&mut self, name: &str) -> bool {
        let entry = self.desired.deployments.get(name);
        let Some(failure) = entry.and_then(|entry| entry.failure()).filter(|failure| failure.may_pass) else {
            self.retries.remove(name);
            return false;
        };
        let (now, pause) = (Instant::now(), retry_pause(failure.failures));
        let due = *self.retries.entry(name.to_owned()).or_insert(now + pause);
        if now >= due {
            self.retries.remove(name);
            return true;
        }
        self.look_again_in(due - now);
        false
    }

    /// Updates the deployment after a step has changed its records.
    pub(super) fn refresh(&self, deployment: &mut ManagedDeployment) {
        if let Some(entry) = self.desired.deployments.get(&deployment.name) {
            *deployment = deployment.refreshed(entry);
        }
    }

    /// Returns the next step. If the step must wait, the error is the remaining pause.
    pub(super) fn next(
        &mut self,
        device: &DeviceIdentity,
        deployment: &ManagedDeployment,
    ) -> Result<Step, Duration> {
        let mut step = plan::next(device, deployment);
        let (now, backoff) = (Instant::now(), self.backoff(deployment));
        let stale = backoff.transition_is_stale(step == Step::Wait, now);
        let replace = backoff.needs_new_container && matches!(step, Step::Start { .. } | Step::Rename { .. });
        if stale || replace {
            step = Step::Make;
        }
        let acts = match step {
            Step::Keep(_) | Step::Complete(_) | Step::Lost(_) | Step::Wait => false,
            // These steps change only the records, or follow a step that has failed for good.
            Step::DropPrevious | Step::RollBack { .. } => false,
            // A purge still has to delete volumes.
            Step::Gone => deployment.target == Target::Purged,
            _ => true,
        };
        match backoff.remaining(now) {
            Some(pause) if acts => Err(pause),
            _ => Ok(step),
        }
    }

    /// Records a failed step and plans the next attempt. Returns the deployment's phase.
    pub(super) fn step_failed(&mut self, deployment: &ManagedDeployment, error: &anyhow::Error) -> Phase {
        let now = Instant::now();
        let backoff = self.backoff(deployment);
        backoff.is_unsupported = error.is::<Unsupported>();
        let text = shortened(&format!("{error:#}"));
        let is_new = backoff.last_error.as_ref() != Some(&text);
        backoff.failed(now, text);
        let (pause, phase) = (backoff.remaining(now).unwrap_or_default(), backoff.phase());
        self.look_again_in(pause);
        let error = format!("{error:#}");
        let has_worked = deployment.applied.as_ref().is_some_and(|applied| !applied.unproven);
        self.damage.failed(&deployment.name, &error, has_worked);
        // A deployment may fail for months. Each event would cause another status.
        if is_new {
            self.events.push(&format!("{}: {error}", deployment.name));
        }
        phase
    }

    /// Rolls a deployment back to its previous document. The document that has failed is tried again later if podman's
    /// error may pass.
    pub(super) fn roll_back(
        &mut self,
        deployment: &mut ManagedDeployment,
        reason: &str,
        error: Option<&str>,
    ) {
        let name = deployment.name.clone();
        let may_pass = error.is_some_and(|error| PASSING.iter().any(|words| error.contains(words)));
        self.unsaved |= self.desired.roll_back(&name, &shortened(reason), may_pass);
        let failed = deployment.target_revision;
        self.refresh(deployment);
        let back = deployment.target_revision;
        let what = match failed == back {
            true => format!("the new image of revision {back} was rolled back"),
            false => format!("revision {failed} was rolled back to revision {back}"),
        };
        self.events.push(&format!("{name}: {what}: {reason}"));
        self.begin(deployment);
    }

    pub(super) fn look_again_in(&mut self, pause: Duration) {
        let then = Instant::now() + pause;
        self.due = Some(self.due.map_or(then, |due| due.min(then)));
    }

    /// Updates the deployment's line of the status.
    pub(super) fn set_line(&mut self, device_id: &str, deployment: &ManagedDeployment, phase: Phase) {
        let name = &deployment.name;
        let mut line = device_state::status_line(device_id, deployment, phase, self.backoff(deployment));
        if let Some(entry) = self.desired.deployments.get(name) {
            device_state::tell_orphaned(&mut line, entry);
            self.lines.insert(name.clone(), line);
        } else {
            self.lines.remove(name);
        }
    }

    pub(super) fn device_state(&self) -> DeviceState {
        DeviceState {
            desired_revision: self.saved_revision,
            foreign_containers: self.foreign.count() as u32,
            deployments: self.lines.values().cloned().collect(),
            events: self.events.list(),
        }
    }
}

/// Words of podman's errors whose causes lie in the device and may pass.
const PASSING: [&str; 4] = [
    "address already in use",
    "no space left on device",
    "cannot allocate memory",
    "has not answered within",
];
/// The first and the longest pause before a rolled-back document is tried again.
const RETRY_PAUSES: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(3600)];

/// Returns the pause before a document that has failed this many times is tried again. Each trial stops the
/// container that works.
fn retry_pause(failures: u32) -> Duration {
    let [first, longest] = RETRY_PAUSES;
    first.saturating_mul(1 << failures.saturating_sub(1).min(8)).min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Change, Operation, Update};

    #[test]
    fn removals_come_before_deployments_to_run() {
        let mut state = State::default();
        let run = r#"{"version":1,"kind":"podman-container","spec":{"image":"localhost/a:1"}}"#;
        let operations =
            [("a", Operation::Put(run.into())), ("b", Operation::Delete), ("c", Operation::Put("{".into()))];
        for (revision, (name, operation)) in (1..).zip(operations) {
            state.desired.take(Change::Update(Update { name: name.into(), revision, operation }));
        }
        let [to_remove, to_run] = state
            .deployments()
            .map(|deployments| deployments.into_iter().map(|deployment| deployment.name).collect::<Vec<_>>());
        assert_eq!((to_remove, to_run), (vec!["b".into(), "c".into()], vec!["a".to_owned()]));
    }

    #[test]
    fn an_error_that_is_repeated_makes_one_event() {
        let mut state = State::default();
        let operation = Operation::Put("{}".into());
        state.desired.take(Change::Update(Update { name: "a".into(), revision: 1, operation }));
        let deployment = ManagedDeployment::new("a", &state.desired.deployments["a"]);
        for (error, phase, count) in [
            (Unsupported("no controller".into()).into(), Phase::Refused, 1),
            (Unsupported("no controller".into()).into(), Phase::Refused, 1),
            (anyhow::anyhow!("no answer"), Phase::BackingOff, 2),
            (anyhow::anyhow!("no answer"), Phase::BackingOff, 2),
            (anyhow::anyhow!("another"), Phase::BackingOff, 3),
        ] {
            assert_eq!(state.step_failed(&deployment, &error), phase);
            assert_eq!(state.events.list().last().unwrap().number, count, "{error}");
        }
    }

    #[test]
    fn a_rolled_back_document_is_tried_again_if_its_reason_may_pass() {
        let text = |tag| {
            format!(r#"{{"version":1,"kind":"podman-container","spec":{{"image":"localhost/a:{tag}"}}}}"#)
        };
        for (reason, again) in [("bind: address already in use", true), ("it ended with exit code 1", false)]
        {
            let mut state = State::default();
            for revision in [1, 2] {
                let operation = Operation::Put(text(revision));
                state.desired.take(Change::Update(Update { name: "a".into(), revision, operation }));
                let digest = state.desired.deployments["a"].current().1.digest().unwrap().to_owned();
                state.desired.started("a", &digest, "c", "b");
            }
            let mut deployment = ManagedDeployment::new("a", &state.desired.deployments["a"]);
            state.roll_back(&mut deployment, reason, Some(reason));
            assert_eq!((deployment.revision, deployment.target_revision), (2, 1));
            assert_eq!(state.due.is_some(), again, "{reason}");
            state.begin(&mut deployment);
            assert_eq!(deployment.target_revision, 1, "not yet");
            state.retries.values_mut().for_each(|due| *due = Instant::now());
            state.begin(&mut deployment);
            assert_eq!(deployment.target_revision, if again { 2 } else { 1 }, "{reason}");
        }
        let pauses = [1, 2, 3, 7, u32::MAX].map(|failures| retry_pause(failures).as_secs());
        assert_eq!(pauses, [60, 120, 240, 3600, 3600]);
    }
}
