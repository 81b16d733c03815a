//! The flags of `cargo xtask vm`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::args::{FixArgs, MachineArgs};
use super::place::PlaceArgs;
use crate::arch::VmArchitecture;
use crate::libvirt_uri::ConnectUri;

/// The commands of `vm`. `display_order` keeps the order of the help.
#[derive(Debug, Clone, Subcommand)]
pub enum VmCommand {
    #[command(flatten)]
    Light(LightVmCommand),
    #[command(flatten)]
    Heavy(HeavyVmCommand),
}

/// The commands of `xtask` itself.
#[derive(Debug, Clone, Subcommand)]
pub enum LightVmCommand {
    /// List the machines
    #[command(display_order = 1)]
    List {
        /// Print them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Enter a machine, or run a command in it on a terminal
    #[command(display_order = 2)]
    Ssh(GuestArgs),
    /// Enter the machine of a smoke that was run with --keep or --keep-on-failure
    #[command(display_order = 2)]
    Open {
        /// The id of the run, which the last lines of the smoke and `cargo xtask report` name
        run: String,
    },
    /// Run a command in a machine and end with its exit code
    #[command(display_order = 3)]
    Exec {
        /// The machine [default: the only machine]
        #[arg(long, short, value_name = "MACHINE")]
        machine: Option<String>,

        /// The command and its arguments, each passed as it is
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Show a machine's journal; arguments after `--` are passed to journalctl
    #[command(display_order = 5)]
    Logs(GuestArgs),
    /// Cut a machine's power: no shutdown, no flush
    #[command(display_order = 6)]
    PowerCut(OneArgs),
    /// Stop a machine and delete its disk
    #[command(display_order = 9)]
    Rm(OneArgs),
    /// Delete the remains of dead runs: processes, disks, sockets
    #[command(display_order = 10)]
    Gc(GcArgs),
}

/// The commands that need `xtask-vm`.
#[derive(Debug, Clone, Subcommand)]
pub enum HeavyVmCommand {
    /// Make a booted machine without the agent; takes seconds if there is a snapshot
    #[command(display_order = 0)]
    Up(Box<UpArgs>),
    /// Show a machine's serial console and attach to it; Ctrl-] detaches
    #[command(display_order = 4)]
    Console {
        /// The machine [default: the only machine]
        machine: Option<String>,

        /// Print the output so far and exit
        #[arg(long)]
        no_follow: bool,
    },
    /// Shut a machine down, and wait until it is off
    #[command(display_order = 7)]
    Stop(OneArgs),
    /// Boot a machine that is off, from its own disk
    #[command(display_order = 8)]
    Start(OneArgs),
    /// Decide about the connections of a machine; `vm up` and `vm start` start this process
    #[command(hide = true)]
    Supervise {
        /// The process id of QEMU
        #[arg(long)]
        qemu: i32,

        /// The guest may use other hosts, and the name servers on this host's loopback
        #[arg(long)]
        others: bool,

        /// The TCP ports of 127.0.0.1 that the guest may use
        ports: Vec<u16>,
    },
    /// Keep the console's log of a machine small; `vm up` and `vm start` start this process
    #[command(hide = true)]
    KeepLog {
        /// The log
        log: PathBuf,
    },
}

/// The flags of `vm up`.
#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    /// The machine's name [default: the id of its run]
    #[arg(value_parser = name)]
    pub name: Option<String>,

    /// The guest's architecture
    #[arg(long, value_enum, default_value_t)]
    pub arch: VmArchitecture,

    #[command(flatten)]
    pub machine: MachineArgs,

    #[command(flatten)]
    pub place: PlaceArgs,

    #[command(flatten)]
    pub fix: FixArgs,

    /// Print the machine's record as JSON instead of its name
    #[arg(long)]
    pub json: bool,
}

/// The flags of `vm gc`.
#[derive(Debug, Clone, Args)]
pub struct GcArgs {
    /// Print what would be deleted, and delete nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,

    /// Delete the domains and volumes of dead runs on this libvirt instead
    #[arg(long, value_name = "URI")]
    pub connect: Option<ConnectUri>,

    /// Also delete the images in the storage pool of --connect that no machine uses
    #[arg(long, requires = "connect")]
    pub images: bool,

    /// The storage pool of --images [default: default]
    #[arg(long, value_name = "NAME", requires = "images")]
    pub pool: Option<String>,
}

impl GcArgs {
    /// Returns the libvirt and the storage pool of the flags as those of a machine.
    pub fn place(&self) -> PlaceArgs {
        PlaceArgs { connect: self.connect.clone(), network: None, pool: self.pool.clone() }
    }
}

/// The machine on which a `vm` command acts.
#[derive(Debug, Clone, Args)]
pub struct OneArgs {
    /// The machine's name or the id of its run [default: the only machine]
    pub machine: Option<String>,
}

/// The machine on which a `vm` command acts, and the arguments for that command.
#[derive(Debug, Clone, Args)]
pub struct GuestArgs {
    /// The machine's name or the id of its run [default: the only machine]
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
