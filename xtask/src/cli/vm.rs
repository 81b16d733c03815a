//! `cargo xtask vm`: machines to work in.

use clap::{Args, Subcommand};

use super::{FixArgs, MachineArgs};
use crate::arch::VmArchitecture;

/// `vm`.
#[derive(Debug, Clone, Subcommand)]
pub enum VmCommand {
    /// Make a machine to work in: booted, without the agent; in seconds where there is a snapshot
    Up(UpArgs),
    /// List the machines that are kept
    List {
        /// Print them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Enter a machine, or run a command in it with its terminal
    Ssh(GuestArgs),
    /// Run a command in a machine and end with its exit code
    Exec {
        /// The machine; may be left out where there is one
        #[arg(long, short, value_name = "MACHINE")]
        machine: Option<String>,

        /// The command and its arguments, each passed as it is
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Show what a machine's serial console has said, and attach to it; Ctrl-] detaches
    Console {
        /// The machine; may be left out where there is one
        machine: Option<String>,

        /// Only what it has said so far
        #[arg(long)]
        no_follow: bool,
    },
    /// Show a machine's journal; what follows `--` is journalctl's
    Logs(GuestArgs),
    /// Take a machine's power away: no shutdown, no flush
    PowerCut(OneArgs),
    /// Shut a machine down, and wait until it is off
    Stop(OneArgs),
    /// Boot a machine that is off, from its own disk
    Start(OneArgs),
    /// Stop a machine and delete its disk
    Rm(OneArgs),
    /// Collect what dead runs left: processes, disks, sockets
    Gc {
        /// Only say what there is
        #[arg(long)]
        dry_run: bool,

        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
}

/// `vm up`.
#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    /// What to call it [default: the run's name, as printed]
    #[arg(value_parser = name)]
    pub name: Option<String>,

    /// Its architecture
    #[arg(long, value_enum, default_value_t)]
    pub arch: VmArchitecture,

    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub machine: MachineArgs,

    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub fix: FixArgs,

    /// Print what is known of it as JSON, in the place of its name
    #[arg(long)]
    pub json: bool,
}

/// One machine.
#[derive(Debug, Clone, Args)]
pub struct OneArgs {
    /// The machine, by its name or its run's; may be left out where there is one
    pub machine: Option<String>,
}

/// One machine, and what is for a command in it.
#[derive(Debug, Clone, Args)]
pub struct GuestArgs {
    /// The machine, by its name or its run's; may be left out where there is one
    pub machine: Option<String>,

    /// Behind `--`: passed on
    #[arg(last = true, allow_hyphen_values = true)]
    pub rest: Vec<String>,
}

fn name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let starts = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts && text.len() <= 40 && text.chars().all(plain) {
        Ok(text.to_owned())
    } else {
        Err("a name begins with a letter or digit and has at most 40 letters, digits, dots, _ and -"
            .to_owned())
    }
}
