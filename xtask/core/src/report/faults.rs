//! The result of `torture --faults` in `report.json`.

use serde::{Deserialize, Serialize};

use super::healing::HealingReport;

/// The episodes of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultsReport {
    /// The seed of the episodes; `None` if the schedule was given.
    pub seed: Option<u64>,
    /// The number of episodes that were planned.
    pub planned: u64,
    pub episodes: Vec<EpisodeReport>,
    /// The healing times, the slowest first.
    pub healing: Vec<HealingReport>,
}

/// One episode: the faults of a device that was restored, and what became of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EpisodeReport {
    /// The number of the episode, from 1. Together with the seed and the list of faults, it determines the schedule.
    pub number: u64,
    /// The faults with their times, as `--schedule` takes them.
    pub schedule: String,
    /// True if a fault switches the machine off.
    pub boots: bool,
    /// The duration of the whole episode, the restore included.
    pub seconds: f64,
    /// The time from the end of the last fault until the device had reached the desired state; `None` if it did not.
    pub healing_seconds: Option<f64>,
    /// The limit of this time.
    pub bound_seconds: f64,
    /// What was proven, or the error.
    pub detail: String,
    /// The command that repeats a failed episode with the fewest faults that still fail.
    pub command: Option<String>,
}

impl EpisodeReport {
    /// Returns whether the device has healed, and nothing was lost.
    pub fn is_sound(&self) -> bool {
        self.command.is_none() && self.healing_seconds.is_some()
    }
}

impl FaultsReport {
    /// Returns the remark about the episodes in the verdict line.
    pub(super) fn remark(&self) -> String {
        let sound = self.episodes.iter().filter(|episode| episode.is_sound()).count();
        let seed = self.seed.map_or(String::new(), |seed| format!(" (seed {seed})"));
        format!(", the device healed in {sound} of {} episodes{seed}", self.episodes.len())
    }
}
