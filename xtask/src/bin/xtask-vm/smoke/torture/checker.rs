//! The check of crash states by e2fsck. One copy of the guest's partition serves all states: a state is written into it,
//! and taken out again after the check.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ext4_view::Ext4;
use fs_err::File;
use fs_err::os::unix::fs::FileExt as _;
use xtask_core::bail_host;
use xtask_core::error::Kind;
use xtask_crash::{CrashState, StateDisk};
use xtask_jobs::Ui;
use xtask_judge::{Judge, Loss};

use super::recorded::Recorded;
use super::states;
use crate::guest::filesystem::{check_one, cut_out, undo_repairs};

/// The number of bytes that are copied at a time.
const PIECE: usize = 1 << 20;
/// The file, in the run's working directory, with the partition.
const PARTITION: &str = "partition.raw";

/// A copy of the partition with the root file system as it was before the recording.
pub(super) struct Checker<'a> {
    recorded: &'a Recorded,
    partition: PathBuf,
    work: &'a Path,
    ui: &'a Ui,
}

impl<'a> Checker<'a> {
    pub(super) fn new(recorded: &'a Recorded, work: &'a Path, ui: &'a Ui) -> Result<Self> {
        let (partition, bytes) = (work.join(PARTITION), recorded.base.partition());
        cut_out(recorded.base_path(), bytes.start, bytes.end - bytes.start, &partition, ui)?;
        Ok(Self { recorded, partition, work, ui })
    }

    /// Checks the root file system of a state, and judges the state again after e2fsck has replayed the journal. Returns the
    /// losses, and the damage that a boot would not repair.
    ///
    /// # Errors
    /// Returns an error if the state cannot be written, or if e2fsck cannot run. Also returns one if e2fsck's replay of the
    /// journal leads to another judgement than ours.
    pub(super) fn losses(&self, state: &CrashState, judge: &Judge) -> Result<Vec<Loss>> {
        let Recorded { base, log, .. } = self.recorded;
        let disk = StateDisk::new(base, log, state);
        self.copy(&disk, &disk)?;
        let checked = check_one(&self.partition, base.partition().start, Some(self.work), self.ui);
        let judged = match checked {
            Ok(()) => self.judge_again(state, judge),
            Err(error) if Kind::Guest.is(&error) => Ok(vec![states::damaged(error.to_string())]),
            Err(error) => Err(error),
        };
        undo_repairs(&self.partition, self.work, self.ui)?;
        self.copy(&disk, &StateDisk::new(base, log, &CrashState { point: 0, missing: Vec::new() }))?;
        judged
    }

    fn judge_again(&self, state: &CrashState, judge: &Judge) -> Result<Vec<Loss>> {
        let repaired =
            Ext4::load_from_path(&self.partition).context("read the file system that e2fsck has checked")?;
        let losses = judge.judge(state.point, &repaired)?.losses;
        let ours = states::judge(self.recorded, judge, state)?.losses;
        if losses != ours {
            bail_host!(
                "after e2fsck's replay of the journal, the state {state:?} loses {losses:?}, and after ours {ours:?}";
                "this is a bug of cargo xtask (xtask/crash/src/replay.rs); nothing is known about the agent"
            );
        }
        Ok(losses)
    }

    /// Copies the content that `from` has in the ranges that `changed` has changed.
    fn copy(&self, changed: &StateDisk, from: &StateDisk) -> Result<()> {
        let file = File::options().write(true).open(&self.partition)?;
        let partition = self.recorded.base.partition();
        // A discard may be as large as the partition.
        let mut buffer = vec![0; PIECE];
        for change in changed.changed() {
            let (mut at, end) =
                (change.bytes.start.max(partition.start), change.bytes.end.min(partition.end));
            while at < end {
                let piece = &mut buffer[..usize::try_from(end - at).unwrap_or(PIECE).min(PIECE)];
                from.read_at(at, piece)?;
                file.write_all_at(piece, at - partition.start)?;
                at += piece.len() as u64;
            }
        }
        Ok(())
    }
}
