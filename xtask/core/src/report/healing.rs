//! The healing times of `torture --faults`. `xtask/faults/` computes them.

use serde::{Deserialize, Serialize};

/// How fast devices healed from one fault, or from one pair of faults.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct HealingReport {
    /// The names of the faults in the order of their beginnings.
    pub faults: Vec<String>,
    /// The number of episodes in which the device healed.
    pub count: usize,
    pub min_seconds: f64,
    pub median_seconds: f64,
    pub max_seconds: f64,
    /// The time within which the device must heal.
    pub bound_seconds: f64,
    /// The episodes in which the healing took more than three times the median, slowest first.
    pub slow: Vec<SlowHealing>,
}

/// An episode whose healing took much longer than that of the others.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SlowHealing {
    /// The number of the episode.
    pub episode: usize,
    pub seconds: f64,
}
