//! How long phases took on this machine, so that a wait can say what is usual.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use xtask::paths::{Cache, make_private_dir, write_private};
use xtask::report::{Phase, PhaseReport, PhaseStatus};

/// The times of one kind of run: an architecture, an accelerator, a CPU, an image.
pub(crate) struct History {
    path: PathBuf,
    seconds: BTreeMap<String, f64>,
}

impl History {
    /// What is known; a file that cannot be read is as good as none, since it only informs.
    pub(crate) fn load(cache: &Cache, kind: &str) -> Self {
        let path = cache.history().join(format!("{kind}.json"));
        let seconds = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Self { path, seconds: seconds.unwrap_or_default() }
    }

    /// Seconds of the last time.
    pub(crate) fn of(&self, phase: Phase) -> Option<f64> {
        self.seconds.get(phase.title()).copied()
    }

    /// Keeps what passed.
    pub(crate) fn keep(&mut self, cache: &Cache, phases: &[PhaseReport]) -> Result<()> {
        for phase in phases.iter().filter(|phase| phase.status == PhaseStatus::Passed) {
            self.seconds.insert(phase.name.title().to_owned(), phase.seconds);
        }
        make_private_dir(&cache.history())?;
        write_private(&self.path, serde_json::to_string_pretty(&self.seconds)?)
    }
}
