//! The flags of `cargo xtask preflight`, and `--fix`, which other tasks have too.

use clap::{Args, ValueEnum};

use super::MachineArgs;
use crate::arch::VmArchitecture;
use crate::host::connection::uri::ConnectUri;

/// `preflight`.
#[derive(Debug, Clone, Args)]
pub struct PreflightArgs {
    /// The guest's architecture; every one where none is given
    #[arg(long, value_enum)]
    pub arch: Option<VmArchitecture>,

    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub machine: MachineArgs,

    /// Start the very domain that a smoke would start, paused, look at what QEMU made of it, and end it
    #[arg(long)]
    pub rehearse: bool,

    /// Plant one fault in the rehearsed domain and see the rehearsal find it; such a preflight never exits 0
    #[arg(long, value_enum, value_name = "FAULT", requires = "rehearse")]
    pub sabotage: Option<RehearsalFault>,

    /// Ask this libvirt too, its permissions, its network and its host: qemu:///session, qemu+ssh://HOST/system …
    #[arg(long, value_name = "URI")]
    pub connect: Option<ConnectUri>,

    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub fix: FixArgs,

    /// Print the findings as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// What to do about what is missing.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct FixArgs {
    /// Install what is missing, after showing it and asking
    #[arg(long)]
    pub fix: bool,

    /// Do not ask; without a terminal nothing is asked anyway
    #[arg(long, requires = "fix")]
    pub yes: bool,
}

/// A fault for the rehearsal to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RehearsalFault {
    /// All processors of the guest on one thread of this host
    SingleThread,
    /// A CPU feature that was switched off is on
    CpuFeature,
    /// The domain asks for a CPU feature that nobody knows
    CpuRefused,
    /// Flash of another size than the firmware is made for
    FlashSize,
    /// A disk whose flushes QEMU ignores
    UnsafeCache,
    /// The variable store's template itself in the place of this domain's copy
    NvramTemplate,
}
