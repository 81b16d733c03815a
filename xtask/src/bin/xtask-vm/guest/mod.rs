//! The guest from outside: its console, ssh into it, its disks, and the container image that it runs.

use anyhow::Result;
use xtask_core::cache::Cache;
use xtask_core::runs::RunDir;
use xtask_jobs::Ui;

pub(crate) mod console;
pub(crate) mod filesystem;
pub(crate) mod first_boot;
pub(crate) mod media;
pub(crate) mod monitor;
pub(crate) mod root;
pub(crate) mod root_port;
pub(crate) mod ssh;
pub(crate) mod tunnel;
pub(crate) mod unit;
pub(crate) mod watch;
pub(crate) mod workload;

/// Deletes dead runs, and prints a line about each of them. Makes the directory of a new run.
pub(crate) fn begin_run(cache: &Cache, ui: &Ui) -> Result<RunDir> {
    let (run, collected) = RunDir::create(cache, || ui.check())?;
    for dead in collected {
        if dead.processes.is_ok() { ui.note(&dead.to_string()) } else { ui.line(&dead.to_string()) }
    }
    Ok(run)
}
