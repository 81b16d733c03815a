//! The agent's report about its deployments: the lines of the status and the latest events.

use std::collections::{BTreeMap, VecDeque};

use agent_protocol::status::{MAX_EVENTS, MAX_EVENTS_TEXT, shortened};
use agent_protocol::{DeploymentStatus, Event, ObservedContainer, Phase};
use serde::{Deserialize, Serialize};

use crate::backoff::Backoff;
use crate::desired::{Desired, DesiredEntry, Target};
use crate::host::uptime_seconds;
use crate::managed::{ManagedDeployment, Verdict};
use crate::plan;

/// The part of the status that the reconciler provides. The fields are those of
/// [`agent_protocol::DeviceStatus`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DeviceState {
    pub(crate) desired_revision: u64,
    pub(crate) foreign_containers: u32,
    pub(crate) deployments: Vec<DeploymentStatus>,
    pub(crate) events: Vec<Event>,
}

/// The connection to the bus, for the local status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Connection {
    pub(crate) connected: bool,
    /// The reason why the agent is not connected.
    pub(crate) error: Option<String>,
    /// The reason why the agent does not follow the desired state although it is connected.
    #[serde(default)]
    pub(crate) following_error: Option<String>,
}

/// Builds a deployment's line of the status.
pub(crate) fn status_line(
    device_id: &str,
    deployment: &ManagedDeployment,
    phase: Phase,
    backoff: &Backoff,
) -> DeploymentStatus {
    let container = deployment.shown_container(device_id);
    let is_running = matches!(deployment.target, Target::Run { .. });
    DeploymentStatus {
        name: deployment.name.clone(),
        desired_revision: deployment.revision,
        phase: match (phase, &deployment.verdict) {
            (Phase::BackingOff | Phase::Pending, Verdict::Accepted) if !is_running => Phase::Removing,
            (Phase::Pending, _) => phase,
            (_, Verdict::Refused(_)) => Phase::Refused,
            (_, Verdict::RolledBack(_)) => Phase::RolledBack,
            (_, Verdict::Accepted) => phase,
        },
        running_revision: container.and_then(|container| deployment.running_revision(container)),
        container: container.map(|container| ObservedContainer {
            id: short_id(&container.id),
            state: container.state.clone(),
            image: container.image_id.clone(),
            // After a power cut, the exit code is meaningless.
            exit_code: (plan::has_ended(container) && phase != Phase::Lost).then_some(container.exit_code),
        }),
        missing_limits: container
            .and_then(|container| container.labels.get(plan::UNLIMITED_LABEL).cloned())
            .into_iter()
            .collect(),
        downloaded_bytes: deployment.downloaded_bytes,
        last_error: match (&deployment.verdict, &backoff.last_error) {
            (Verdict::Accepted, error) => error.clone(),
            // The document that runs in place of the latest one may be in trouble, too.
            (Verdict::Refused(reason) | Verdict::RolledBack(reason), Some(error)) if is_running => {
                let revision = deployment.target_revision;
                Some(shortened(&format!("{reason}; revision {revision}: {error}")))
            }
            (Verdict::Refused(reason) | Verdict::RolledBack(reason), _) => Some(reason.clone()),
        },
        restarts: backoff.restarts,
    }
}

/// Reports that a deployment goes on although the bucket does not name it. An error of the deployment itself is
/// reported first, since it needs an action on its own.
pub(crate) fn tell_orphaned(line: &mut DeploymentStatus, entry: &DesiredEntry) {
    match (line.phase, entry.why_orphaned()) {
        (Phase::Running | Phase::Completed | Phase::Orphaned, Some(why)) => {
            (line.phase, line.last_error) = (Phase::Orphaned, Some(why));
        }
        (Phase::Orphaned, None) => {
            let runs = line.container.as_ref().is_some_and(|container| container.state == "running");
            line.phase = if runs { Phase::Running } else { Phase::Completed };
            line.last_error = None;
        }
        _ => {}
    }
}

/// Adds a line for each deployment that podman has not been asked about yet.
pub(crate) fn add_missing_lines(lines: &mut BTreeMap<String, DeploymentStatus>, desired: &Desired) {
    for (name, entry) in &desired.deployments {
        // Without containers, the device's id is not needed.
        let new =
            || status_line("", &ManagedDeployment::new(name, entry), Phase::Pending, &Backoff::default());
        let line = lines.entry(name.clone()).or_insert_with(new);
        if line.desired_revision != entry.revision {
            let (container, restarts) = (line.container.take(), line.restarts);
            let revision = line.running_revision.unwrap_or(line.desired_revision);
            let running_revision = container.is_some().then_some(revision);
            *line = DeploymentStatus { container, running_revision, restarts, ..new() };
        }
        tell_orphaned(line, entry);
    }
}

/// Returns the first 12 characters of an id, as podman prints them.
pub(crate) fn short_id(id: &str) -> String {
    id.chars().take(12).collect()
}

/// The latest events, and the count of all events.
#[derive(Debug, Default)]
pub(crate) struct Events {
    ring: VecDeque<Event>,
    count: u64,
}

impl Events {
    /// Adds an event. If the list already has an event with the same text, the older one is removed. The
    /// event is logged unless its text equals that of the latest event.
    pub(crate) fn push(&mut self, what: &str) {
        self.count += 1;
        let repeats = self.ring.back().is_some_and(|last| last.what == shortened(what));
        if !repeats {
            tracing::info!("{what}");
        }
        let what = shortened(what);
        self.ring.retain(|event| event.what != what);
        // If procfs cannot be read, the status itself reports that.
        let uptime_seconds = uptime_seconds().unwrap_or(0);
        self.ring.push_back(Event { uptime_seconds, number: self.count, what });
        let is_too_long = |ring: &VecDeque<Event>| {
            ring.len() > MAX_EVENTS
                || ring.iter().map(|event| event.what.len()).sum::<usize>() > MAX_EVENTS_TEXT
        };
        while is_too_long(&self.ring) {
            self.ring.pop_front();
        }
    }

    /// Returns the events, oldest first.
    pub(crate) fn list(&self) -> Vec<Event> {
        self.ring.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bucket::Orphaned;
    use crate::desired::{Change, Operation, Update};
    use crate::podman::ListedContainer;
    use agent_protocol::status::MAX_TEXT;

    #[test]
    fn without_podman_the_desired_deployments_are_reported() {
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
    fn an_orphan_is_reported_until_the_bucket_names_it_again() {
        let mut desired = Desired::default();
        desired.take(Change::Update(Update {
            name: "web".into(),
            revision: 1,
            operation: Operation::Put("{}".into()),
        }));
        let mut lines = BTreeMap::new();
        add_missing_lines(&mut lines, &desired);
        let line = lines.get_mut("web").unwrap();
        let container = ObservedContainer {
            id: "c".into(),
            state: "running".into(),
            exit_code: None,
            image: String::new(),
        };
        (line.phase, line.container, line.last_error) = (Phase::Running, Some(container), None);
        for (orphaned, phase) in [(Some(Orphaned::Missing), Phase::Orphaned), (None, Phase::Running)] {
            desired.deployments.get_mut("web").unwrap().orphaned = orphaned;
            add_missing_lines(&mut lines, &desired);
            let line = &lines["web"];
            assert_eq!((line.phase, line.last_error.is_some()), (phase, orphaned.is_some()));
        }
        // An error of the deployment itself stays.
        lines.get_mut("web").unwrap().phase = Phase::BackingOff;
        desired.deployments.get_mut("web").unwrap().orphaned = Some(Orphaned::Missing);
        add_missing_lines(&mut lines, &desired);
        assert_eq!(lines["web"].phase, Phase::BackingOff);
    }

    #[test]
    fn a_document_that_does_not_run_is_reported_with_the_one_that_does() {
        let mut desired = Desired::default();
        let mut take = |revision, text: &str| {
            let operation = Operation::Put(text.into());
            desired.take(Change::Update(Update { name: "web".into(), revision, operation }));
            desired.deployments["web"].clone()
        };
        let good = take(1, r#"{"version":1,"kind":"podman-container","spec":{"image":"localhost/a:1"}}"#);
        let entry = take(2, "{");
        let digest = good.target.digest().unwrap().to_owned();
        let container = ListedContainer {
            id: "c1".into(),
            state: "running".into(),
            labels: [(plan::DIGEST_LABEL, digest), (plan::UNLIMITED_LABEL, "memory".to_owned())]
                .map(|(name, value)| (name.to_owned(), value))
                .into(),
            ..ListedContainer::default()
        };
        let new = ManagedDeployment::new("web", &entry);
        let deployment = ManagedDeployment { containers: vec![container], ..new };
        let line = |phase, backoff: &Backoff| status_line("pi-7", &deployment, phase, backoff);
        let refused = line(Phase::Running, &Backoff::default());
        assert_eq!((refused.phase, refused.desired_revision), (Phase::Refused, 2));
        assert_eq!((refused.running_revision, refused.container.unwrap().id.as_str()), (Some(1), "c1"));
        assert!(refused.last_error.unwrap().starts_with("the document is not JSON"));
        assert_eq!(refused.missing_limits, ["memory"]);
        let mut troubled = Backoff::default();
        troubled.last_error = Some("no image".into());
        let troubled = line(Phase::BackingOff, &troubled);
        assert_eq!(troubled.phase, Phase::Refused);
        assert!(troubled.last_error.unwrap().ends_with("; revision 1: no image"));
    }

    #[test]
    fn the_ring_is_bounded_and_numbers_its_events() {
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
        for number in 0..100 {
            events.push(&format!("{number} {}", "x".repeat(500)));
        }
        let list = events.list();
        assert_eq!((list.len(), list.last().unwrap().number), (MAX_EVENTS_TEXT / MAX_TEXT, 201));
    }
}
