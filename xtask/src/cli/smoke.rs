//! `cargo xtask smoke`: how far it goes, from what, and with which planted fault.

use std::path::PathBuf;

use clap::{Args, Parser as _, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{BuildArgs, Cli, Command, FixArgs, MachineArgs, timeout_scale};
use crate::arch::VmArchitecture;

/// `smoke`.
#[derive(Debug, Clone, Args)]
pub struct SmokeArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub build: BuildArgs,

    /// Test this executable instead of building the agent
    #[arg(long, value_name = "FILE")]
    pub agent: Option<PathBuf>,

    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub machine: MachineArgs,

    /// Leave the agent alone for so many seconds once it has joined, and report what it takes meanwhile, 0 to 3600
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub rest: u64,

    /// Boot from nothing: use no snapshot, and make none
    #[arg(long)]
    pub cold: bool,

    /// Only out of a snapshot, which is made where there is none: an error where there can be none, as under KVM
    #[arg(long, conflicts_with = "cold")]
    pub warm: bool,

    /// Run it twice, from its snapshot and from nothing, and compare what they say
    #[arg(long, conflicts_with_all = ["cold", "keep", "report"])]
    pub verify_cold: bool,

    /// Stop after this phase; the verdict's line says so
    #[arg(long, value_enum, default_value_t, value_name = "PHASE", conflicts_with = "sabotage")]
    pub until: Until,

    /// After the end, check the guest's file systems (e2fsck): what its next boot would find, and no damage
    #[arg(long, conflicts_with = "keep")]
    pub fsck: bool,

    /// Leave the machine running and print how to enter and remove it
    #[arg(long)]
    pub keep: bool,

    /// Multiply every limit of the waits for the guest, 0.1 to 100
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = timeout_scale)]
    pub timeout_scale: f64,

    /// Where report.json and console.log go [default: the run's own directory, printed at the end]
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,

    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub fix: FixArgs,

    /// Plant one fault and see the smoke find it; a sabotaged run never exits 0
    #[arg(long, value_enum, value_name = "FAULT")]
    pub sabotage: Option<Sabotage>,
}

impl SmokeArgs {
    /// As a command line that names a machine and nothing else.
    pub fn for_machine(arch: VmArchitecture, machine: &MachineArgs) -> Self {
        let line = ["xtask".to_owned(), "smoke".to_owned(), "--arch".to_owned(), arch.to_string()];
        match Cli::parse_from(line).command {
            Command::Smoke(smoke) => Self { machine: machine.clone(), ..smoke },
            _ => unreachable!("the line says smoke"),
        }
    }
}

/// How far a smoke goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Until {
    /// The agent's first status
    Join,
    /// All of it
    #[default]
    End,
}

impl Until {
    /// The name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().expect("no variant is hidden").get_name().to_owned()
    }
}

/// A fault for the smoke to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sabotage {
    /// The agent's unit is started but not enabled at boot
    UnitNotEnabled,
    /// The agent goes on publishing the boot id of its first boot
    StaleBootId,
    /// The guest gets another executable than the one built
    OtherDigest,
    /// The guest's kernel panics while booting
    KernelPanic,
    /// QEMU dies while the guest boots
    KillQemu,
    /// The broker refuses the device's password
    BrokerRefuses,
    /// What stops or removes a container has no effect
    IgnoresDeletes,
    /// The agent's state is deleted before each of its starts
    LosesState,
    /// The agent starts only once the bus can be reached
    WaitsForBus,
    /// The workload's image is for the other architecture
    ForeignImage,
    /// A restored machine's disk is opened past its saved snapshot
    StaleChain,
    /// With `--verify-cold`, the guest's kernel panics in the cold run alone
    ColdPanics,
}

impl Sabotage {
    /// The name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().expect("no variant is hidden").get_name().to_owned()
    }
}
