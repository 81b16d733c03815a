//! The flags of `cargo xtask inspect`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::arch::VmArchitecture;

/// The flags of `inspect`.
#[derive(Debug, Clone, Default, Args)]
#[command(
    after_help = "Exit codes: 0 no file fails, 1 a file fails or an archive is refused, 2 usage, 69 this host is not\n\
                        ready, 130 interrupted.\n\
                        --json and --sarif print the report on stdout; the ids are stable."
)]
pub struct InspectArgs {
    /// Executables, libraries, directories, container images (OCI or docker archives), packages (.deb, .apk, .whl) and
    /// archives (.tar, .zip) [default: the agent of `cargo xtask build`, built if it is missing]
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,

    /// The device's architecture [default: that of --device, else that of each file, else x86_64]
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

    /// Fail for warnings, too
    #[arg(long, value_name = "SEVERITY", value_enum)]
    pub deny: Option<Deny>,

    /// Show the findings of this check, but do not fail for them; may be repeated
    #[arg(long, value_name = "ID")]
    pub allow: Vec<String>,

    /// Show the findings that are listed in this file, but do not fail for them
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,

    /// Write the refused and warned findings to the file of --baseline, and exit with 0
    #[arg(long, requires = "baseline")]
    pub write_baseline: bool,

    /// Show everything about each refused or warned finding, including the calls that lead to an instruction
    #[arg(long)]
    pub explain: bool,

    /// Run each program that has warnings but no refusal with `cargo xtask try`, and add the result to its findings
    #[arg(long = "try")]
    pub attempt: bool,

    /// The arguments of the programs that --try runs
    #[arg(last = true, value_name = "ARGS", requires = "attempt")]
    pub arguments: Vec<OsString>,

    /// Print the report as JSON on stdout
    #[arg(long)]
    pub json: bool,

    /// Print the report as SARIF 2.1.0 on stdout
    #[arg(long, conflicts_with = "json")]
    pub sarif: bool,
}

/// A severity that `--deny` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Deny {
    Warned,
}
