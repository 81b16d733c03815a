//! The flags of `cargo xtask inspect`.

use std::path::PathBuf;

use clap::Args;

use crate::arch::VmArchitecture;

/// The flags of `inspect`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Exit codes: 0 nothing was refused, 1 refused, 2 usage.\n\
                        --json prints the report on stdout; its ids are stable.")]
pub struct InspectArgs {
    /// The executable or shared library [default: the agent of `cargo xtask build`, built if it is missing]
    pub path: Option<PathBuf>,

    /// The device's architecture [default: that of --device, else that of the file, else x86_64]
    #[arg(long, value_enum)]
    pub arch: Option<VmArchitecture>,

    /// The device (core and page sizes): a name of xtask/inspect/devices.toml, or QEMU's name of the core [default: pi5 for aarch64]
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,

    /// The image that provides libraries and kernel, by its catalogue name [default: the smoke's]
    #[arg(long, value_name = "NAME", conflicts_with = "sysroot")]
    pub image: Option<String>,

    /// A directory with the device's file system, instead of an image
    #[arg(long, value_name = "DIR")]
    pub sysroot: Option<PathBuf>,

    /// The cargo profile of the agent
    #[arg(long, default_value = "release", value_name = "NAME")]
    pub profile: String,

    /// Print the report as JSON on stdout
    #[arg(long)]
    pub json: bool,
}
