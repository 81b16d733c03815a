//! The flags of `cargo xtask smoke`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::args::{BuildArgs, FixArgs, MachineArgs, timeout_scale};

/// The flags of `smoke`.
#[derive(Debug, Clone, Args)]
pub struct SmokeArgs {
    #[command(flatten)]
    pub build: BuildArgs,

    /// Test this executable instead of building the agent
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,

    #[command(flatten)]
    pub machine: MachineArgs,

    /// Leave the agent idle for this many seconds after it has joined and report its footprint, 0 to 3600
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub rest: u64,

    /// Watch the device at rest for this many seconds at the end, 0 to 3600 [default: 6, and 40 with `--cold`]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub observe: Option<u64>,

    /// Boot cold: use no snapshot and make none
    #[arg(long)]
    pub cold: bool,

    /// Require a snapshot (made if there is none); fail if snapshots are not possible, such as under KVM
    #[arg(long, conflicts_with = "cold")]
    pub warm: bool,

    /// Run twice, warm from the snapshot and cold, and compare the reports
    #[arg(long, conflicts_with_all = ["cold", "keep"])]
    pub verify_cold: bool,

    /// Be one of the two runs of `--verify-cold`
    #[arg(long, hide = true, requires = "verify_cold")]
    pub half: Option<Half>,

    /// Stop after this phase; the verdict's line says so
    #[arg(long, value_enum, default_value_t, value_name = "PHASE", conflicts_with = "sabotage")]
    pub until: Until,

    /// Check the guest's file systems for damage at the end (e2fsck)
    #[arg(long, conflicts_with = "keep")]
    pub fsck: bool,

    /// Leave the machine running and print how to enter and remove it
    #[arg(long)]
    pub keep: bool,

    /// Multiply the time limits of the guest, 0.1 to 100
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = timeout_scale)]
    pub timeout_scale: f64,

    /// The directory for report.json and console.log [default: the run's own directory, printed at the end]
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,

    #[command(flatten)]
    pub fix: FixArgs,

    /// Plant one fault, which the smoke must find; never exits 0
    #[arg(long, value_enum, value_name = "FAULT")]
    pub sabotage: Option<Sabotage>,
}

/// The last phase of a smoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Until {
    /// The agent's first status
    Join,
    /// The whole smoke
    #[default]
    End,
}

/// One of the two runs of `--verify-cold`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Half {
    Warm,
    Cold,
}

/// The faults that can be planted for the smoke to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sabotage {
    /// Start the agent's unit without enabling it at boot
    UnitNotEnabled,
    /// Keep publishing the boot id of the first boot
    StaleBootId,
    /// Install another executable than the one built
    OtherDigest,
    /// Make the guest's kernel panic while booting
    KernelPanic,
    /// Kill QEMU while the guest boots
    KillQemu,
    /// Make the broker refuse the device's password
    BrokerRefuses,
    /// Ignore the requests that stop or remove a container
    IgnoresDeletes,
    /// Delete the agent's state before each of its starts
    LosesState,
    /// Start the agent only once the bus can be reached
    WaitsForBus,
    /// Use a workload image for the other architecture
    ForeignImage,
    /// Have systemd end the agent every 8 seconds
    CrashLoop,
    /// Bring back the agent's state from before a deletion at its next boot
    ForgetsDeletions,
    /// Power the guest off after its workload has started
    PowersOff,
    /// Delete the start counter in the workload's volume before each start of the agent
    LosesVolume,
    /// Let the agent acknowledge a change that it has not written to the disk
    NoFsync,
    /// Allow the agent one connection to the broker in each boot
    LosesBus,
    /// After the power cut, hide from the agent what was desired before
    WatchesOnlyNew,
    /// After the power cut, keep all commands from the agent
    DeafAfterRejoin,
    /// After the power cut, delete the containers every 30 seconds (needs `--observe 40` or `--cold`)
    Recreates,
    /// Reboot the guest once after it has joined again
    RebootsItself,
    /// Make the root file system read-only after the device has joined again
    ReadOnlyRoot,
    /// Stop the agent and let another program write the device's status
    ForgedStatus,
    /// Open a restored machine's disk without the snapshot's layer
    StaleChain,
    /// With `--verify-cold`, make the guest's kernel panic in the cold run only
    ColdPanics,
}
