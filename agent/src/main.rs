//! The agent's command line: `run` is the service; `check-config` and `status` are for people.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use iot_agent::config::{Config, default_status_file};
use iot_agent::status_report;

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
    CheckConfig {
        /// Configuration file (TOML)
        file: PathBuf,
    },
    /// Show the device's deployments and its connection to the bus
    ///
    /// Exits with 1 if the agent is not running or not connected.
    Status {
        /// Status file that the running agent writes
        #[arg(long, value_name = "FILE", default_value_os_t = default_status_file())]
        file: PathBuf,
        /// Print the status file as it is (JSON)
        #[arg(long)]
        json: bool,
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
