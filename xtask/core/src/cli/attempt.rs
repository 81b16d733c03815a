//! The flags of `cargo xtask try`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

/// The flags of `try`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Exit codes: that of the program, or 128 + N if signal N ended it; 124 after --timeout; 126 or 127 if the\n\
                        kernel does not execute it; 2 usage; 69 the machine did not run; 130 interrupted.\n\
                        stdin, stdout and stderr are those of the program."
)]
pub struct TryArgs {
    /// The executable or script, with the files in its directory; or a container image (OCI or docker archive)
    pub path: PathBuf,

    /// The arguments of the program; for a container image, they replace its command, as those of podman run do
    #[arg(last = true, value_name = "ARGS")]
    pub arguments: Vec<OsString>,

    /// The device (core and page size), a name of xtask/inspect/devices.toml
    #[arg(long, value_name = "NAME", default_value = "pi5")]
    pub device: String,

    /// The image whose files the program sees, by its catalogue name [default: the smoke's, if it is in the cache]
    #[arg(long, value_name = "NAME", conflicts_with = "sysroot")]
    pub image: Option<String>,

    /// A directory with the device's file system, or an archive (container image or tar), instead of an image
    #[arg(long, value_name = "DIR|ARCHIVE")]
    pub sysroot: Option<PathBuf>,

    /// Set a variable in the program's environment; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    pub env: Vec<String>,

    /// End the program after this many seconds, not counting the boot
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,

    /// Write a JSON report to FILE; it distinguishes a failure of `try` from one of the program
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

fn variable(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text.to_owned()),
        _ => Err("must be NAME=VALUE".to_owned()),
    }
}
