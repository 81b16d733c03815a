//! What the reconciler knows between two steps. Several deployments are worked on at once, so that it stands behind a lock, which
//! nobody holds while waiting for anything.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::desired::{Desired, Target};
use crate::device_state::{self, DeviceState, Events};
use crate::plan::{self, Step};
use crate::podman::ListedContainer;
use agent_protocol::status::{DeploymentStatus, Phase};

/// All that changes while deployments are worked on.
#[derive(Default)]
pub(super) struct State {
    /// What it knows of what the fleet desires.
    pub(super) desired: Desired,
    /// Whether that is on disk.
    pub(super) unsaved: bool,
    /// Whether that is known at all: without it, nothing is an orphan.
    pub(super) known: bool,
    pub(super) events: Events,
    /// How each deployment was after the last look at it.
    pub(super) lines: BTreeMap<String, DeploymentStatus>,
    /// When a deployment wants another look.
    pub(super) due: Option<Instant>,
    pub(super) backoff: HashMap<String, Backoff>,
}

impl State {
    pub(super) fn backoff(&mut self, name: &str) -> &mut Backoff {
        self.backoff.entry(name.to_owned()).or_default()
    }

    /// What the fleet no longer asks for has no line and no backoff.
    pub(super) fn keep_desired(&mut self) {
        let Self { desired, lines, backoff, .. } = self;
        lines.retain(|name, _| desired.deployments.contains_key(name));
        backoff.retain(|name, _| desired.deployments.contains_key(name));
    }

    /// The deployments with their targets and revisions: first those that are to be gone, whose ports and names others may be
    /// about to take.
    pub(super) fn targets(&self) -> [Vec<(String, Target, u64)>; 2] {
        let all = self.desired.deployments.iter();
        let (run, gone) = all
            .map(|(name, entry)| (name.clone(), entry.target(name), entry.revision))
            .partition(|(_, target, _)| matches!(target, Target::Run(..)));
        [gone, run]
    }

    /// The deployment's backoff is that of this target from here on.
    pub(super) fn begin(&mut self, name: &str, target: &Target, revision: u64) {
        let attempt_of = match target {
            Target::Run(_, digest) => digest.clone(),
            _ => format!("{revision}"),
        };
        self.backoff(name).of(&attempt_of);
    }

    /// The next step; or how long it has to wait.
    pub(super) fn next(
        &mut self,
        (device_id, boot_id): (&str, &str),
        name: &str,
        target: &Target,
        containers: &[ListedContainer],
    ) -> Result<Step, Duration> {
        let applied = self.desired.deployments.get(name).and_then(|entry| entry.applied.as_ref());
        let mut step = plan::next(device_id, name, target, containers, applied, boot_id);
        let backoff = self.backoff(name);
        let stuck = backoff.waits_too_long(step == Step::Wait, Instant::now());
        if stuck || backoff.remake && matches!(step, Step::Start { .. } | Step::Rename(_)) {
            step = Step::Make;
        }
        let forgets = step == Step::Gone && *target == Target::Forgotten;
        let acts = forgets || !matches!(step, Step::Keep | Step::Complete | Step::Wait | Step::Gone);
        match backoff.wait(Instant::now()) {
            Some(wait) if acts => Err(wait),
            _ => Ok(step),
        }
    }

    pub(super) fn look_again_in(&mut self, wait: Duration) {
        let then = Instant::now() + wait;
        self.due = Some(self.due.map_or(then, |due| due.min(then)));
    }

    /// The deployment's line of the status, as it is now.
    pub(super) fn set_line(
        &mut self,
        name: &str,
        target: &Target,
        revision: u64,
        containers: &[ListedContainer],
        phase: Phase,
    ) {
        if !self.desired.deployments.contains_key(name) {
            self.lines.remove(name);
            return;
        }
        let backoff = self.backoff(name);
        let line =
            device_state::status_line(name, target, revision, containers, phase, backoff.error.as_ref());
        let line = DeploymentStatus { restarts: backoff.restarts, ..line };
        self.lines.insert(name.to_owned(), line);
    }

    pub(super) fn device_state(&self) -> DeviceState {
        DeviceState {
            desired_revision: self.desired.revision,
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
    fn what_is_to_be_gone_comes_before_what_may_take_its_port() {
        let mut state = State::default();
        let run = r#"{"version":1,"kind":"podman-container","spec":{"image":"localhost/a:1"}}"#;
        let operations =
            [("a", Operation::Put(run.into())), ("b", Operation::Delete), ("c", Operation::Put("{".into()))];
        for (revision, (name, operation)) in (1..).zip(operations) {
            state.desired.take(Change::Update(Update { name: name.into(), revision, operation }));
        }
        let names = |targets: &[(String, Target, u64)]| -> Vec<String> {
            targets.iter().map(|(name, ..)| name.clone()).collect()
        };
        let [gone, run] = state.targets();
        assert_eq!((names(&gone), names(&run)), (vec!["b".into(), "c".into()], vec!["a".to_owned()]));
    }
}
