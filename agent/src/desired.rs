//! What the fleet desires of this device, as far as it is known: pure. It is what [`crate::store`] keeps, so that a device that
//! boots without a bus knows what to run.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest;
use agent_protocol::deployment::{Document, Refusal};
use agent_protocol::is_name;

/// All of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Desired {
    /// The highest revision of the bucket that is in here.
    pub revision: u64,
    /// By name.
    pub deployments: BTreeMap<String, DesiredEntry>,
}

/// One deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DesiredEntry {
    /// The bucket's revision of this operation.
    pub revision: u64,
    /// On disk it is called `wish`.
    #[serde(rename = "wish")]
    pub operation: Operation,
    /// What this device made of it.
    pub applied: Option<Applied>,
}

/// What the fleet asks of a deployment: the operation of a KV entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// To run this document; what is no UTF-8 is refused anyhow, and is kept as far as it is.
    Put(String),
    /// To be gone, but for its volumes.
    Delete,
    /// To be forgotten.
    Purge,
}

/// What has been applied of a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Applied {
    /// The digest of the document.
    pub digest: String,
    /// The container that was made for it.
    pub container: String,
    /// In which boot it was started last.
    pub boot_id: String,
    /// Whether it has been seen to have ended as its restart policy allows. One that ran in an earlier boot and was not was cut
    /// off, whatever exit code podman shows for it (5.x: 0).
    pub completed: bool,
}

/// What the bus says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// All that the bucket holds for this device, markers of deletions included.
    Snapshot(Vec<Update>),
    /// One key.
    Update(Update),
}

/// One key's newest entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// The deployment: the key without the device.
    pub name: String,
    /// The bucket's revision.
    pub revision: u64,
    /// What it says.
    pub operation: Operation,
}

/// What is to be done about a deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Run this; the digest is the document's.
    Run(Document, String),
    /// It cannot be run.
    Refused(Refusal),
    /// No container, but its volumes.
    Removed,
    /// Nothing.
    Forgotten,
}

impl Desired {
    /// Takes in what the bus says; whether anything is new.
    pub fn take(&mut self, change: Change) -> bool {
        match change {
            Change::Update(update) => self.update(update),
            Change::Snapshot(updates) => self.replace(updates),
        }
    }

    fn update(&mut self, update: Update) -> bool {
        if self.deployments.get(&update.name).is_some_and(|known| known.revision >= update.revision) {
            return false;
        }
        self.revision = self.revision.max(update.revision);
        self.put(update);
        true
    }

    /// A whole reading counts as it is, also where its revisions are lower: the bucket may have been made anew.
    fn replace(&mut self, updates: Vec<Update>) -> bool {
        let before = self.clone();
        self.revision = updates.iter().map(|update| update.revision).max().unwrap_or(0);
        let named: std::collections::BTreeSet<_> = updates.iter().map(|update| update.name.clone()).collect();
        for (name, entry) in &mut self.deployments {
            if !named.contains(name) {
                if matches!(entry.operation, Operation::Put(_)) {
                    entry.operation = Operation::Delete;
                }
                // A bucket that was made anew counts from 1 again, and what is put there next must not look old.
                entry.revision = entry.revision.min(self.revision);
            }
        }
        for update in updates {
            let same = |known: &DesiredEntry| {
                known.revision == update.revision && known.operation == update.operation
            };
            if !self.deployments.get(&update.name).is_some_and(same) {
                self.put(update);
            }
        }
        *self != before
    }

    fn put(&mut self, update: Update) {
        let Update { name, revision, operation } = update;
        // What ran for the document of before is what the next one finds.
        let applied = self.deployments.get(&name).and_then(|known| known.applied.clone());
        self.deployments.insert(name, DesiredEntry { revision, operation, applied });
    }

    /// Notes what has been applied of a deployment; whether that is news.
    pub fn note_applied(&mut self, name: &str, applied: Option<Applied>) -> bool {
        match self.deployments.get_mut(name) {
            Some(entry) if entry.applied != applied => {
                entry.applied = applied;
                true
            }
            _ => false,
        }
    }

    /// Its container runs in this boot, for the document of this digest.
    pub fn started(&mut self, name: &str, digest: &str, container: &str, boot_id: &str) -> bool {
        let (digest, container, boot_id) = (digest.to_owned(), container.to_owned(), boot_id.to_owned());
        self.note_applied(name, Some(Applied { digest, container, boot_id, completed: false }))
    }

    /// Its container has ended as its restart policy allows.
    pub fn completed(&mut self, name: &str, container: Option<&str>) -> bool {
        let applied = self.deployments.get(name).and_then(|entry| entry.applied.clone());
        let own = |applied: &Applied| Some(applied.container.as_str()) == container;
        applied
            .filter(own)
            .is_some_and(|applied| self.note_applied(name, Some(Applied { completed: true, ..applied })))
    }

    /// A purged deployment of which nothing is left.
    pub fn forget(&mut self, name: &str) {
        self.deployments.remove(name);
    }
}

impl DesiredEntry {
    /// What follows from the operation for the deployment `name`.
    pub fn target(&self, name: &str) -> Target {
        match &self.operation {
            Operation::Delete => Target::Removed,
            Operation::Purge => Target::Forgotten,
            Operation::Put(_) if !is_name(name) => Target::Refused(Refusal(format!(
                "{name:?} is no name: up to 63 letters, digits, '-' and '_'"
            ))),
            Operation::Put(text) => match Document::parse(text.as_bytes()) {
                // Of the document as it is understood: another order of its fields is no other document.
                Ok(document) => {
                    let digest = digest::of_bytes(&document.to_bytes());
                    Target::Run(document, digest)
                }
                Err(refusal) => Target::Refused(refusal),
            },
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
    fn put_delete_and_purge_are_three_things() {
        let mut desired = Desired::default();
        assert!(desired.take(Change::Update(put("web", 3, "a"))));
        assert_eq!((desired.revision, operation_of(&desired, "web")), (3, &Operation::Put("a".into())));
        assert!(!desired.take(Change::Update(put("web", 3, "old"))), "nothing new");
        assert!(!desired.take(Change::Update(put("web", 2, "older"))));
        for (revision, operation, target) in
            [(4, Operation::Delete, Target::Removed), (5, Operation::Purge, Target::Forgotten)]
        {
            let update = Update { name: "web".into(), revision, operation: operation.clone() };
            assert!(desired.take(Change::Update(update)));
            assert_eq!(operation_of(&desired, "web"), &operation);
            assert_eq!(desired.deployments["web"].target("web"), target);
        }
        desired.forget("web");
        assert!(desired.deployments.is_empty());
    }

    #[test]
    fn a_whole_reading_counts_as_it_is() {
        let mut desired = Desired::default();
        desired.take(Change::Snapshot(vec![put("a", 10, "x"), put("b", 11, "y")]));
        assert_eq!(desired.revision, 11);
        assert!(
            !desired.take(Change::Snapshot(vec![put("a", 10, "x"), put("b", 11, "y")])),
            "the same again"
        );
        // A bucket made anew begins at 1, and no longer names b.
        assert!(desired.take(Change::Snapshot(vec![put("a", 1, "z")])));
        assert_eq!((desired.revision, operation_of(&desired, "a")), (1, &Operation::Put("z".into())));
        assert_eq!(operation_of(&desired, "b"), &Operation::Delete);
        assert!(desired.take(Change::Snapshot(Vec::new())), "an empty bucket desires nothing");
        assert_eq!(operation_of(&desired, "a"), &Operation::Delete);
        assert!(desired.take(Change::Update(put("b", 2, "y"))), "what the new bucket says of b is newer");
        assert_eq!(operation_of(&desired, "b"), &Operation::Put("y".into()));
    }

    #[test]
    fn what_was_applied_outlives_a_new_wish() {
        let mut desired = Desired::default();
        desired.take(Change::Update(put("web", 1, "a")));
        let applied =
            Applied { digest: "d".into(), container: "c".into(), boot_id: "b".into(), completed: false };
        desired.deployments.get_mut("web").unwrap().applied = Some(applied.clone());
        desired.take(Change::Update(put("web", 2, "b")));
        assert_eq!(desired.deployments["web"].applied, Some(applied));
    }

    #[test]
    fn what_ended_is_noted_of_the_container_that_was_started() {
        let mut desired = Desired::default();
        desired.take(Change::Update(put("web", 1, "a")));
        assert!(!desired.completed("web", Some("c1")), "nothing was started");
        assert!(desired.started("web", "d", "c1", "b"));
        assert!(!desired.started("web", "d", "c1", "b"), "no news");
        assert!(!desired.completed("web", Some("c2")), "another one's end");
        assert!(desired.completed("web", Some("c1")) && !desired.completed("web", Some("c1")));
        assert!(!desired.started("other", "d", "c1", "b"));
    }

    #[test]
    fn a_target_follows_from_the_document_and_the_name() {
        let text = r#"{"kind":"podman-container","version":1,"spec":{"image":"localhost/a:1"}}"#;
        let entry =
            |text: &str| DesiredEntry { revision: 1, operation: Operation::Put(text.into()), applied: None };
        let Target::Run(_, digest) = entry(text).target("web") else { panic!() };
        let other = r#"{ "version": 1, "spec": {"image": "localhost/a:1"}, "kind": "podman-container"}"#;
        assert!(
            matches!(entry(other).target("web"), Target::Run(_, same) if same == digest),
            "only the order is another"
        );
        assert!(
            matches!(entry(text).target("a.b"), Target::Refused(why) if why.0.contains("\"a.b\" is no name"))
        );
        assert!(matches!(entry("{}").target("web"), Target::Refused(_)));
    }
}
