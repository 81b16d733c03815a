//! The flags of `cargo xtask preflight`.

use clap::{Args, ValueEnum};

use super::args::{FixArgs, MachineArgs};
use super::place::PlaceArgs;
use crate::arch::VmArchitecture;

/// The flags of `preflight`.
#[derive(Debug, Clone, Args)]
pub struct PreflightArgs {
    /// The guest's architecture [default: all]
    #[arg(long, value_enum)]
    pub arch: Option<VmArchitecture>,

    #[command(flatten)]
    pub machine: MachineArgs,

    /// Start the domain of a smoke paused, compare QEMU's machine with it, and stop it
    #[arg(long)]
    pub rehearse: bool,

    /// Plant one fault in the rehearsed domain, which the rehearsal must find; never exits 0
    #[arg(long, value_enum, value_name = "FAULT", requires = "rehearse")]
    pub sabotage: Option<RehearsalFault>,

    #[command(flatten)]
    pub place: PlaceArgs,

    #[command(flatten)]
    pub fix: FixArgs,

    /// Print the findings as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

impl PreflightArgs {
    /// Returns the libvirt for which the facts about this host are evaluated. A rehearsal always uses the embedded
    /// driver of this host, even if `--connect` names a daemon to check.
    pub fn place_of_facts(&self) -> &PlaceArgs {
        const HERE: &PlaceArgs = &PlaceArgs { connect: None, network: None, pool: None };
        if self.rehearse { HERE } else { &self.place }
    }
}

/// The faults that can be planted for the rehearsal to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RehearsalFault {
    /// Run all processors of the guest on one thread of this host
    SingleThread,
    /// Leave a CPU feature on that should be off
    CpuFeature,
    /// Request an unknown CPU feature
    CpuRefused,
    /// Use flash of another size than the firmware's
    FlashSize,
    /// Ignore the flushes of a disk
    UnsafeCache,
    /// Use the variable store's template instead of this domain's copy
    NvramTemplate,
}
