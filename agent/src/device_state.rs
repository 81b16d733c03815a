//! What the rest of the agent sees of the reconciler: the lines of the status, and what happened last.

use std::collections::{BTreeMap, VecDeque};

use crate::desired::{Desired, Target};
use crate::host::uptime_seconds;
use crate::plan;
use crate::podman::ListedContainer;
use agent_protocol::status::{DeploymentStatus, Event, MAX_EVENTS, ObservedContainer, Phase, shortened};

/// A moment of the device's deployments.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceState {
    /// As in the status.
    pub desired_revision: u64,
    /// As in the status.
    pub deployments: Vec<DeploymentStatus>,
    /// As in the status.
    pub events: Vec<Event>,
}

/// How the connection is, for the local status.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Connection {
    /// Whether there is one.
    pub connected: bool,
    /// Why not, or what went wrong last with it.
    pub error: Option<String>,
}

/// The deployment's line of the status.
pub(crate) fn status_line(
    name: &str,
    target: &Target,
    revision: u64,
    containers: &[ListedContainer],
    phase: Phase,
    error: Option<&String>,
) -> DeploymentStatus {
    let container = containers.iter().find(|container| container.state == "running").or(containers.first());
    DeploymentStatus {
        name: name.to_owned(),
        desired_revision: revision,
        phase: match (phase, target) {
            (Phase::BackingOff | Phase::Pending, Target::Removed | Target::Forgotten) => Phase::Removing,
            _ => phase,
        },
        container: container.map(|container| ObservedContainer {
            id: short(&container.id),
            state: container.state.clone(),
            exit_code: plan::has_ended(container).then_some(container.exit_code),
        }),
        last_error: match target {
            Target::Refused(refusal) => Some(refusal.0.clone()),
            _ => error.cloned(),
        },
        restarts: 0,
    }
}

/// A line for each deployment of which podman has not been asked yet.
pub(crate) fn add_missing_lines(lines: &mut BTreeMap<String, DeploymentStatus>, desired: &Desired) {
    for (name, entry) in &desired.deployments {
        let target = entry.target(name);
        let new = || status_line(name, &target, entry.revision, &[], Phase::Pending, None);
        let line = lines.entry(name.clone()).or_insert_with(new);
        if line.desired_revision != entry.revision {
            *line = DeploymentStatus { container: line.container.take(), restarts: line.restarts, ..new() };
        }
    }
}

/// As podman prints ids.
pub(crate) fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

/// The last events, and how many there were.
#[derive(Debug, Default)]
pub struct Events {
    ring: VecDeque<Event>,
    count: u64,
}

impl Events {
    /// Something happened. Said again and again, it is in the ring once, as it was said last.
    pub fn push(&mut self, what: &str) {
        self.count += 1;
        let repeats = self.ring.back().is_some_and(|last| last.what == shortened(what));
        if !repeats {
            tracing::info!("{what}");
        }
        let what = shortened(what);
        self.ring.retain(|event| event.what != what);
        if self.ring.len() == MAX_EVENTS {
            self.ring.pop_front();
        }
        // A procfs that cannot be read is told by the status itself.
        let uptime_seconds = uptime_seconds().unwrap_or(0);
        self.ring.push_back(Event { uptime_seconds, number: self.count, what });
    }

    /// Oldest first.
    pub fn list(&self) -> Vec<Event> {
        self.ring.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Change, Operation, Update};

    #[test]
    fn without_podman_what_is_desired_is_told_all_the_same() {
        let mut desired = Desired::default();
        let put = |name: &str, revision, operation| Update { name: name.into(), revision, operation };
        desired.take(Change::Update(put("web", 1, Operation::Put("{}".into()))));
        let mut lines = BTreeMap::new();
        add_missing_lines(&mut lines, &desired);
        assert_eq!((lines["web"].phase, lines["web"].last_error.is_some()), (Phase::Pending, true));
        lines.get_mut("web").unwrap().restarts = 3;
        desired.take(Change::Update(put("web", 2, Operation::Delete)));
        add_missing_lines(&mut lines, &desired);
        let line = &lines["web"];
        assert_eq!((line.phase, line.desired_revision, line.restarts), (Phase::Removing, 2, 3));
    }

    #[test]
    fn the_ring_is_bounded_and_counts() {
        let mut events = Events::default();
        for number in 0..100 {
            events.push(&format!("event {number}"));
        }
        let list = events.list();
        assert_eq!((list.len(), list[0].what.as_str(), list[31].number), (MAX_EVENTS, "event 68", 100));
        events.push("event 70");
        let list = events.list();
        assert_eq!(list.len(), MAX_EVENTS);
        assert_eq!((list[31].what.as_str(), list[31].number), ("event 70", 101));
        assert_eq!(list.iter().filter(|event| event.what == "event 70").count(), 1);
    }
}
