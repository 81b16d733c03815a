//! The faults that `torture --sabotage` plants in the agent's surroundings. With each of them, the device behaves as if its
//! agent did not heal from one kind of fault, and the episodes must show it.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The faults of an agent that does not heal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentFault {
    /// Wait for ever on a connection to the broker that is half-open
    WaitsHalfOpen,
    /// Connect to the broker again without a pause
    ReconnectsWithoutPause,
    /// Send nothing until the clock shows a later time than ever before
    TrustsClock,
    /// Stop the containers while there is no broker
    StopsWithoutBus,
    /// Forget what the fleet changed while the disk was full
    ForgetsOnFullDisk,
    /// Never watch the desired state again after the connection to the broker was lost
    DeafAfterRestart,
}
