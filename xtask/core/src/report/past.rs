//! The outcomes of the last runs in a cache. `report.html` shows them.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Phase, Report};
use crate::arch::{Accelerator, VmArchitecture};
use crate::cache::Cache;
use crate::error::Verdict;
use crate::fs::{lock, make_private_dir, write_atomically};

/// The number of runs that are remembered.
pub const REMEMBERED: usize = 50;

/// The outcome of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PastRun {
    pub run_id: String,
    /// The start time in RFC 3339, UTC.
    pub started_at: String,
    pub seconds: f64,
    pub verdict: Verdict,
    /// The phase that failed; `None` for a verified run.
    pub failed_in: Option<Phase>,
    pub arch: VmArchitecture,
    pub image: Option<String>,
    pub accelerator: Option<Accelerator>,
    pub is_warm: bool,
    /// The planted fault.
    pub sabotage: Option<String>,
    pub disturbance: Option<String>,
    pub commit: Option<String>,
}

impl From<&Report> for PastRun {
    fn from(report: &Report) -> Self {
        Self {
            run_id: report.run_id.clone(),
            started_at: report.started_at.clone(),
            seconds: report.seconds,
            verdict: report.verdict,
            failed_in: report.failure.as_ref().map(|failure| failure.phase),
            arch: report.guest.arch,
            image: report.guest.image.as_ref().map(|image| image.name.clone()),
            accelerator: report.host.accelerator,
            is_warm: report.snapshot.is_some(),
            sabotage: report.sabotage.clone(),
            disturbance: report.disturbance.clone(),
            commit: report.workspace.as_ref().map(|commit| commit.commit.clone()),
        }
    }
}

/// Returns the last runs, the newest last. A file that cannot be read or has another format counts as empty, because
/// the history is only informative.
pub fn past_runs(cache: &Cache) -> Vec<PastRun> {
    let text = std::fs::read(cache.history().join("runs.json")).ok();
    text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

/// Adds a run to the last runs, and returns them. Another process may add a run at the same time.
///
/// # Errors
/// Returns an error that names the file that cannot be locked or written.
pub fn remember(cache: &Cache, report: &Report) -> Result<Vec<PastRun>> {
    let directory = cache.history();
    make_private_dir(&directory)?;
    let _guard = lock(&directory.join("runs.lock"), || Ok(()))?;
    let mut runs = past_runs(cache);
    runs.push(report.into());
    runs.drain(..runs.len().saturating_sub(REMEMBERED));
    write_atomically(&directory.join("runs.json"), serde_json::to_string(&runs)?)?;
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_fifty_runs_are_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        assert_eq!(past_runs(&cache), []);
        for run in 0..REMEMBERED + 2 {
            let mut report = Report::begin(&run.to_string(), "2026-11-22T10:15:00Z", VmArchitecture::X86_64);
            report.conclude(Verdict::Verified, 60.0);
            remember(&cache, &report).unwrap();
        }
        let runs = past_runs(&cache);
        assert_eq!((runs.len(), runs[0].run_id.as_str()), (REMEMBERED, "2"));
        std::fs::write(cache.history().join("runs.json"), "[{}]").unwrap();
        assert_eq!(past_runs(&cache), []);
    }
}
