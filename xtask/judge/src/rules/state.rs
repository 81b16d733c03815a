//! The agent's state: whole, no older than what was acknowledged, no newer than what was sent, and with the documents of
//! its revision.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use iot_agent::store::{PREVIOUS_STATE, Problem, STATE, Store};

use super::{Case, STATE_DIRECTORY};
use crate::Rule;
use crate::files::Checked;
use crate::recording::{EventKind, Wish};

impl Case<'_> {
    pub(super) fn judge_state(&mut self) -> Checked<()> {
        let path = format!("{STATE_DIRECTORY}/{STATE}");
        let state = self.files.read(&path)?;
        let previous = self.files.read(&format!("{STATE_DIRECTORY}/{PREVIOUS_STATE}"))?;
        let store = Store::new(Path::new(STATE_DIRECTORY), &self.recording.device_id);
        let (found, problem) = store.choose(|name| {
            let content = if name == STATE { &state } else { &previous };
            content.clone().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
        });
        let next = match &found {
            Some(found) => format!("the agent falls back to revision {}", found.revision()),
            None => "the agent has no usable state".to_owned(),
        };
        let acknowledged = self.facts.acknowledged;
        let after = match acknowledged {
            Some(floor) => {
                format!(
                    "although the device acknowledged revision {} at entry {}",
                    floor.number, floor.position
                )
            }
            None => "although the agent syncs the file before it renames it".to_owned(),
        };
        let fault = match problem {
            Some(Problem::Unusable(reason)) => Some(format!("is not usable ({reason})")),
            Some(Problem::Missing) if acknowledged.is_some() || found.is_some() => {
                Some("is missing".to_owned())
            }
            _ => None,
        };
        if let Some(fault) = fault {
            self.lose(Rule::StateWhole, &path, format!("{path} {fault}, {after}; {next}."));
            return Ok(());
        }
        let Some(found) = found else { return Ok(()) };
        let revision = found.revision();
        if let Some(floor) = acknowledged.filter(|floor| revision < floor.number) {
            let (number, position) = (floor.number, floor.position);
            let text = format!(
                "{path} has revision {revision}, although the device acknowledged revision {number} at entry {position}."
            );
            self.lose(Rule::StateAcknowledged, &path, text);
        }
        if revision > self.facts.sent {
            let sent = self.facts.sent;
            let text = format!(
                "{path} has revision {revision}, although only revisions up to {sent} had been sent."
            );
            self.lose(Rule::StateNotAhead, &path, text);
            return Ok(());
        }
        let documents: BTreeMap<_, _> = found.documents().collect();
        for text in self.wrong_documents(revision, &documents) {
            self.lose(Rule::StateDocuments, &path, format!("{path} of revision {revision} {text}."));
        }
        Ok(())
    }

    /// Describes each deployment whose document is not the newest one up to `revision`.
    fn wrong_documents(&self, revision: u64, documents: &BTreeMap<&str, Option<&str>>) -> Vec<String> {
        let mut wishes: BTreeMap<&str, (u64, &Wish)> = BTreeMap::new();
        for event in &self.recording.events {
            if let EventKind::Desired { name, revision: of_wish, wish } = &event.kind
                && *of_wish <= revision
                && wishes.get(name.as_str()).is_none_or(|(known, _)| known < of_wish)
            {
                wishes.insert(name, (*of_wish, wish));
            }
        }
        let names: BTreeSet<_> = wishes.keys().chain(documents.keys()).copied().collect();
        let describe = |name: &str| {
            let stored = documents.get(name).copied().flatten();
            match (wishes.get(name), stored) {
                (Some((of_wish, Wish::Put(_))), None) => {
                    Some(format!("lacks the deployment {name}, which was put at revision {of_wish}"))
                }
                (Some((of_wish, Wish::Put(document))), Some(stored)) if document != stored => {
                    Some(format!("has a document of {name} that is not the one of revision {of_wish}"))
                }
                (Some((of_wish, Wish::Delete | Wish::Purge)), Some(_)) => {
                    Some(format!("has a document of {name}, which was deleted at revision {of_wish}"))
                }
                (None, Some(_)) => Some(format!("has a document of {name}, which had not been put")),
                _ => None,
            }
        };
        names.into_iter().filter_map(describe).collect()
    }
}
