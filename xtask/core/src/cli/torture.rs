//! The flags of `cargo xtask torture`.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::agent_fault::AgentFault;
use super::args::{BuildArgs, FixArgs, MachineArgs, timeout_scale};
use super::device_fault::FaultSelection;
use super::durability::DurabilityFault;
use super::place::PlaceArgs;
use super::schedule::Schedule;

/// The flags of which a call needs exactly one.
const MODES: [&str; 5] = ["crash_states", "state", "faults", "schedule", "list"];
/// Those of [`MODES`] that make no crash states.
const NO_CRASH_STATES: [&str; 4] = ["state", "faults", "schedule", "list"];

/// The flags of `torture`.
#[derive(Debug, Clone, Args)]
#[command(
    group = ArgGroup::new("mode").args(MODES).required(true),
    after_help = "Exit codes: 0 no state loses anything and the device heals from each fault, 1 a state loses something or the agent fails,\n\
                  2 usage, 69 this host is not ready, 130 interrupted."
)]
pub struct TortureArgs {
    /// Judge this many states in which a power cut can leave the device's disk, 1 to 1000000
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub crash_states: Option<u32>,

    /// Disturb the device with these faults, one episode after the other, and check that it heals; `all` for every fault
    #[arg(long, value_name = "all|NAME,…")]
    pub faults: Option<FaultSelection>,

    /// The number of episodes of --faults, 1 to 10000 [default: one for each fault, and a pair of faults for each four]
    #[arg(long, value_name = "N", requires = "faults", conflicts_with_all = without("faults"), value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub episodes: Option<u32>,

    /// Repeat one episode: FAULT@BEGIN+LENGTH[,…] in seconds, such as link-down@1.5+8,power-cut@2.0+4
    #[arg(long, value_name = "TEXT")]
    pub schedule: Option<Schedule>,

    /// Explain each fault, its bound and what must hold during it; start nothing
    #[arg(long)]
    pub list: bool,

    /// The seed of the states or of the episodes [default: a random one, which is printed]
    #[arg(long, value_name = "SEED", conflicts_with_all = ["state", "schedule", "list"])]
    pub seed: Option<u64>,

    /// Boot this many states that lose nothing, 0 to 1000
    #[arg(long, value_name = "N", default_value_t = 10, conflicts_with_all = NO_CRASH_STATES, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub boots: u32,

    /// Boot at most this many states that lose something, one of each kind of loss first [default: all]
    #[arg(long, value_name = "N", conflicts_with_all = NO_CRASH_STATES)]
    pub boots_of_losses: Option<u32>,

    /// Plant a fault of durability, which the states must show; never exit with 0
    #[arg(long, value_enum, value_name = "FAULT", conflicts_with_all = NO_CRASH_STATES)]
    pub plant: Option<DurabilityFault>,

    /// Plant a fault of an agent that does not heal, which the episodes must show; never exit with 0
    #[arg(long, value_enum, value_name = "FAULT", conflicts_with_all = ["crash_states", "state", "list"])]
    pub sabotage: Option<AgentFault>,

    /// Judge again the state in this file of an earlier run
    #[arg(long, value_name = "FILE", conflicts_with = "agent")]
    pub state: Option<PathBuf>,

    /// Boot the state of --state, too
    #[arg(long, requires = "state", conflicts_with_all = without("state"))]
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

impl TortureArgs {
    /// Returns whether the faults of a running device are caused. Otherwise, crash states are judged.
    pub fn causes_faults(&self) -> bool {
        self.faults.is_some() || self.schedule.is_some()
    }

    /// Returns whether a machine runs, which needs a registry of images. Without `--boot`, a kept state is only judged.
    pub fn boots_machines(&self) -> bool {
        self.state.is_none() || self.boot
    }
}

/// Returns [`MODES`] without one of them. A flag that requires a mode must also conflict with the other modes, because
/// clap does not require a flag that conflicts with a given one.
fn without(mode: &str) -> impl Iterator<Item = &'static str> {
    MODES.into_iter().filter(move |other| *other != mode)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use clap::error::ErrorKind;

    use super::*;
    use crate::cli::{Cli, Command, DeviceFault, HeavyCommand};

    fn parsed(words: &str) -> Result<TortureArgs, clap::Error> {
        let line = ["xtask", "torture"].into_iter().chain(words.split_whitespace());
        let Command::Heavy(HeavyCommand::Torture(args)) = Cli::try_parse_from(line)?.command else {
            panic!("torture")
        };
        Ok(*args)
    }

    #[test]
    fn a_call_has_exactly_one_mode() {
        const MODES: [&str; 5] =
            ["--crash-states 5", "--state f", "--faults all", "--schedule kill-agent@1", "--list"];
        assert_eq!(parsed("").unwrap_err().kind(), ErrorKind::MissingRequiredArgument);
        for mode in MODES {
            parsed(mode).unwrap();
            for other in MODES.iter().filter(|other| **other != mode) {
                let error = parsed(&format!("{mode} {other}")).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ArgumentConflict, "{mode} {other}");
            }
        }
    }

    #[test]
    fn each_mode_has_its_own_flags() {
        let faults = parsed("--faults link-down,kill-agent --episodes 7 --seed 3").unwrap();
        let selected = [DeviceFault::LinkDown, DeviceFault::KillAgent];
        assert_eq!(faults.faults.map(|selection| selection.0), Some(selected.to_vec()));
        assert_eq!((faults.episodes, faults.seed), (Some(7), Some(3)));
        for words in [
            "--crash-states 5 --episodes 3",
            "--schedule kill-agent@1 --seed 1",
            "--schedule kill-agent@1 --episodes 1",
            "--faults all --boots 3",
            "--faults all --boots-of-losses 3",
            "--faults all --plant state-without-sync",
            "--faults all --boot",
            "--list --seed 1",
        ] {
            parsed(words).unwrap_err();
        }
    }
}
