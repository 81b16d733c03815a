//! A recorded run: the log of the writes, the disk before the first of them, and the events.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use xtask_crash::{BaseDisk, EntryKind, WriteLog};
use xtask_images::inventory::unpack;
use xtask_jobs::Ui;
use xtask_judge::{EventKind, Recording};

use super::super::prepare::SMALLEST_DISK;
use super::script::{LastWish, last_wishes};
use crate::guest::filesystem::ext4_partitions;

/// The file with the disk before the first recorded write. It is sparse.
const BASE: &str = "base.raw";

/// A recorded run, from which crash states are made.
pub(super) struct Recorded {
    pub(super) log: Arc<WriteLog>,
    pub(super) base: Arc<BaseDisk>,
    base_path: PathBuf,
    /// The disk below the log, which `base` unpacks.
    pub(super) below: PathBuf,
    pub(super) recording: Recording,
    /// The last wish for each deployment.
    pub(super) wishes: Vec<LastWish>,
}

impl Recorded {
    /// Opens the log `log`, and unpacks the disk that was below it into the directory `work`. The root file system is the
    /// largest ext4 file system.
    pub(super) fn open(log: &Path, below: &Path, work: &Path, recording: Recording, ui: &Ui) -> Result<Self> {
        let base_path = work.join(BASE);
        unpack(below, &base_path, ui)?;
        // The guest's disk was larger than a small image, and the guest may have extended its file system.
        let file = fs_err::OpenOptions::new().write(true).open(&base_path)?;
        let length = file.metadata()?.len().max(SMALLEST_DISK);
        file.set_len(length)?;
        let file_systems = ext4_partitions(&base_path)?;
        let root = file_systems.iter().max_by_key(|partition| partition.bytes);
        let start = root.context("find an ext4 file system on the disk before the recording")?.start;
        let next = file_systems.iter().map(|partition| partition.start).filter(|other| *other > start).min();
        let base = BaseDisk::open(&base_path, start..next.unwrap_or(length))?;
        let log = WriteLog::open(log).context("read the log of the writes")?;
        log.check_size(base.length())?;
        let wishes = last_wishes(&recording);
        Ok(Self {
            log: Arc::new(log),
            base: Arc::new(base),
            base_path,
            below: below.to_owned(),
            recording,
            wishes,
        })
    }

    pub(super) fn base_path(&self) -> &Path {
        &self.base_path
    }

    /// Returns the number of bytes of all recorded writes.
    pub(super) fn written_bytes(&self) -> u64 {
        let writes = self.log.entries().iter().filter(|entry| entry.kind == EntryKind::Write);
        writes.map(|entry| entry.length).sum()
    }

    /// Returns the position in the log from which on the agent is installed.
    pub(super) fn installed(&self) -> usize {
        let mut events = self.recording.events.iter();
        let first = events.find(|event| matches!(event.kind, EventKind::Installed { .. }));
        first.map_or(usize::MAX, |event| event.position)
    }

    /// Returns the positions in the log of all that the device or the agent has acknowledged.
    pub(super) fn moments(&self) -> Vec<usize> {
        let is_acknowledged =
            |kind: &EventKind| !matches!(kind, EventKind::Desired { .. } | EventKind::InstallBegan { .. });
        let events = self.recording.events.iter().filter(|event| is_acknowledged(&event.kind));
        events.map(|event| event.position).collect()
    }
}
