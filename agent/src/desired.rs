//! The latest desired state of this device that the agent has received. This module does no I/O:
//! [`crate::store`] keeps the state on disk, so that a device can run its deployments if it boots while the
//! bus is away. [`crate::bucket`] decides which changes are applied.

use std::collections::BTreeMap;

use agent_protocol::{ContainerSpec, Deployment, Document, Refusal, is_name};
use serde::{Deserialize, Deserializer, Serialize};

use crate::bucket::{Orphaned, Stream};
use crate::digest;
use crate::succession::{Accepted, Previous, RolledBack};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Desired {
    /// The highest revision of the bucket that this state contains.
    pub(crate) revision: u64,
    /// The identity of the bucket's stream, [`Stream::created`]. State files of earlier agents do not
    /// have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stream: Option<i64>,
    /// The highest revision of a Delete or a Purge in this stream that was carried out completely, or if the stream was
    /// set back since then, its last revision at that time. The bucket keeps the markers up to this revision, and each
    /// reading contains them.
    #[serde(default, alias = "purged", skip_serializing_if = "is_zero")]
    pub(crate) settled: u64,
    /// The highest revision of a Delete in this stream whose entry was forgotten, also if the stream was set back since
    /// then. The volumes of the deployment may still exist.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) forgotten: u64,
    #[serde(deserialize_with = "entries_with_targets")]
    pub(crate) deployments: BTreeMap<String, DesiredEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DesiredEntry {
    /// The revision of the operation in the bucket.
    pub(crate) revision: u64,
    /// The operation, which the state file calls `wish`.
    #[serde(rename = "wish")]
    pub(crate) operation: Operation,
    /// The goal, which follows from the name and the operation. It is not stored but computed again when the
    /// state is read.
    #[serde(skip)]
    pub(crate) target: Target,
    /// The id of the image of `target`, if it follows a tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) image: Option<String>,
    /// The container of the current document.
    pub(crate) applied: Option<Applied>,
    /// Set if the bucket does not name the deployment although it was never deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) orphaned: Option<Orphaned>,
    /// The revision that a Purge must exceed to delete volumes, if it is higher than `revision`; otherwise 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) purge_above: u64,
    /// The current document, if it is not the one of `operation`, which was refused or rolled back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) accepted: Option<Accepted>,
    /// The document that runs again if the current one fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) previous: Option<Previous>,
    /// The last failure of the document of `operation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rolled_back: Option<RolledBack>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The operation of a KV entry (NATS ADR-8).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Operation {
    /// Run this document.
    Put(String),
    /// Refuse a document that is not UTF-8. The number is the offset of the first wrong byte.
    PutBinary(usize),
    /// Remove the container and keep the volumes.
    Delete,
    /// Remove the container and the volumes, and forget the deployment.
    Purge,
}

impl Operation {
    /// Returns whether this is a Put. All other operations remove the deployment.
    pub(crate) fn runs(&self) -> bool {
        matches!(self, Self::Put(_) | Self::PutBinary(_))
    }
}

/// The container that the agent has made and started for a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Applied {
    /// The digest of the document.
    pub(crate) digest: String,
    /// The id of the container that was made for the document.
    pub(crate) container: String,
    /// The id of the boot in which the container was started last.
    pub(crate) boot_id: String,
    /// True if the agent has seen that the container ended as its restart policy allows. If this is false and
    /// the container ran in an earlier boot, a power cut ended the container. podman's exit code is then
    /// meaningless (podman 5.x shows 0).
    pub(crate) completed: bool,
    /// True until the container has passed its probation.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(crate) unproven: bool,
    /// True if the agent has stopped the container for its successor. If the deployment is rolled back to this
    /// container, it is started again, whatever its restart policy says.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(crate) stopped: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A change of the desired state, as the bus reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// All entries of the bucket for this device, including deletion markers.
    Snapshot(Stream, Vec<Update>),
    Update(Update),
}

/// The newest entry of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Update {
    /// The deployment's name: the key without the device.
    pub(crate) name: String,
    pub(crate) revision: u64,
    pub(crate) operation: Operation,
}

/// The goal for a deployment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Target {
    /// A running container.
    Run {
        spec: ContainerSpec,
        /// The digest of the document, and also of `image` if there is one.
        digest: String,
        /// The id of the image, if the document follows a tag. It is unknown until the registry has been asked.
        image: Option<String>,
    },
    /// No container, since the document cannot be run.
    Refused(Refusal),
    /// No container and no entry; the volumes stay.
    #[default]
    Removed,
    /// No container, no volumes and no entry.
    Purged,
}

impl Target {
    pub(crate) fn of(name: &str, operation: &Operation) -> Self {
        let text = match operation {
            Operation::Delete => return Self::Removed,
            Operation::Purge => return Self::Purged,
            Operation::PutBinary(offset) => {
                let reason = format!("the document is not UTF-8 text: byte {offset} is wrong");
                return Self::Refused(Refusal(reason));
            }
            Operation::Put(text) => text,
        };
        if !is_name(name) {
            let reason = format!("{name:?} is not a valid name: use up to 63 letters, digits, '-' and '_'");
            return Self::Refused(Refusal(reason));
        }
        match Document::parse(text.as_bytes()) {
            Ok(document) => {
                // The digest of the parsed document does not depend on the order of the fields in the text.
                let digest = digest::of_bytes(&document.to_bytes());
                let Deployment::PodmanContainer(spec) = document.deployment;
                Self::Run { spec, digest, image: None }
            }
            Err(refusal) => Self::Refused(refusal),
        }
    }
}

fn entries_with_targets<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, DesiredEntry>, D::Error> {
    let mut entries = BTreeMap::<String, DesiredEntry>::deserialize(deserializer)?;
    for (name, entry) in &mut entries {
        entry.parse_documents(name);
    }
    Ok(entries)
}

impl DesiredEntry {
    /// Returns the record of the container of the document with this digest.
    pub(crate) fn applied_mut(&mut self, digest: &str) -> Option<&mut Applied> {
        let previous = self.previous.as_mut().map(|previous| &mut previous.applied);
        self.applied.iter_mut().chain(previous).find(|applied| applied.digest == digest)
    }

    /// Records the container of the current or of the previous document. Returns whether the record is new.
    fn note(&mut self, applied: Applied) -> bool {
        let previous = self.previous.as_mut().filter(|previous| previous.accepted.digest() == applied.digest);
        let record = match previous {
            Some(previous) => &mut previous.applied,
            None => return self.applied.replace(applied.clone()).is_none_or(|known| known != applied),
        };
        let is_new = *record != applied;
        *record = applied;
        is_new
    }
}

/// The readings with which `xtask/judge` compares a state on disk with the changes that the fleet has sent.
impl Desired {
    /// Returns the highest revision of the bucket that this state contains.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Returns the name of each deployment with its desired document. There is no document after a Delete or a Purge
    /// that is not carried out yet, or if the document is not UTF-8.
    pub fn documents(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        self.deployments.iter().map(|(name, entry)| match &entry.operation {
            Operation::Put(document) => (name.as_str(), Some(document.as_str())),
            _ => (name.as_str(), None),
        })
    }
}

impl Desired {
    /// Records that a deployment has no container any more. Returns whether this changed the state.
    pub(crate) fn note_gone(&mut self, name: &str) -> bool {
        self.deployments.get_mut(name).is_some_and(|entry| entry.applied.take().is_some())
    }

    /// Records that a container is about to be started. Returns whether this changed the state.
    pub(crate) fn starting(&mut self, name: &str, digest: &str, container: &str, boot_id: &str) -> bool {
        let Some(entry) = self.deployments.get_mut(name) else { return false };
        let (unproven, stopped) = match entry.applied_mut(digest) {
            Some(known) => (known.unproven, known.stopped && known.container == container),
            None => (true, false),
        };
        let (digest, container, boot_id) = (digest.to_owned(), container.to_owned(), boot_id.to_owned());
        entry.note(Applied { digest, container, boot_id, completed: false, unproven, stopped })
    }

    /// Records that a container was started. Returns whether this changed the state.
    pub(crate) fn started(&mut self, name: &str, digest: &str, container: &str, boot_id: &str) -> bool {
        let changed = self.starting(name, digest, container, boot_id);
        let applied = self.deployments.get_mut(name).and_then(|entry| entry.applied_mut(digest));
        applied.is_some_and(|applied| std::mem::take(&mut applied.stopped)) || changed
    }

    /// Records that a container has ended as its restart policy allows. Returns whether this changed the
    /// state.
    pub(crate) fn completed(&mut self, name: &str, digest: &str, container: &str) -> bool {
        let applied = self.deployments.get_mut(name).and_then(|entry| entry.applied_mut(digest));
        applied
            .filter(|applied| applied.container == container)
            .is_some_and(|applied| !std::mem::replace(&mut applied.completed, true))
    }

    /// Removes the entry of a deletion that was carried out completely: the deployment has no container any more, and
    /// after a Purge no volume. Without this, each name that was ever used would stay in the state and in the status.
    /// Of all such entries, two revisions remain.
    pub(crate) fn forget(&mut self, name: &str) {
        let Some(entry) = self.deployments.remove(name) else { return };
        // An orphaned deletion has a revision of an earlier history of the stream.
        if entry.orphaned.is_none() {
            self.settled = self.settled.max(entry.revision);
        }
        if entry.operation == Operation::Delete {
            self.forgotten = self.forgotten.max(entry.revision).max(entry.purge_above);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(name: &str, revision: u64, text: &str) -> Update {
        Update { name: name.into(), revision, operation: Operation::Put(text.into()) }
    }

    fn operation_of<'a>(desired: &'a Desired, name: &str) -> &'a Operation {
        &desired.deployments[name].operation
    }

    #[test]
    fn put_delete_and_purge_have_different_targets() {
        let mut desired = Desired::default();
        assert!(desired.take(Change::Update(put("web", 3, "a"))));
        assert_eq!((desired.revision, operation_of(&desired, "web")), (3, &Operation::Put("a".into())));
        assert!(!desired.take(Change::Update(put("web", 3, "old"))), "nothing new");
        assert!(!desired.take(Change::Update(put("web", 2, "older"))));
        for (revision, operation, target) in
            [(4, Operation::Delete, Target::Removed), (5, Operation::Purge, Target::Purged)]
        {
            let update = Update { name: "web".into(), revision, operation: operation.clone() };
            assert!(desired.take(Change::Update(update)));
            assert_eq!(operation_of(&desired, "web"), &operation);
            assert_eq!(desired.deployments["web"].target, target);
        }
        desired.forget("web");
        assert!(desired.deployments.is_empty());
    }

    #[test]
    fn short_lived_names_leave_nothing_in_the_state() {
        let mut desired = Desired::default();
        for number in 0..1000_u64 {
            let (name, revision) = (format!("job-{number}"), 1 + number * 2);
            assert!(desired.take(Change::Update(put(&name, revision, "a"))));
            let deleted = Update { name: name.clone(), revision: revision + 1, operation: Operation::Delete };
            assert!(desired.take(Change::Update(deleted)));
            desired.forget(&name);
        }
        assert_eq!((desired.revision, desired.settled), (2000, 2000));
        let size = serde_json::to_vec(&desired).unwrap().len();
        assert!(size < 100, "the state has {size} bytes");
    }

    #[test]
    fn what_was_applied_survives_a_new_operation() {
        let mut desired = Desired::default();
        desired.take(Change::Update(put("web", 1, "a")));
        let applied = Applied {
            digest: "d".into(),
            container: "c".into(),
            boot_id: "b".into(),
            completed: false,
            unproven: false,
            stopped: false,
        };
        desired.deployments.get_mut("web").unwrap().applied = Some(applied.clone());
        desired.take(Change::Update(put("web", 2, "b")));
        assert_eq!(desired.deployments["web"].applied, Some(applied));
    }

    #[test]
    fn an_end_is_noted_only_for_the_container_that_was_started() {
        let mut desired = Desired::default();
        desired.take(Change::Update(put("web", 1, "a")));
        assert!(!desired.completed("web", "d", "c1"), "nothing was started");
        assert!(desired.started("web", "d", "c1", "b"));
        assert!(!desired.started("web", "d", "c1", "b"), "nothing new");
        assert!(!desired.completed("web", "d", "c2"), "another container ended");
        assert!(desired.completed("web", "d", "c1") && !desired.completed("web", "d", "c1"));
        assert!(!desired.started("other", "d", "c1", "b"));
    }

    #[test]
    fn a_target_follows_from_the_document_and_the_name() {
        let text = r#"{"kind":"podman-container","version":1,"spec":{"image":"localhost/a:1"}}"#;
        let target = |name: &str, text: &str| Target::of(name, &Operation::Put(text.into()));
        let Target::Run { digest, .. } = target("web", text) else { panic!() };
        let other = r#"{ "version": 1, "spec": {"image": "localhost/a:1"}, "kind": "podman-container"}"#;
        assert!(
            matches!(target("web", other), Target::Run { digest: same, .. } if same == digest),
            "only the order of the fields differs"
        );
        assert!(
            matches!(target("a.b", text), Target::Refused(why) if why.0.contains("\"a.b\" is not a valid name"))
        );
        assert!(matches!(target("web", "{}"), Target::Refused(_)));
    }

    /// Checks that the form on disk is the one that earlier versions of the agent wrote.
    #[test]
    fn the_form_on_disk_has_no_target_and_gets_it_back() {
        let text = r#"{"kind":"podman-container","version":1,"spec":{"image":"localhost/a:1"}}"#;
        let mut desired = Desired::default();
        desired.take(Change::Update(put("web", 7, text)));
        let json = serde_json::to_value(&desired).unwrap();
        let expected = serde_json::json!({ "revision": 7, "deployments": {
            "web": { "revision": 7, "wish": { "put": text }, "applied": null }
        }});
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_value::<Desired>(json).unwrap(), desired);
        // The record of a container, as earlier versions wrote it.
        let json = serde_json::json!({ "revision": 7, "deployments": { "web": { "revision": 7, "wish": { "put": text },
            "applied": { "digest": "d", "container": "c", "boot_id": "b", "completed": false } } } });
        let old: Desired = serde_json::from_value(json.clone()).unwrap();
        assert!(!old.deployments["web"].applied.as_ref().unwrap().unproven, "it was in use before");
        assert_eq!(serde_json::to_value(&old).unwrap(), json);
    }
}
