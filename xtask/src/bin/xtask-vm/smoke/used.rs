//! The snapshot that a run uses, and the check of its files beside the run.

use std::time::SystemTime;

use anyhow::Result;
use xtask_core::format::seconds_since;
use xtask_core::limits;
use xtask_core::report::SnapshotReport;
use xtask_images::snapshots::{Snapshot, Verification};
use xtask_jobs::Step;

use super::run::Run;

/// The snapshot from which a run's machine is restored. Its files are hashed while the run continues.
pub(super) struct UsedSnapshot {
    /// The entry for report.json.
    pub(super) report: SnapshotReport,
    verification: Option<Verification>,
    /// True unless a file was found to be changed.
    pub(super) unchanged: bool,
}

impl UsedSnapshot {
    /// Records that the run uses the snapshot, and starts to hash its files.
    pub(super) fn begin(run: &Run<'_>, snapshot: &Snapshot, installs: bool) -> Result<Self> {
        run.dir.uses_snapshot(&snapshot.directory)?;
        let manifest = &snapshot.manifest;
        let made = manifest.made_by == run.dir.id();
        run.times.switch_to_warm(made, installs)?;
        if !made {
            run.ui.expect(run.times.usual());
        }
        let report = SnapshotReport {
            key: snapshot.name(),
            made_at: manifest.made_at.clone(),
            age_seconds: seconds_since(&manifest.made_at, SystemTime::now()),
            made_by: manifest.made_by.clone(),
            reused: manifest.files.keys().cloned().collect(),
            clock_step_seconds: None,
        };
        Ok(Self { report, verification: Some(snapshot.verify()), unchanged: true })
    }

    /// Returns a text with the age of a snapshot that is older than a day, because the image's mirror may have changed
    /// since. The text is empty for a newer snapshot.
    pub(super) fn days(&self) -> String {
        match self.report.age_seconds.map_or(0, |seconds| seconds / 86_400) {
            0 => String::new(),
            days => format!(", {days} day(s) old"),
        }
    }

    /// Waits until the files are hashed, and returns an error if one was changed.
    pub(super) fn finish_verification(&mut self, run: &Run<'_>) -> Result<()> {
        let Some(verification) = self.verification.take() else { return Ok(()) };
        let verified = if verification.is_finished() {
            verification.conclude()
        } else {
            let step = Step { kind: "snapshot", what: "hash", title: "snapshot" };
            run.ui.step(&run.cache, step, || {
                while !verification.is_finished() {
                    run.ui.tick("hashing the snapshot and its image")?;
                    std::thread::sleep(limits::POLL);
                }
                verification.conclude().map(|()| ((), "is unchanged".to_owned()))
            })
        };
        self.unchanged = verified.is_ok();
        verified
    }
}
