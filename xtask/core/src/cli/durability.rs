//! The faults that `torture --plant` causes, to show that the judge finds them. In each of them, data that counts as
//! durable is not on the disk, or a file is incomplete after a power cut.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The faults of durability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DurabilityFault {
    /// Do not sync the content of the agent's state file
    StateWithoutSync,
    /// Do not sync the directory in which the agent's state file was renamed
    DirectoryWithoutSync,
    /// Rename the agent's state file before its content is written
    RenamedBeforeWritten,
    /// Truncate the agent's state file and write it in place
    TruncatedInPlace,
    /// Write the agent's executable and units in place, without a sync
    InstallerInPlace,
    /// Use a workload that writes its volume in place, without a sync
    UnsyncedVolume,
    /// Record a downloaded image as complete without a sync of its layers
    PullWithoutSync,
}
