//! `cargo xtask vm`: machines to work in.

use clap::{Args, Subcommand};

use super::args::{FixArgs, MachineArgs};
use crate::arch::VmArchitecture;

/// `vm`.
#[derive(Debug, Clone, Subcommand)]
pub enum VmCommand {
    /// Make a booted machine without the agent; takes seconds if there is a snapshot
    Up(UpArgs),
    /// List the machines
    List {
        /// Print them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Enter a machine, or run a command in it on a terminal
    Ssh(GuestArgs),
    /// Run a command in a machine and end with its exit code
    Exec {
        /// The machine [default: the only machine]
        #[arg(long, short, value_name = "MACHINE")]
        machine: Option<String>,

        /// The command and its arguments, each passed as it is
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Show a machine's serial console and attach to it; Ctrl-] detaches
    Console {
        /// The machine [default: the only machine]
        machine: Option<String>,

        /// Print the output so far and exit
        #[arg(long)]
        no_follow: bool,
    },
    /// Show a machine's journal; arguments after `--` are passed to journalctl
    Logs(GuestArgs),
    /// Cut a machine's power: no shutdown, no flush
    PowerCut(OneArgs),
    /// Shut a machine down, and wait until it is off
    Stop(OneArgs),
    /// Boot a machine that is off, from its own disk
    Start(OneArgs),
    /// Stop a machine and delete its disk
    Rm(OneArgs),
    /// Collect what dead runs left: processes, disks, sockets
    Gc {
        /// Print what would be collected, and collect nothing
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
    /// The machine's name [default: the run's name, as printed]
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

    /// Print its record as JSON instead of its name
    #[arg(long)]
    pub json: bool,
}

/// One machine.
#[derive(Debug, Clone, Args)]
pub struct OneArgs {
    /// The machine's name or its run's [default: the only machine]
    pub machine: Option<String>,
}

/// One machine, and what is for a command in it.
#[derive(Debug, Clone, Args)]
pub struct GuestArgs {
    /// The machine's name or its run's [default: the only machine]
    pub machine: Option<String>,

    /// Arguments to pass on, after `--`
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
