//! The judgement of a device's file system after a power cut: what the device had acknowledged and is lost,
//! and which files have a content that they never had.
//!
//! A [`Recording`] has the events of a run, each with its place in the log of the disk's writes. The [`Judge`] reads the
//! file system of a state of the disk, and compares it with what the events demand. It calls the agent's own code to read
//! the agent's files. `xtask-judge` neither makes states of a disk nor boots them.

mod facts;
mod files;
mod installation;
mod recording;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use ext4_view::Ext4;
use xtask_core::digest::Algorithm;

pub use installation::{InstalledFile, InstalledKind, installed_files};
pub use recording::{Event, EventKind, Recording, Wish};

use facts::Timeline;
use files::Files;
use rules::Case;

/// The result for one state of the disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judgement {
    /// The losses. A sound state has none.
    pub losses: Vec<Loss>,
    /// True if there is a loss, a file that cannot be read, or a file that the agent has set aside. Such a state is worth a
    /// check with e2fsck.
    pub is_odd: bool,
    /// The SHA-256 of the executable that would start, if it is a known one.
    pub executable: Option<String>,
}

/// Something that the power cut has destroyed, or that the disk must not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    pub rule: Rule,
    /// The path of the file on the device.
    pub path: String,
    /// A sentence: what is lost, and which acknowledgement it contradicts.
    pub text: String,
}

/// What must hold in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// The file system can be read.
    FileSystem,
    /// The agent's state is whole.
    StateWhole,
    /// The agent's state is no older than the acknowledged revision.
    StateAcknowledged,
    /// The agent's state is no newer than what was sent.
    StateNotAhead,
    /// The agent's state has the documents of its revision.
    StateDocuments,
    /// The file in a volume is whole.
    VolumeWhole,
    /// The file in a volume is no older than what the workload has answered.
    VolumeAcknowledged,
    /// The executable is whole and one that may be installed.
    Executable,
    /// A unit, a script, the configuration, a secret or a link is whole.
    InstalledFile,
    /// A list of podman's storage is whole.
    StorageList,
    /// An image that the device has reported is there.
    ImageAcknowledged,
    /// An image that the agent takes as complete is complete.
    ImageComplete,
}

/// The contents of large files, by their SHA-256. A comparison with the content takes a tenth of the time of a digest.
#[derive(Debug)]
pub(crate) struct Known(BTreeMap<String, Vec<u8>>);

impl Known {
    /// Returns the content with this digest, which [`Judge::new`] has made sure of.
    fn blob(&self, sha256: &str) -> &[u8] {
        &self.0[sha256]
    }
}

/// Judges the states of one recording. It is read-only, so several threads may share it.
#[derive(Debug)]
pub struct Judge {
    recording: Recording,
    known: Known,
    timeline: Timeline,
}

impl Judge {
    /// Creates the judge of a recording. `blobs` are the contents of the executables and of the images' files, in any
    /// order.
    ///
    /// # Errors
    /// Returns an error if the recording names a digest that no blob has.
    pub fn new(recording: Recording, blobs: Vec<Vec<u8>>) -> Result<Self> {
        let with_digest = |blob: Vec<u8>| (Algorithm::Sha256.of(&blob).hex().to_owned(), blob);
        let known = Known(blobs.into_iter().map(with_digest).collect());
        let executables = recording.executables.iter().map(|(sha256, name)| (sha256, name.as_str()));
        let files = recording.images.values().flatten().map(|(path, sha256)| (sha256, path.as_str()));
        let installed = recording.events.iter().filter_map(|event| match &event.kind {
            EventKind::InstallBegan { sha256 } | EventKind::Installed { sha256 } => {
                Some((sha256, "an installed executable"))
            }
            _ => None,
        });
        for (sha256, name) in executables.chain(files).chain(installed) {
            known.0.get(sha256).with_context(|| format!("find the content of {name} (sha256:{sha256})"))?;
        }
        let timeline = Timeline::new(&recording);
        Ok(Self { recording, known, timeline })
    }

    /// Judges the state of the disk at a point of the log: a state that contains no entry of the log from `point` on.
    ///
    /// # Errors
    /// Returns an error only for a fault of this host: the disk cannot be read, or `ext4-view` does not support the
    /// file system. Damage of the file system is a loss.
    pub fn judge(&self, point: usize, disk: &Ext4) -> Result<Judgement> {
        self.judge_files(point, disk)
    }

    fn judge_files(&self, point: usize, files: &dyn Files) -> Result<Judgement> {
        let facts = self.timeline.at(point);
        let judgement = Judgement::default();
        let case = Case { recording: &self.recording, known: &self.known, facts: &facts, files, judgement };
        let mut judgement = case.judge()?;
        // The order of a directory's entries may differ after another replay of the journal.
        judgement.losses.sort_by(|one, other| (one.rule, &one.path).cmp(&(other.rule, &other.path)));
        Ok(judgement)
    }
}
