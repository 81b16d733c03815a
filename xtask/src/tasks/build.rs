//! `cargo xtask build`: the agent's executable; its path, alone, on stdout.

use anyhow::{Context, Result};
use xshell::Shell;

use crate::agent_build;
use crate::cli::BuildArgs;
use crate::exit::Usage;
use crate::workspace::Workspace;

pub(super) fn run(workspace: &Workspace, args: &BuildArgs) -> Result<()> {
    agent_build::profile::check(workspace.root(), &args.profile)
        .map_err(|error| Usage(format!("{error:#}")))?;
    let shell = Shell::new().context("start a shell of commands")?;
    let agent = agent_build::build(&shell, workspace, args)?;
    eprintln!("built {} for {}", agent.describe(), agent.arch);
    println!("{}", agent.path.display());
    Ok(())
}
