//! Flags that several tasks share.

use clap::{Args, ColorChoice, ValueEnum};

use super::image::ImageArgs;
use crate::arch::VmArchitecture;

/// The amount and the colours of the output.
#[derive(Debug, Clone, Copy, Args)]
pub struct Verbosity {
    /// Print the commands that run and the guest's console
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    pub verbose: bool,

    /// Print only the verdict and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,

    /// When to use colour; auto: on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    pub color: ColorChoice,
}

impl Verbosity {
    /// Returns the verbosity that prints only the verdict and errors, without colours.
    pub fn silent() -> Self {
        Self { verbose: false, quiet: true, color: ColorChoice::Never }
    }
}

/// The flags of `build`.
#[derive(Debug, Clone, Args)]
pub struct BuildArgs {
    /// The device's architecture
    #[arg(long, value_enum, default_value_t)]
    pub arch: VmArchitecture,

    /// The cargo profile
    #[arg(long, default_value = "release", value_name = "NAME")]
    pub profile: String,
}

/// The memory of the default guest, in MiB.
const MEMORY_MIB: u64 = 2048;
const VCPUS: u32 = 2;

/// The machine of the guest.
#[derive(Debug, Clone, Args)]
pub struct MachineArgs {
    #[command(flatten)]
    pub image: ImageArgs,

    /// The CPU model: a QEMU name, pi5 or pi4 [default: the accelerator's fastest]
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,

    /// The accelerator; auto uses KVM if it runs this guest's kernel
    #[arg(long, value_enum, default_value_t, value_name = "NAME")]
    pub accel: Accel,

    /// The guest's memory, 512 to 65536 MiB
    #[arg(long, value_name = "MIB", default_value_t = MEMORY_MIB, value_parser = clap::value_parser!(u64).range(512..=65536))]
    pub memory: u64,

    /// The guest's processors, 1 to 16
    #[arg(long, value_name = "N", default_value_t = VCPUS, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub vcpus: u32,
}

impl Default for MachineArgs {
    /// Returns the values of a command line without any of the flags.
    fn default() -> Self {
        Self { image: ImageArgs::default(), cpu: None, accel: Accel::Auto, memory: MEMORY_MIB, vcpus: VCPUS }
    }
}

pub(super) fn timeout_scale(text: &str) -> Result<f64, String> {
    let scale: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.1..=100.0).contains(&scale) { Ok(scale) } else { Err("must be 0.1 to 100".to_owned()) }
}

/// The values of `--accel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Accel {
    /// KVM if the architectures match and it works, otherwise TCG
    #[default]
    Auto,
    /// KVM; fail without it
    Kvm,
    /// Emulation by TCG
    Tcg,
}

/// The flags for installing what is missing.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct FixArgs {
    /// Install what is missing, after showing the commands and asking
    #[arg(long)]
    pub fix: bool,

    /// Do not ask for confirmation (never asked without a terminal)
    #[arg(long, requires = "fix")]
    pub yes: bool,
}
