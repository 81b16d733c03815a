//! The reconciler's state between two steps. It is behind a lock, since several deployments are processed in
//! parallel. The lock is never held across an await.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use agent_protocol::status::shortened;
use agent_protocol::{DeploymentStatus, Phase};
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::desired::{Desired, Target};
use crate::device_state::{self, DeviceState, Events};
use crate::host::DeviceIdentity;
use crate::plan::{self, ManagedDeployment, Step};

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
    /// The containers of others, by name.
    pub(super) foreign: Vec<String>,
    backoffs: HashMap<String, Backoff>,
}

impl State {
    pub(super) fn backoff(&mut self, name: &str) -> &mut Backoff {
        self.backoffs.entry(name.to_owned()).or_default()
    }

    /// Drops the status and the backoff of deployments that the desired state no longer contains.
    pub(super) fn drop_forgotten(&mut self) {
        let Self { desired, lines, backoffs, .. } = self;
        lines.retain(|name, _| desired.deployments.contains_key(name));
        backoffs.retain(|name, _| desired.deployments.contains_key(name));
    }

    /// Returns the deployments without their containers: first the deployments to remove, whose ports and
    /// names others may need, and then the deployments to run.
    pub(super) fn deployments(&self) -> [Vec<ManagedDeployment>; 2] {
        let all = self.desired.deployments.iter().map(|(name, entry)| ManagedDeployment::new(name, entry));
        let (to_run, to_remove) = all.partition(|deployment| matches!(deployment.target, Target::Run { .. }));
        [to_remove, to_run]
    }

    /// Resets the deployment's backoff if its target has changed since the last pass.
    pub(super) fn begin(&mut self, deployment: &ManagedDeployment) {
        let digest = match &deployment.target {
            Target::Run { digest, .. } => digest.clone(),
            _ => deployment.revision.to_string(),
        };
        self.backoff(&deployment.name).begin(&digest);
    }

    /// Returns the next step. If the step must wait, the error is the remaining pause.
    pub(super) fn next(
        &mut self,
        device: &DeviceIdentity,
        deployment: &ManagedDeployment,
    ) -> Result<Step, Duration> {
        let applied = self.desired.deployments.get(&deployment.name).and_then(|entry| entry.applied.as_ref());
        let mut step = plan::next(device, deployment, applied);
        let (now, backoff) = (Instant::now(), self.backoff(&deployment.name));
        let stale = backoff.transition_is_stale(step == Step::Wait, now);
        let replace = backoff.needs_new_container && matches!(step, Step::Start { .. } | Step::Rename(_));
        if stale || replace {
            step = Step::Make;
        }
        let acts = match step {
            Step::Keep | Step::Complete | Step::Wait => false,
            // A purge still has to delete volumes.
            Step::Gone => deployment.target == Target::Purged,
            _ => true,
        };
        match backoff.remaining(now) {
            Some(pause) if acts => Err(pause),
            _ => Ok(step),
        }
    }

    /// Records a failed step and plans the next attempt.
    pub(super) fn step_failed(&mut self, name: &str, error: &anyhow::Error) {
        let now = Instant::now();
        let backoff = self.backoff(name);
        backoff.failed(now, shortened(&format!("{error:#}")));
        let pause = backoff.remaining(now).unwrap_or_default();
        self.look_again_in(pause);
        self.events.push(&format!("{name}: {error:#}"));
    }

    pub(super) fn look_again_in(&mut self, pause: Duration) {
        let then = Instant::now() + pause;
        self.due = Some(self.due.map_or(then, |due| due.min(then)));
    }

    /// Updates the deployment's line of the status.
    pub(super) fn set_line(&mut self, deployment: &ManagedDeployment, phase: Phase) {
        let name = &deployment.name;
        let mut line = device_state::status_line(deployment, phase, self.backoff(name));
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
            foreign_containers: self.foreign.len() as u32,
            deployments: self.lines.values().cloned().collect(),
            events: self.events.list(),
        }
    }
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
}
