//! The flags and help texts of all binaries. Each of them parses this [`Cli`], so `smoke --help` does not need
//! libvirt.

mod agent_fault;
mod args;
mod attempt;
mod device_fault;
mod durability;
mod faults;
mod image;
mod inspect;
mod place;
mod preflight;
mod repeated;
mod report;
mod schedule;
mod several;
mod smoke;
mod torture;
mod vm;

pub use clap::ColorChoice;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::arch::VmArchitecture;
pub use agent_fault::AgentFault;
pub use args::{Accel, BuildArgs, FixArgs, MachineArgs, Verbosity};
pub use attempt::TryArgs;
pub use device_fault::{DeviceFault, FaultGroup, FaultSelection};
pub use durability::DurabilityFault;
pub use faults::{Detection, Disturb, Disturbance, FoundBy, Sabotage};
pub use image::{
    BumpArgs, ImageArgs, ImageBuildArgs, ImageCommand, ImageFetchArgs, ImageVerifyArgs, PruneArgs,
    StoreCommand,
};
pub use inspect::{Deny, InspectArgs};
pub use place::{DEFAULT_NAME, Network, PlaceArgs};
pub use preflight::{PreflightArgs, RehearsalFault};
pub use repeated::Repeated;
pub use report::{ReportArgs, ReportFormat};
pub use schedule::{Schedule, ScheduledFault, Tenths};
pub use smoke::{Half, SmokeArgs, Until};
pub use torture::TortureArgs;
pub use vm::{GcArgs, GuestArgs, HeavyVmCommand, LightVmCommand, OneArgs, UpArgs, VmCommand};

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    version,
    about = "Test the IoT agent in an emulated machine like the device that it ships to",
    after_help = "Exit codes: 0 verified, 1 the agent or the guest failed, 2 usage, 69 this host is not ready, 130 interrupted.\n\
                  stdout carries results only (a path, JSON); progress and logs go to stderr."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,

    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// The tasks. `display_order` keeps the order of the help.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check that this machine is ready; --fix installs what is missing
    #[command(display_order = 0)]
    Preflight(PreflightArgs),
    /// Check without a boot whether an executable will run on a device; exit 1 if it will not
    #[command(display_order = 2)]
    Inspect(InspectArgs),
    /// Run a program within seconds on the device's kind of kernel and core
    #[command(display_order = 2)]
    Try(TryArgs),
    /// Work in a machine: make it in seconds, enter it, cut its power, start it again
    #[command(subcommand, display_order = 4)]
    Vm(VmCommand),
    /// Show the report of a run: a page, JUnit, Markdown or JSON
    #[command(display_order = 5)]
    Report(ReportArgs),
    #[command(flatten)]
    Light(LightCommand),
    #[command(flatten)]
    Heavy(HeavyCommand),
}

/// The tasks of `xtask` itself.
#[derive(Debug, Subcommand)]
pub enum LightCommand {
    /// Build the agent for a device and print the executable's path
    #[command(display_order = 1)]
    Build(BuildArgs),
    /// Repeat smokes, kills and pairs, and count the failures
    #[command(display_order = 8)]
    Soak(SoakArgs),
    /// Run the whole test suite: formatting, lints, tests, dependency guard, real smokes
    #[command(display_order = 9)]
    Ci(CiArgs),
    /// Print the shell script that completes `cargo xtask` in this workspace, including machine names
    #[command(display_order = 10)]
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// The tasks of `xtask-vm`.
#[derive(Debug, Subcommand)]
pub enum HeavyCommand {
    /// Test the agent in an emulated machine: boot, install, join, ping, workload, power cut, rejoin
    #[command(display_order = 3)]
    Smoke(Box<SmokeArgs>),
    /// Judge thousands of states in which a power cut can leave the device's disk, made from one recorded run
    #[command(display_order = 3)]
    Torture(Box<TortureArgs>),
    /// Manage the catalogue's images
    #[command(subcommand, display_order = 6)]
    Image(ImageCommand),
    /// Measure the performance claims of this project
    #[command(display_order = 7)]
    Bench(BenchArgs),
}

/// The shells for which `cargo xtask completions` prints a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// The subjects of `bench`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum BenchSubject {
    /// Under emulation: a smoke's boot against bare QEMU's, our CPU flags against plain `max`, warm smokes against cold ones, power cut to
    /// rejoin; and the build and start time of `xtask`. Each round measures all of them and compares them with their limits
    #[default]
    Claims,
    /// Delivery of a new agent into a running guest: the way of a warm smoke against a hot-plugged disk, HTTP and ssh
    Delivery,
    /// A download from loopback against curl | tee | sha256sum
    Fetch,
    /// `preflight` and its rehearsal against their time limits
    Preflight,
    /// `inspect` on the agent and on 100 MB against its time limits
    Inspect,
    /// `try`: the time from the command to the first output of the program, against its limit
    Try,
    /// An image build against plain mmdebstrap with the same packages; the trees must be identical
    Image,
    /// The agent's footprint: executable, memory, time to its first status, processor time at rest
    Footprint,
    /// `torture` with 1,000 crash states and ten boots against its time limit, and the rate of the judgement
    Torture,
}

/// The flags of `bench`.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// What to measure
    #[arg(value_enum, default_value_t)]
    pub subject: BenchSubject,

    /// The guest's architecture
    #[arg(long, value_enum, default_value = "aarch64")]
    pub arch: VmArchitecture,

    /// The image that `bench image` builds
    #[arg(long, value_name = "NAME", default_value = "debian-12")]
    pub image: String,

    /// The number of rounds; each alternates between the things compared
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=20))]
    pub rounds: u32,

    /// Print the figures as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// The flags of `soak`.
#[derive(Debug, Clone, Args)]
pub struct SoakArgs {
    /// The guest's architecture
    #[arg(long, value_enum, default_value = "aarch64")]
    pub arch: VmArchitecture,

    /// Boot each smoke cold: use and make no snapshot
    #[arg(long)]
    pub cold: bool,

    /// The number of smokes, one after the other
    #[arg(long, default_value_t = 0)]
    pub smokes: u32,

    /// The number of pairs of concurrent smokes
    #[arg(long, default_value_t = 0)]
    pub pairs: u32,

    /// The number of smokes to kill (or their QEMU) at a random moment; after each, a smoke must join and nothing may be left
    #[arg(long, default_value_t = 0)]
    pub kills: u32,

    /// The number of smokes for each planted fault; each must be found in its phase
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub sabotages: u32,

    /// The number of smokes for each disturbance, in each of which the agent must be verified
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub disturbances: u32,

    /// The number of power cuts in one smoke, at random moments while the desired state changes
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub power_cuts: u32,

    /// The number of episodes of one run of `torture --faults all`, for a night
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub episodes: u32,

    /// Run the agent's endurance tests, with hundreds of kills, a full disk, a reset of the storage, a broker that is away for minutes and a cluster; then with nats-server 2.15, which needs pip
    #[arg(long)]
    pub agent: bool,

    /// Run all cases of the tables of which `ci` tries a third: broken hosts, the rehearsal, images, planted faults, disturbances
    #[arg(long)]
    pub all: bool,

    /// Validate the reports of each verdict, and take pictures of the pages to look at; needs npx, python3 and chromium
    #[arg(long)]
    pub reports: bool,

    /// The number of inspections of mutated executables
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub fuzz: u64,

    /// Judge the published files of xtask/inspect/corpus.toml, and compare the findings with the recorded ones; needs pip, npm and apt-get
    #[arg(long)]
    pub corpus: bool,
}

/// The flags of `ci`.
#[derive(Debug, Clone, Args)]
pub struct CiArgs {
    #[command(flatten)]
    pub fix: FixArgs,

    /// Skip everything that boots a machine: a quick check before a commit, not a verdict
    #[arg(long)]
    pub fast: bool,

    /// Fail if a distribution cannot be tested, instead of testing the fallback image
    #[arg(long, conflicts_with = "fast")]
    pub strict_image: bool,
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
        let command = Cli::parse_from(["xtask", "smoke"]).command;
        let Command::Heavy(HeavyCommand::Smoke(args)) = command else { panic!("smoke") };
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
            &["try"],
            &["try", "/bin/true", "--timeout", "0"],
            &["try", "/bin/true", "--env", "=x"],
            &["try", "/bin/true", "--image", "debian-12", "--sysroot", "/"],
            &["image", "fetch"],
            &["image", "fetch", "https://host/file", "--image-digest", "md5:00"],
            &["image", "prune", "--keep", "lots"],
            &["image", "prune", "--keep", "99999999T"],
            &["image", "bump"],
            &["image", "bump", "debian-12", "--unsigned", "--keyring", "keys.gpg"],
            &["bench", "--rounds", "0"],
            &["ci", "--fast", "--strict-image"],
            &["completions", "csh"],
            &["vm", "up", "-x"],
            &["vm", "up", "../x"],
            &["vm", "exec"],
            &["vm", "gc", "--connect", "here"],
            &["vm", "gc", "--images"],
            &["smoke", "--until", "tomorrow"],
            &["smoke", "--host", "xen:///system"],
            &["smoke", "--host", "qemu:///system", "--connect", "qemu:///session"],
            &["smoke", "--until", "join", "--sabotage", "kill-qemu"],
            &["torture"],
            &["torture", "--crash-states", "0"],
            &["torture", "--crash-states", "10", "--boot"],
            &["torture", "--state", "1.json", "--seed", "1"],
            &["torture", "--faults", "link-up"],
            &["torture", "--faults", "all,link-down"],
            &["torture", "--faults", "all", "--episodes", "0"],
            &["torture", "--crash-states", "10", "--episodes", "5"],
            &["torture", "--schedule", "link-down@soon+8"],
            &["torture", "--schedule", "link-down@1.5"],
            &["torture", "--schedule", "kill-agent@1.5", "--seed", "1"],
        ];
        let mut screens = String::new();
        for line in table {
            let error = Cli::try_parse_from(std::iter::once(&"xtask").chain(*line)).unwrap_err();
            assert_eq!(error.exit_code(), i32::from(crate::error::EXIT_USAGE), "{line:?}");
            screens += &format!("$ cargo xtask {}\n{error}\n", line.join(" "));
        }
        crate::golden::compare("usage-errors.txt", screens);
    }

    #[test]
    fn the_help_of_every_command() {
        fn write(command: &mut clap::Command, screens: &mut String) {
            let help = command.render_long_help();
            *screens += &format!("$ {} --help\n{help}\n", command.get_bin_name().unwrap());
            command.get_subcommands_mut().for_each(|command| write(command, screens));
        }
        let mut command = Cli::command().bin_name("cargo xtask").disable_help_subcommand(true);
        command.build();
        let mut screens = String::new();
        write(&mut command, &mut screens);
        crate::golden::compare("help.txt", screens);
    }
}
