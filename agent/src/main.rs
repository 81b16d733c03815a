//! The agent's command line: `run` is the service; `check-config` and `status` are for people, and
//! `prepare-storage` is for podman's service.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use iot_agent::config::{Config, default_status_file};
use iot_agent::status_report;
use iot_agent::storage::{self, Places};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent until SIGTERM
    Run {
        /// Configuration file (TOML)
        #[arg(long, value_name = "FILE", default_value = "/etc/iot-agent/config.toml")]
        config: PathBuf,
    },
    /// Check a configuration file and report the first error
    ///
    /// If root runs this command and the user of the service exists, the files are read as that user.
    CheckConfig {
        /// Configuration file (TOML)
        file: PathBuf,
    },
    /// Show the device's deployments and its connection to the bus
    ///
    /// Exits with 1 if the agent is not running, not connected, or does not follow the desired state.
    Status {
        /// Status file that the running agent writes
        #[arg(long, value_name = "FILE", default_value_os_t = default_status_file())]
        file: PathBuf,
        /// Print the status file as it is (JSON)
        #[arg(long)]
        json: bool,
    },
    /// Prepare podman's storage; iot-podman.service runs this before it starts podman
    ///
    /// Deletes podman's temporary files and, after a boot, the layers of incomplete images. No podman may run.
    PrepareStorage {
        /// Podman's storage
        #[arg(
            long,
            value_name = "DIR",
            default_value = "/var/lib/iot-agent/.local/share/containers/storage"
        )]
        storage: PathBuf,
        /// Directory for podman's temporary files
        #[arg(long, value_name = "DIR")]
        temporary: PathBuf,
        /// The agent's state directory
        #[arg(long, value_name = "DIR", default_value = "/var/lib/iot-agent")]
        state: PathBuf,
        /// File that exists from the first start after a boot until the next boot
        #[arg(long, value_name = "FILE", default_value = "/run/iot-agent/podman-started")]
        started: PathBuf,
        /// The program podman
        #[arg(long, value_name = "PROGRAM", default_value = "podman")]
        podman: PathBuf,
    },
}

fn main() -> ExitCode {
    match execute(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            // A closed stderr must not change the exit code.
            drop(writeln!(std::io::stderr(), "iot-agent: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::CheckConfig { file } => {
            if rustix::process::geteuid().is_root() && service_user_exists()? {
                return check_as_service_user(&file);
            }
            let config = Config::load(&file)?;
            let (device, count) = (config.agent.device_id, config.nats.urls.len());
            writeln!(std::io::stdout(), "{}: device {device}, {count} bus address(es)", file.display())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Status { file, json } => {
            let (text, healthy) = status_report::describe(&file)?;
            let text = if json { std::fs::read_to_string(&file)? } else { text };
            writeln!(std::io::stdout(), "{text}")?;
            Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::PrepareStorage { storage, temporary, state, started, podman } => {
            for change in storage::prepare(&Places { storage, temporary, state, started, podman })? {
                writeln!(std::io::stdout(), "{change}")?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Run { config } => {
            // The journal adds the time to each line and does not show colours.
            tracing_subscriber::fmt().with_ansi(false).without_time().with_writer(std::io::stderr).init();
            let config = Config::load(&config)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let ended = runtime.block_on(iot_agent::run::run(config));
            // A pending DNS look-up or a write to a slow card must not delay the shutdown.
            runtime.shutdown_timeout(std::time::Duration::from_secs(2));
            ended.map(|()| ExitCode::SUCCESS)
        }
    }
}

/// The user of the service (`dist/iot-agent.sysusers`).
const SERVICE_USER: &str = "iot-agent";

/// Returns whether id(1) finds the user of the service.
fn service_user_exists() -> anyhow::Result<bool> {
    let id = process::Command::new("id").args(["-u", SERVICE_USER]).output().context("run id")?;
    Ok(id.status.success())
}

/// Runs this command again as the user of the service, because root can also read files that the service cannot read.
fn check_as_service_user(file: &Path) -> anyhow::Result<ExitCode> {
    let own = std::env::current_exe().context("find this program")?;
    let mut command = process::Command::new("runuser");
    command.args(["-u", SERVICE_USER, "--"]).arg(&own).arg("check-config").arg(file);
    let status = command.status().with_context(|| format!("run {} as {SERVICE_USER}", own.display()))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
