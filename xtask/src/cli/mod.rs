//! Every flag and help text. The binaries parse this same [`Cli`], so that `smoke --help` never needs libvirt.

mod image;
mod inspect;
mod preflight;
mod smoke;
mod vm;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::arch::VmArchitecture;
pub use image::{
    BumpArgs, ImageArgs, ImageBuildArgs, ImageCommand, ImageFetchArgs, ImageVerifyArgs, PruneArgs,
};
pub use inspect::InspectArgs;
pub use preflight::{FixArgs, PreflightArgs, RehearsalFault};
pub use smoke::{Sabotage, SmokeArgs, Until};
pub use vm::{GuestArgs, OneArgs, UpArgs, VmCommand};

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    version,
    about = "Proves the IoT agent on the hardware it will really meet",
    after_help = "Exit codes: 0 verified, 1 the agent or the guest failed, 2 usage, 69 this host is not ready, 130 interrupted.\n\
                  stdout carries results only (a path, JSON); progress and logs go to stderr."
)]
pub struct Cli {
    /// The task.
    #[command(subcommand)]
    pub command: Command,

    /// How much is said.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// How much is said, and in which colours.
#[derive(Debug, Clone, Copy, Args)]
pub struct Verbosity {
    /// Say more: the commands that run, what the guest's console prints
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    pub verbose: bool,

    /// Say nothing but the verdict and errors
    #[arg(short, long, global = true)]
    pub quiet: bool,

    /// Colour: on a terminal without NO_COLOR, or as told
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    pub color: Color,
}

impl Verbosity {
    /// Says nothing.
    pub fn silent() -> Self {
        Self { verbose: false, quiet: true, color: Color::Never }
    }
}

/// When to use colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Color {
    #[default]
    Auto,
    Always,
    Never,
}

/// The tasks.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say whether this machine can do it, what exactly is missing, and with --fix install that
    Preflight(PreflightArgs),
    /// Build the agent for a device and print the executable's path
    Build(BuildArgs),
    /// Say whether an executable will run on a device, in milliseconds and without a boot; exit 1 where it will not
    Inspect(InspectArgs),
    /// Prove the agent in an emulated machine: boot, install, join, ping, workload, power cut, rejoin
    Smoke(SmokeArgs),
    /// Machines to work in: made in seconds, entered, cut off, started again
    #[command(subcommand)]
    Vm(VmCommand),
    /// The catalogue's images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Measure, in turn in one run, what this project claims about speed
    Bench(BenchArgs),
    /// Repeat smokes, kills and pairs for as long as asked, and count
    Soak(SoakArgs),
    /// The whole test suite: formatting, lints, tests, dependency guard, the real smokes
    Ci(CiArgs),
    /// Print the script that has a shell complete `cargo xtask` in this workspace, machines' names included
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Where `cargo xtask` is completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// `build`.
#[derive(Debug, Clone, Args)]
pub struct BuildArgs {
    /// The device's architecture
    #[arg(long, value_enum, default_value_t)]
    pub arch: VmArchitecture,

    /// The cargo profile
    #[arg(long, default_value = "release", value_name = "NAME")]
    pub profile: String,
}

/// The default guest.
const MEMORY_MIB: u64 = 2048;
const VCPUS: u32 = 2;

/// The machine to test on.
#[derive(Debug, Clone, Args)]
pub struct MachineArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub image: ImageArgs,

    /// The CPU model, a QEMU name or pi5 or pi4 [default: the fastest that the accelerator has]
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,

    /// The accelerator; auto uses KVM where it really runs this guest's kernel
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
    /// As a command line without any of the flags.
    fn default() -> Self {
        Self { image: ImageArgs::default(), cpu: None, accel: Accel::Auto, memory: MEMORY_MIB, vcpus: VCPUS }
    }
}

fn timeout_scale(text: &str) -> Result<f64, String> {
    let scale: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.1..=100.0).contains(&scale) { Ok(scale) } else { Err("must be 0.1 to 100".to_owned()) }
}

/// `--accel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Accel {
    /// KVM where the architectures match and it is seen to work, else TCG
    #[default]
    Auto,
    /// KVM or nothing
    Kvm,
    /// Emulation
    Tcg,
}

/// What a bench measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum BenchSubject {
    /// Under emulation: a smoke's boot against bare QEMU's, our CPU flags against plain `max`, warm smokes against cold ones, power cut to
    /// rejoin; and what `xtask` takes to be compiled and to start. All in turn, against what is promised of it
    #[default]
    Claims,
    /// How a new agent gets into a guest that is up: the way of a warm smoke against a disk plugged in, HTTP and ssh
    Delivery,
    /// A download from loopback, against curl | tee | sha256sum
    Fetch,
    /// The check of this machine and the rehearsal, against what they may take
    Preflight,
    /// `inspect` on the agent and on 100 MB, against what it may take
    Inspect,
    /// An image's tree, against plain mmdebstrap with the same packages; and that the trees are the same
    Image,
    /// What the agent takes of the device: executable, memory, time to its first status, processor time at rest
    Footprint,
}

/// `bench`.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// What is measured
    #[arg(value_enum, default_value_t)]
    pub subject: BenchSubject,

    /// The guest's architecture
    #[arg(long, value_enum, default_value = "aarch64")]
    pub arch: VmArchitecture,

    /// The image that `bench image` builds
    #[arg(long, value_name = "NAME", default_value = "debian-12")]
    pub image: String,

    /// How many rounds, each the one and the other in turn
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=20))]
    pub rounds: u32,

    /// Print the figures as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// `soak`.
#[derive(Debug, Clone, Args)]
pub struct SoakArgs {
    /// The guest's architecture
    #[arg(long, value_enum, default_value = "aarch64")]
    pub arch: VmArchitecture,

    /// Boot each from nothing, and make no snapshot
    #[arg(long)]
    pub cold: bool,

    /// Plain smokes, one after the other
    #[arg(long, default_value_t = 0)]
    pub smokes: u32,

    /// Pairs of smokes at once
    #[arg(long, default_value_t = 0)]
    pub pairs: u32,

    /// Smokes that are killed, or their QEMU, at a random moment; each followed by one that must join, and by a look at what is left
    #[arg(long, default_value_t = 0)]
    pub kills: u32,

    /// The agent's tests with a hundred kills at random moments and a broker that is away for minutes
    #[arg(long)]
    pub agent: bool,

    /// Executions of the inspection on mutated executables
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub fuzz: u64,
}

/// `ci`.
#[derive(Debug, Clone, Args)]
pub struct CiArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened")]
    pub fix: FixArgs,

    /// Leave out what boots a machine: for a quick look before a commit, never for a verdict
    #[arg(long)]
    pub fast: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let Command::Smoke(args) = Cli::parse_from(["xtask", "smoke"]).command else { panic!("smoke") };
        assert_eq!(args.build.arch, VmArchitecture::X86_64);
        assert_eq!((args.machine.memory, args.machine.vcpus, args.machine.accel), (2048, 2, Accel::Auto));
    }

    #[test]
    fn a_wrong_value_for_any_flag_is_a_usage_error() {
        let table: &[&[&str]] = &[
            &["smoke", "--arch", "riscv64"],
            &["smoke", "--accel", "hvf"],
            &["smoke", "--memory", "1"],
            &["smoke", "--memory", "lots"],
            &["smoke", "--vcpus", "0"],
            &["smoke", "--timeout-scale", "0"],
            &["smoke", "--timeout-scale", "soon"],
            &["smoke", "--sabotage", "everything"],
            &["smoke", "--yes"],
            &["smoke", "--color", "mauve"],
            &["smoke", "-v", "-q"],
            &["smoke", "--no-such-flag"],
            &["build", "--arch", "mips"],
            &["preflight", "--arch", "vax"],
            &["preflight", "--connect", "xen:///system"],
            &["preflight", "--connect", "system"],
            &["inspect", "--arch", "vax"],
            &["inspect", "--image", "debian-12", "--sysroot", "/"],
            &["image", "fetch"],
            &["image", "fetch", "https://host/file", "--image-digest", "md5:00"],
            &["image", "prune", "--keep", "lots"],
            &["image", "prune", "--keep", "99999999T"],
            &["image", "bump"],
            &["image", "bump", "debian-12", "--unsigned", "--keyring", "keys.gpg"],
            &["bench", "--rounds", "0"],
            &["completions", "csh"],
            &["vm", "up", "-x"],
            &["vm", "up", "../x"],
            &["vm", "exec"],
            &["smoke", "--until", "tomorrow"],
            &["smoke", "--until", "join", "--sabotage", "kill-qemu"],
        ];
        for line in table {
            let error = Cli::try_parse_from(std::iter::once(&"xtask").chain(*line)).unwrap_err();
            assert_eq!(error.exit_code(), i32::from(crate::report::EXIT_USAGE), "{line:?}");
        }
    }
}
