//! Decides which part of a reading of the bucket the agent believes, without I/O.
//!
//! A broker can lose a stream, go back to an older one, or answer from a replica that lags behind. Therefore
//! only an explicit Delete or Purge removes something:
//!
//! - A Put is applied, even if its revision is lower than the known one.
//! - A Delete or a Purge is applied if its revision is above the known one. A stream that was recreated counts
//!   from 1 again. On such a stream, the bound is the last sequence number at its first reading.
//! - A deployment that a reading does not name goes on as an orphan ([`Orphaned`]).
//! - A Purge deletes volumes only if its revision is above all revisions of the deployment that the agent has
//!   seen in the stream. Otherwise it counts as a Delete.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::desired::{Change, Desired, DesiredEntry, Operation, Target, Update};

/// The stream of the bucket as the broker describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stream {
    /// The time at which the stream was created, in nanoseconds since 1970. It identifies the stream. After
    /// `nats stream restore`, nats-server 2.9 has the time of the original stream, and 2.15 the time of the restore.
    pub(crate) created: i64,
    /// The highest sequence number that the stream has assigned, for any device.
    pub(crate) last_sequence: u64,
}

/// The reason why a deployment goes on although the bucket does not name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Orphaned {
    /// The stream is the known one, and it has no entry of the deployment.
    Missing,
    /// The stream has gone back to a time before the known entry.
    Older,
    /// The stream was recreated, perhaps from a backup.
    Recreated,
}

impl Orphaned {
    /// Describes the reason, and how the deployment can be removed.
    pub(crate) fn describe(self, revision: u64) -> String {
        match self {
            Self::Missing => {
                "the bucket has lost its entry; the deployment goes on until it is put, deleted or purged".into()
            }
            Self::Recreated => {
                "the bucket was recreated or restored without it; the deployment goes on until it is put, deleted or \
                 purged"
                    .into()
            }
            Self::Older => format!(
                "the bucket is older than revision {revision}, like a restored backup; the deployment goes on until \
                 it is put, or is deleted or purged above revision {revision}"
            ),
        }
    }
}

/// The relation of a reading to the state that the agent knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Age {
    Current,
    Older,
    Recreated,
}

impl Age {
    fn orphaned(self) -> Orphaned {
        match self {
            Self::Current => Orphaned::Missing,
            Self::Older => Orphaned::Older,
            Self::Recreated => Orphaned::Recreated,
        }
    }
}

impl Desired {
    /// Applies a change. Returns whether anything is new. Documents are parsed and hashed only here.
    pub(crate) fn take(&mut self, change: Change) -> bool {
        match change {
            Change::Update(update) => self.update(update),
            Change::Snapshot(stream, updates) => {
                let before = self.clone();
                self.read(stream, updates);
                *self != before
            }
        }
    }

    /// Applies a reading of the whole bucket.
    fn read(&mut self, stream: Stream, updates: Vec<Update>) {
        let age = match self.stream {
            Some(created) if created != stream.created => Age::Recreated,
            // A state file of an earlier version does not name the stream.
            _ if stream.last_sequence < self.revision => Age::Older,
            _ => Age::Current,
        };
        self.stream = Some(stream.created);
        if age != Age::Current {
            self.purged = 0;
        }
        // A reading can contain several entries of a key. Only the newest one counts.
        let mut named = BTreeMap::new();
        for update in updates {
            let newest = named.entry(update.name.clone()).or_insert_with(|| update.clone());
            if newest.revision < update.revision {
                *newest = update;
            }
        }
        let highest = named.values().map(|update| update.revision).max().unwrap_or(0);
        self.revision = if age == Age::Current { highest.max(self.revision) } else { highest };
        for (name, entry) in &mut self.deployments {
            if !named.contains_key(name) {
                entry.orphan(age, stream);
            }
        }
        for update in named.into_values() {
            self.read_entry(age, stream, update);
        }
    }

    fn read_entry(&mut self, age: Age, stream: Stream, update: Update) {
        let Some(entry) = self.deployments.get_mut(&update.name) else {
            // A deletion of an unknown deployment removes nothing, so an uncertain one is ignored.
            let is_done = update.operation == Operation::Purge && update.revision <= self.purged;
            if age == Age::Current && !is_done || update.operation.runs() {
                self.put(update);
            }
            return;
        };
        let newer = age != Age::Recreated && update.revision > entry.revision;
        if entry.is_of(&update) {
            entry.orphaned = None;
        } else if newer || update.operation.runs() {
            self.put(update.clone());
        } else {
            let first = age == Age::Current && entry.orphaned.is_none();
            let doubt = if first { Age::Older } else { age };
            entry.orphan(doubt, stream);
            return;
        }
        if age == Age::Recreated
            && let Some(entry) = self.deployments.get_mut(&update.name)
        {
            // Revisions of the earlier stream say nothing about this one.
            entry.purge_above = if stream.last_sequence > entry.revision { stream.last_sequence } else { 0 };
        }
    }

    /// Applies a message that arrived after a reading. Returns whether anything is new.
    fn update(&mut self, update: Update) -> bool {
        let raised = update.revision > self.revision;
        self.revision = self.revision.max(update.revision);
        let Some(entry) = self.deployments.get_mut(&update.name) else {
            self.put(update);
            return true;
        };
        // The known revision belongs to an earlier history of the stream.
        let behind = matches!(entry.orphaned, Some(Orphaned::Older | Orphaned::Recreated));
        if entry.is_of(&update) {
            return entry.orphaned.take().is_some() || raised;
        }
        if update.revision > entry.revision || behind && update.operation.runs() {
            self.put(update);
            return true;
        }
        raised
    }

    /// Replaces the entry of a deployment.
    fn put(&mut self, Update { name, revision, mut operation }: Update) {
        let known = self.deployments.remove(&name);
        let highest = known.as_ref().map_or(0, |known| known.purge_above.max(known.revision));
        let purge_above = if highest > revision { highest } else { 0 };
        if operation == Operation::Purge && purge_above > 0 {
            operation = Operation::Delete;
        }
        let target = Target::of(&name, &operation);
        let entry = DesiredEntry { purge_above, ..DesiredEntry::after(known, revision, operation, target) };
        self.deployments.insert(name, entry);
    }
}

impl DesiredEntry {
    /// Returns whether the entry was made of this update. A Purge may have been applied as a Delete.
    fn is_of(&self, update: &Update) -> bool {
        let deletes = !self.operation.runs() && !update.operation.runs();
        self.revision == update.revision && (self.operation == update.operation || deletes)
    }

    /// Records that a reading does not name the deployment, or names only a deletion that is not believed.
    fn orphan(&mut self, age: Age, stream: Stream) {
        if age == Age::Recreated {
            // A deletion counts if it is newer than everything that the new stream had at its first reading.
            (self.revision, self.purge_above) = (stream.last_sequence, 0);
        }
        // The first reading after a loss sets the reason. A later reading of the same stream must not replace it by
        // `Missing`.
        if age != Age::Current || self.orphaned.is_none() {
            self.orphaned = Some(age.orphaned());
        }
    }

    /// Returns why the deployment goes on although the bucket does not name it, if that is the case.
    pub(crate) fn why_orphaned(&self) -> Option<String> {
        let orphaned = self.orphaned.filter(|_| self.operation.runs())?;
        Some(orphaned.describe(self.revision))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CREATED: i64 = 1_000;

    fn update(name: &str, revision: u64, operation: Operation) -> Update {
        Update { name: name.into(), revision, operation }
    }

    fn put(name: &str, revision: u64) -> Update {
        update(name, revision, Operation::Put("{}".into()))
    }

    fn reading<const N: usize>(created: i64, last_sequence: u64, updates: [Update; N]) -> Change {
        Change::Snapshot(Stream { created, last_sequence }, updates.into())
    }

    /// Returns a state with the deployments `web` at revision 90 and `gone`, deleted at revision 91.
    fn known() -> Desired {
        let mut desired = Desired::default();
        let gone = update("gone", 91, Operation::Delete);
        assert!(desired.take(reading(CREATED, 100, [put("web", 90), gone])));
        assert_eq!((desired.revision, desired.stream), (91, Some(CREATED)));
        desired
    }

    fn state_of(desired: &Desired, name: &str) -> (u64, Operation, Option<Orphaned>) {
        let entry = &desired.deployments[name];
        (entry.revision, entry.operation.clone(), entry.orphaned)
    }

    fn document() -> Operation {
        Operation::Put("{}".into())
    }

    #[test]
    fn a_reading_of_the_known_stream_is_believed_except_for_what_it_lacks() {
        let mut desired = known();
        let gone = update("gone", 91, Operation::Delete);
        assert!(!desired.take(reading(CREATED, 120, [put("web", 90), gone])), "the same again");
        assert!(desired.take(reading(CREATED, 120, [])), "an emptied bucket");
        assert_eq!(state_of(&desired, "web"), (90, document(), Some(Orphaned::Missing)));
        assert!(desired.deployments["web"].why_orphaned().unwrap().contains("has lost its entry"));
        assert_eq!(desired.deployments["gone"].why_orphaned(), None, "it does not run");
        assert_eq!(desired.revision, 91, "the stream has not gone back");
        assert!(!desired.take(reading(CREATED, 130, [])), "nothing new");
        assert!(desired.take(Change::Update(put("web", 90))), "half of the reading came later");
        assert_eq!(state_of(&desired, "web"), (90, document(), None));
        for operation in [Operation::Delete, Operation::Purge] {
            for change in [
                Change::Update(update("web", 131, operation.clone())),
                reading(CREATED, 131, [update("web", 131, operation.clone())]),
            ] {
                let mut desired = desired.clone();
                desired.take(reading(CREATED, 130, []));
                assert!(desired.take(change));
                assert_eq!(state_of(&desired, "web"), (131, operation.clone(), None));
            }
        }
    }

    #[test]
    fn a_purge_is_carried_out_once() {
        let mut desired = known();
        let purge = || update("web", 101, Operation::Purge);
        assert!(desired.take(Change::Update(purge())));
        assert_eq!(state_of(&desired, "web"), (101, Operation::Purge, None));
        desired.forget("web");
        desired.take(reading(CREATED, 101, [purge()]));
        assert!(!desired.deployments.contains_key("web"));
        assert!(!desired.take(reading(CREATED, 101, [purge()])), "nothing new");
        // A later Purge of another key may have to delete the volumes of a lost state.
        assert!(desired.take(reading(CREATED, 102, [purge(), update("db", 102, Operation::Purge)])));
        assert_eq!(state_of(&desired, "db"), (102, Operation::Purge, None));
        assert!(desired.take(reading(CREATED, 103, [put("web", 103)])));
        assert_eq!(state_of(&desired, "web"), (103, document(), None));
    }

    #[test]
    fn only_the_newest_entry_of_a_key_counts() {
        let mut desired = known();
        let purge = update("web", 95, Operation::Purge);
        desired.take(reading(CREATED, 120, [put("web", 90), put("web", 99), purge]));
        assert_eq!(state_of(&desired, "web"), (99, document(), None));
    }

    /// A backup was made while the deployment was purged. Later the deployment was put again, and filled its volume.
    #[test]
    fn an_old_deletion_of_a_restored_backup_removes_nothing() {
        for operation in [Operation::Delete, Operation::Purge] {
            let mut desired = known();
            assert!(desired.take(reading(CREATED, 50, [update("web", 10, operation.clone())])));
            assert_eq!(state_of(&desired, "web"), (90, document(), Some(Orphaned::Older)));
            assert!(desired.deployments["web"].why_orphaned().unwrap().contains("above revision 90"));
            // A replica that lags behind catches up.
            assert!(desired.take(Change::Update(update("web", 60, operation.clone()))), "acknowledged");
            assert_eq!(state_of(&desired, "web"), (90, document(), Some(Orphaned::Older)));
            assert!(!desired.take(reading(CREATED, 60, [update("web", 60, operation.clone())])));
            assert!(desired.take(Change::Update(update("web", 101, operation.clone()))));
            assert_eq!(state_of(&desired, "web"), (101, operation, None));
        }
    }

    #[test]
    fn a_put_of_an_older_stream_is_applied_and_its_purge_keeps_the_volumes() {
        let mut desired = known();
        desired.take(reading(CREATED, 50, [put("web", 20)]));
        assert_eq!((state_of(&desired, "web"), desired.revision), ((20, document(), None), 20));
        let mut orphan = known();
        orphan.take(reading(CREATED, 50, []));
        assert!(orphan.take(Change::Update(put("web", 51))));
        for mut desired in [desired, orphan] {
            let purge = update("web", 52, Operation::Purge);
            assert!(desired.take(Change::Update(purge.clone())));
            assert_eq!(state_of(&desired, "web"), (52, Operation::Delete, None));
            assert!(!desired.take(Change::Update(purge.clone())));
            assert!(!desired.take(reading(CREATED, 52, [purge])), "it is the entry that was applied");
            assert!(desired.take(Change::Update(update("web", 92, Operation::Purge))));
            assert_eq!(state_of(&desired, "web"), (92, Operation::Purge, None));
        }
    }

    #[test]
    fn a_new_stream_deletes_only_what_it_deletes_after_its_first_reading() {
        for operation in [Operation::Delete, Operation::Purge] {
            let mut desired = known();
            desired.take(Change::Update(put("kept", 99)));
            let marker = update("web", 2, operation.clone());
            let stranger = update("stranger", 4, Operation::Purge);
            assert!(desired.take(reading(CREATED + 1, 200, [marker.clone(), put("kept", 3), stranger])));
            assert_eq!((desired.revision, desired.stream), (4, Some(CREATED + 1)));
            assert_eq!(state_of(&desired, "web"), (200, document(), Some(Orphaned::Recreated)));
            assert_eq!(state_of(&desired, "kept"), (3, document(), None));
            assert!(!desired.deployments.contains_key("stranger"));
            let stored = serde_json::to_vec(&desired).unwrap();
            assert_eq!(serde_json::from_slice::<Desired>(&stored).unwrap(), desired);
            assert!(!desired.take(reading(CREATED + 1, 200, [marker, put("kept", 3)])));
            for name in ["web", "kept"] {
                assert!(desired.take(Change::Update(update(name, 201, operation.clone()))), "{name}");
                assert_eq!(state_of(&desired, name), (201, operation.clone(), None));
            }
            // The stream counts from 1 again, so this Put has a lower revision than the known deletion.
            assert!(desired.take(Change::Update(put("gone", 150))));
            assert_eq!(state_of(&desired, "gone"), (150, document(), None));
        }
    }

    #[test]
    fn a_state_without_an_identity_adopts_the_first_stream() {
        let mut desired = Desired { stream: None, ..known() };
        desired.take(reading(CREATED, 100, [update("web", 95, Operation::Purge)]));
        assert_eq!(
            state_of(&desired, "web"),
            (95, Operation::Purge, None),
            "purged while the device was off"
        );
        let mut desired = Desired { stream: None, ..known() };
        desired.take(reading(CREATED, 3, [update("web", 2, Operation::Purge)]));
        assert_eq!(state_of(&desired, "web"), (90, document(), Some(Orphaned::Older)));
    }
}
