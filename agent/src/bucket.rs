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
//!   seen in the stream. Otherwise it counts as a Delete. At the first entries that an agent without a state
//!   gets, each Purge counts as a Delete.
//! - A deletion that was carried out leaves no entry. [`Desired::settled`] is the bound for the markers of such
//!   deletions, and [`Desired::forgotten`] takes the place of the forgotten revisions for a Purge.

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
        let has_state = self.has_entries();
        self.stream = Some(stream.created);
        if age != Age::Current {
            // The deletions in a stream that was set back are not believed, unless they come after its first reading.
            self.settled = stream.last_sequence;
        }
        if age == Age::Recreated && self.forgotten > 0 {
            self.forgotten = stream.last_sequence;
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
        for mut update in named.into_values() {
            if !has_state && update.operation == Operation::Purge {
                update.operation = Operation::Delete;
            }
            self.read_entry(age, stream, update);
        }
    }

    fn read_entry(&mut self, age: Age, stream: Stream, update: Update) {
        let Some(entry) = self.deployments.get_mut(&update.name) else {
            if update.operation.runs() || update.revision > self.settled {
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
    fn update(&mut self, mut update: Update) -> bool {
        if !self.has_entries() && update.operation == Operation::Purge {
            update.operation = Operation::Delete;
        }
        let raised = update.revision > self.revision;
        self.revision = self.revision.max(update.revision);
        let Some(entry) = self.deployments.get_mut(&update.name) else {
            // Entries of the reading can come after its end (nats-server#4824).
            let is_settled = !update.operation.runs() && update.revision <= self.settled;
            if !is_settled {
                self.put(update);
            }
            return !is_settled || raised;
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

    /// Returns whether the state has or had an entry. The first reading of an agent without a state can be of a bucket
    /// that is empty or that the broker delivers in two parts.
    fn has_entries(&self) -> bool {
        self.revision > 0 || !self.deployments.is_empty()
    }

    /// Replaces the entry of a deployment.
    fn put(&mut self, Update { name, revision, mut operation }: Update) {
        let known = self.deployments.remove(&name);
        let highest = known.as_ref().map_or(self.forgotten, |known| known.purge_above.max(known.revision));
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
mod tests;
