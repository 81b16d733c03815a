//! `cargo xtask build`: builds the agent, and prints only the path of the executable on stdout.

use anyhow::{Context, Result};
use xshell::Shell;

use xtask_core::build;
use xtask_core::cli::BuildArgs;
use xtask_core::message;
use xtask_core::output::print;
use xtask_core::workspace::Workspace;
use xtask_inspection::check_agent;

pub(crate) fn run(workspace: &Workspace, args: &BuildArgs) -> Result<()> {
    let shell = Shell::new().context("create the shell that runs commands")?;
    let agent = build::build(&shell, workspace, args)?;
    check_agent(&agent)?;
    message!("built {} for {}", agent.describe(), agent.arch);
    print(agent.path.display())
}
