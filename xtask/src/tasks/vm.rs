//! `cargo xtask vm`: the machines that `smoke --keep` left.

use crate::cli::VmCommand;
use crate::paths::Cache;
use crate::run_dir;
use anyhow::Result;

pub(super) fn run(command: &VmCommand) -> Result<()> {
    let cache = Cache::from_env()?;
    match command {
        VmCommand::List => {
            for (_, how) in run_dir::kept(&cache) {
                println!("{}", how.trim_end());
            }
        }
        VmCommand::Rm { run } => {
            let processes = run_dir::remove_kept(&cache, run)?;
            eprintln!("removed {run}: {processes} process(es) ended, its directory deleted");
        }
    }
    Ok(())
}
