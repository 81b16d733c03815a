//! The flags of `cargo xtask smoke`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::args::{BuildArgs, FixArgs, MachineArgs, timeout_scale};
use super::faults::{Disturb, Sabotage};
use super::place::PlaceArgs;
use super::repeated::{Repeated, repeatable};
use crate::libvirt_uri::ConnectUri;

/// The flags of `smoke`.
#[derive(Debug, Clone, Args)]
#[command(mut_args(repeatable))]
pub struct SmokeArgs {
    #[command(flatten)]
    pub repeated: Repeated,

    #[command(flatten)]
    pub build: BuildArgs,

    /// Test this executable instead of building the agent
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,

    #[command(flatten)]
    pub machine: MachineArgs,

    #[command(flatten)]
    pub place: PlaceArgs,

    /// Run the smokes of this call on this libvirt; may be repeated, and the smokes are spread over the hosts
    #[arg(long = "host", value_name = "URI", conflicts_with = "connect")]
    pub hosts: Vec<ConnectUri>,

    /// Leave the agent idle for this many seconds after it has joined and report its footprint, 0 to 3600
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub rest: u64,

    /// Watch the device at rest for this many seconds at the end, 0 to 3600 [default: 6, and 40 in a cold run]
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

    /// Print the directory with the report on stdout at the end, for the process that runs several smokes
    #[arg(long, hide = true)]
    pub announce: bool,

    /// Stop after this phase; the verdict's line says so
    #[arg(long, value_enum, default_value_t, value_name = "PHASE", conflicts_with = "sabotage")]
    pub until: Until,

    /// Check the guest's file systems for damage at the end (e2fsck)
    #[arg(long, conflicts_with = "keep")]
    pub fsck: bool,

    /// Leave the machine running and print how to enter and remove it
    #[arg(long)]
    pub keep: bool,

    /// Leave the machine of a failed smoke running; `cargo xtask vm open RUN` enters it
    #[arg(long, conflicts_with_all = ["keep", "fsck", "verify_cold"])]
    pub keep_on_failure: bool,

    /// Multiply the time limits of the guest, and of commands and the broker on this host, 0.1 to 100
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = timeout_scale)]
    pub timeout_scale: f64,

    /// The directory for the reports and logs [default: the run's own directory, printed at the end]
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,

    #[command(flatten)]
    pub fix: FixArgs,

    /// Plant one fault, which the smoke must find; never exits 0
    #[arg(long, value_enum, value_name = "FAULT")]
    pub sabotage: Option<Sabotage>,

    /// Disturb the device once, SECONDS after its boot [default: at a random moment of the first minute]: clock-year-back, qemu-stopped, broker-restarted or slow-disk
    #[arg(long, value_name = "DISTURBANCE[@SECONDS]")]
    pub disturb: Option<Disturb>,

    /// Cut the power this often after the smoke, at random moments of changes of the desired state
    #[arg(long, hide = true, default_value_t = 0, conflicts_with_all = ["sabotage", "disturb", "until"])]
    pub power_cuts: u32,

    /// The seed of the changes and the moments of `--power-cuts`
    #[arg(long, hide = true, requires = "power_cuts")]
    pub seed: Option<u64>,
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
