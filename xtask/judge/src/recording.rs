//! The recording of a run: the events, each with its place in the log of the disk's writes, and the files that the
//! installer brings.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::installation::InstalledFile;

/// Everything that the judgement needs to know about a run, except for the content of large files
/// ([`crate::Judge::new`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recording {
    /// The device id in the agent's configuration.
    pub device_id: String,
    /// The agent's executables that were installed: the SHA-256 in lower-case hex, and a description such as "the agent
    /// under test".
    pub executables: BTreeMap<String, String>,
    /// The files that each installation brings ([`crate::installed_files`]).
    pub files: Vec<InstalledFile>,
    /// The files of images: for each reference, the path in the image without a leading slash, and the SHA-256.
    pub images: BTreeMap<String, BTreeMap<String, String>>,
    /// The events in the order in which they happened.
    pub events: Vec<Event>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The number of entries that the log of the disk's writes had when the event was seen.
    pub position: usize,
    #[serde(flatten)]
    pub kind: EventKind,
}

/// An event. A state of the disk at a point of the log contains only writes before that point. An *intention* is recorded
/// before it takes effect: a state at a point above its position may show it, and no other state may. An
/// *acknowledgement* is recorded after it was received: each state at its position or above must agree with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// An intention: the entry of a deployment in the bucket is about to get this revision.
    Desired { name: String, revision: u64, wish: Wish },
    /// The device has reported this revision of the desired state.
    Acknowledged { revision: u64 },
    /// An intention: install.sh of a bundle with this executable begins.
    InstallBegan { sha256: String },
    /// The installation that began last has succeeded.
    Installed { sha256: String },
    /// The workload of a deployment has answered. It syncs the number of its starts before it answers.
    Answered { deployment: String, generation: u64, starts: u64 },
    /// The agent has reported that podman has the image, or that a deployment with the image runs.
    Loaded { reference: String },
}

/// The operation of an entry in the bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wish {
    /// Run this document.
    Put(String),
    /// Remove the container and keep the volumes.
    Delete,
    /// Remove the container and the volumes.
    Purge,
}

impl Wish {
    pub fn document(&self) -> Option<&str> {
        match self {
            Self::Put(document) => Some(document),
            Self::Delete | Self::Purge => None,
        }
    }
}
