//! One deployment, with the documents and the containers that its next step depends on.

use crate::desired::{Applied, DesiredEntry, Target};
use crate::plan::{container_name, has_digest};
use crate::podman::ListedContainer;
use crate::succession::Previous;

/// A deployment as the reconciler processes it: its documents, and podman's containers for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ManagedDeployment {
    pub(crate) name: String,
    /// The revision, in the bucket, of the latest operation.
    pub(crate) revision: u64,
    /// The revision of the operation that gives `target`. It is lower than `revision` if the latest document
    /// was refused or rolled back.
    pub(crate) target_revision: u64,
    pub(crate) target: Target,
    /// The container of `target`.
    pub(crate) applied: Option<Applied>,
    /// The document that runs again if `target` fails.
    pub(crate) previous: Option<Previous>,
    pub(crate) verdict: Verdict,
    pub(crate) role: Role,
    pub(crate) containers: Vec<ListedContainer>,
    /// The bytes of the image that have been downloaded, while a download runs.
    pub(crate) downloaded_bytes: Option<u64>,
}

/// The agent's verdict on the latest document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accepted,
    Refused(String),
    RolledBack(String),
}

/// The document of a deployment that the steps are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    #[default]
    Current,
    /// The previous document, while the container of the current one cannot be created yet.
    Previous,
}

impl ManagedDeployment {
    /// Returns a deployment without its containers, which are not known yet.
    pub(crate) fn new(name: &str, entry: &DesiredEntry) -> Self {
        let (target_revision, target) = entry.current();
        let verdict = match (&entry.target, entry.failure()) {
            (Target::Refused(refusal), _) => Verdict::Refused(refusal.0.clone()),
            (_, Some(failure)) => Verdict::RolledBack(failure.reason.clone()),
            (_, None) => Verdict::Accepted,
        };
        Self {
            name: name.to_owned(),
            revision: entry.revision,
            target_revision,
            target: target.clone(),
            applied: entry.applied.clone(),
            previous: entry.previous.clone(),
            verdict,
            role: Role::Current,
            containers: Vec::new(),
            downloaded_bytes: None,
        }
    }

    /// Returns the previous document as a deployment of its own, if the current document has no container and
    /// nothing else runs. The container of a document that was replaced on its probation may still run.
    pub(crate) fn waiting_previous(&self) -> Option<Self> {
        let previous = self.previous.clone()?;
        let waits = |container: &ListedContainer| {
            has_digest(container, Some(previous.accepted.digest()))
                || container.state != "running" && !has_digest(container, self.target.digest())
        };
        self.containers.iter().all(waits).then(|| Self {
            target_revision: previous.accepted.revision,
            target: previous.accepted.target,
            applied: Some(previous.applied),
            previous: None,
            role: Role::Previous,
            ..self.clone()
        })
    }

    /// Returns the deployment with the records of `entry`, after a step has changed them.
    pub(crate) fn refreshed(&self, entry: &DesiredEntry) -> Self {
        let new = Self { containers: self.containers.clone(), ..Self::new(&self.name, entry) };
        match self.role {
            Role::Current => new,
            Role::Previous => new.waiting_previous().unwrap_or(new),
        }
    }

    /// Returns the container that the status shows: the one that runs, or else the one with the proper name.
    pub(crate) fn shown_container(&self, device_id: &str) -> Option<&ListedContainer> {
        let proper = container_name(device_id, &self.name);
        let named = |container: &&ListedContainer| container.names.first() == Some(&proper);
        let runs = |container: &&ListedContainer| container.state == "running";
        let containers = &self.containers;
        containers.iter().find(runs).or_else(|| containers.iter().find(named)).or(containers.first())
    }

    /// Returns the revision of the document for which a container was made, if it is not the latest one.
    pub(crate) fn running_revision(&self, container: &ListedContainer) -> Option<u64> {
        let previous = self.previous.as_ref().map(|previous| &previous.accepted);
        let revision = if has_digest(container, self.target.digest()) {
            Some(self.target_revision)
        } else {
            previous.filter(|accepted| has_digest(container, Some(accepted.digest()))).map(|it| it.revision)
        };
        revision.filter(|revision| *revision != self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Change, Desired, Operation, Update};
    use crate::plan::DIGEST_LABEL;

    #[test]
    fn a_replaced_document_runs_until_its_successor_is_made() {
        let mut desired = Desired::default();
        let mut digests = Vec::new();
        for revision in 1..=3 {
            let text = format!(
                r#"{{"version":1,"kind":"podman-container","spec":{{"image":"localhost/a:{revision}"}}}}"#
            );
            let operation = Operation::Put(text);
            desired.take(Change::Update(Update { name: "web".into(), revision, operation }));
            let digest = desired.deployments["web"].target.digest().unwrap().to_owned();
            desired.started("web", &digest, "c", "b");
            if revision == 1 {
                desired.prove("web", &digest);
            }
            digests.push(digest);
        }
        let listed = |state: &str, digest: &String| ListedContainer {
            state: state.into(),
            labels: [(DIGEST_LABEL.to_owned(), digest.clone())].into(),
            ..ListedContainer::default()
        };
        let waits = |containers| {
            let new = ManagedDeployment::new("web", &desired.deployments["web"]);
            let waiting = ManagedDeployment { containers, ..new }.waiting_previous();
            waiting.map(|previous| previous.target_revision)
        };
        let [first, second, third] = &digests[..] else { panic!() };
        assert_eq!(waits(vec![listed("exited", first), listed("running", second)]), None);
        assert_eq!(waits(vec![listed("exited", first), listed("exited", second)]), Some(1));
        assert_eq!(waits(vec![listed("running", first)]), Some(1));
        assert_eq!(waits(vec![listed("running", first), listed("created", third)]), None);
    }
}
