//! `cargo xtask build`: the agent's executable; its path, alone, on stdout.

use anyhow::{Context, Result};
use xshell::Shell;

use crate::build;
use crate::cli::BuildArgs;
use crate::error::Usage;
use crate::inspect_target::check_agent;
use crate::workspace::Workspace;

pub(super) fn run(workspace: &Workspace, args: &BuildArgs) -> Result<()> {
    build::profile::check(workspace.root(), &args.profile).map_err(|error| Usage(format!("{error:#}")))?;
    let shell = Shell::new().context("start a shell of commands")?;
    let agent = build::build(&shell, workspace, args)?;
    check_agent(&agent)?;
    eprintln!("built {} for {}", agent.describe(), agent.arch);
    println!("{}", agent.path.display());
    Ok(())
}
