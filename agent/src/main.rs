//! The command line of the agent: `run` as a service, `check-config` by hand.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use iot_agent::config::Config;

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run as the device's agent until SIGTERM
    Run {
        /// The configuration, TOML
        #[arg(long, value_name = "FILE", default_value = "/etc/iot-agent/config.toml")]
        config: PathBuf,
    },
    /// Check a configuration file and say what in it does not hold
    CheckConfig {
        /// The configuration, TOML
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    match execute(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("iot-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> anyhow::Result<()> {
    match command {
        Command::CheckConfig { file } => {
            let config = Config::load(&file)?;
            println!(
                "{}: device {}, {} bus address(es)",
                file.display(),
                config.device_id,
                config.urls.len()
            );
            Ok(())
        }
        Command::Run { config } => {
            // The journal stamps every line itself, and shows no colour codes.
            tracing_subscriber::fmt().with_ansi(false).without_time().with_writer(std::io::stderr).init();
            let config = Config::load(&config)?;
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(iot_agent::run::run(config))
        }
    }
}
