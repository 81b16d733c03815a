//! The flags of `cargo xtask torture`.

use std::path::PathBuf;

use clap::Args;

use super::args::{BuildArgs, FixArgs, MachineArgs, timeout_scale};
use super::durability::DurabilityFault;
use super::place::PlaceArgs;

/// The flags of `torture`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Exit codes: 0 no state loses anything, 1 a state loses something or the agent fails, 2 usage, 69 this host is not ready,\n\
                  130 interrupted."
)]
pub struct TortureArgs {
    /// Judge this many states in which a power cut can leave the device's disk, 1 to 1000000
    #[arg(long, value_name = "N", required_unless_present = "state", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub crash_states: Option<u32>,

    /// The seed of the states [default: a random one, which is printed]
    #[arg(long, value_name = "SEED", conflicts_with = "state")]
    pub seed: Option<u64>,

    /// Boot this many states that lose nothing, 0 to 1000
    #[arg(long, value_name = "N", default_value_t = 10, conflicts_with = "state", value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub boots: u32,

    /// Boot at most this many states that lose something, one of each kind of loss first [default: all]
    #[arg(long, value_name = "N", conflicts_with = "state")]
    pub boots_of_losses: Option<u32>,

    /// Plant a fault of durability, which the states must show; never exit with 0
    #[arg(long, value_enum, value_name = "FAULT", conflicts_with = "state")]
    pub plant: Option<DurabilityFault>,

    /// Judge again the state in this file of an earlier run
    #[arg(long, value_name = "FILE", conflicts_with = "agent")]
    pub state: Option<PathBuf>,

    /// Boot the state of --state, too
    #[arg(long, requires = "state")]
    pub boot: bool,

    #[command(flatten)]
    pub build: BuildArgs,

    /// Test this executable instead of building the agent
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,

    #[command(flatten)]
    pub machine: MachineArgs,

    /// Multiply the time limits of the guest, and of commands and the broker on this host, 0.1 to 100
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = timeout_scale)]
    pub timeout_scale: f64,

    /// The directory for the reports and logs [default: the run's own directory, printed at the end]
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,

    #[command(flatten)]
    pub fix: FixArgs,

    /// The place is not a flag, because only libvirt's embedded driver can record the writes.
    #[arg(skip)]
    pub place: PlaceArgs,
}
