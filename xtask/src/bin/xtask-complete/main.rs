//! `xtask-complete`: what may follow on the command line. A shell asks it at each press of Tab, names of kept machines included; without
//! that question it prints the script that has the shell ask. Apart from the front door, for two crates more than that may have.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{CommandFactory as _, Parser, ValueEnum as _};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};
use xtask::cli::{Cli, Shell};
use xtask::image::catalogue::Catalogue;
use xtask::kept;
use xtask::paths::Cache;
use xtask::workspace::Workspace;

/// The variable by which the scripts ask.
const ASKS: &str = "COMPLETE";
/// The command as far as clap's scripts are concerned; `cargo xtask` is two words.
const COMMAND: &str = "cargo-xtask";

#[derive(Debug, Parser)]
struct Arguments {
    /// The shell whose script is wanted
    shell: Shell,
}

fn main() -> ExitCode {
    // Ends the process where a shell asks.
    CompleteEnv::with_factory(command).var(ASKS).complete();
    match print_script(Arguments::parse().shell) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: print a completion script: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The command line, with the values that are known only when somebody asks.
fn command() -> clap::Command {
    with_values(Cli::command()).name(COMMAND).bin_name(COMMAND)
}

fn with_values(command: clap::Command) -> clap::Command {
    let name = command.get_name().to_owned();
    command
        .mut_args(|arg| match (name.as_str(), arg.get_id().as_str()) {
            (_, "machine") => arg.add(ArgValueCandidates::new(machines)),
            (_, "image" | "names") | ("build" | "bump", "name") => {
                arg.add(ArgValueCandidates::new(|| candidates(Catalogue::built_in().names())))
            }
            (_, "device") => arg.add(ArgValueCandidates::new(devices)),
            _ => arg,
        })
        .mut_subcommands(with_values)
}

fn candidates(names: impl Iterator<Item = impl AsRef<str>>) -> Vec<CompletionCandidate> {
    names.map(|name| CompletionCandidate::new(name.as_ref())).collect()
}

fn devices() -> Vec<CompletionCandidate> {
    candidates(inspect::device::built_in().into_iter().map(|device| device.name))
}

/// The kept ones. Nobody is told of an error at a press of Tab: the command itself tells it.
fn machines() -> Vec<CompletionCandidate> {
    let kept = Cache::from_env().map(|cache| kept::all(&cache)).unwrap_or_default();
    let about = |kept: kept::Kept| {
        let machine = kept.machine;
        let help = format!("{} {}", machine.arch, machine.image);
        CompletionCandidate::new(machine.name).help(Some(help.into()))
    };
    kept.into_iter().map(about).collect()
}

/// clap's script for `cargo-xtask`, and ours, which leads `cargo xtask` there: in this workspace alone, since others have an xtask too.
fn print_script(shell: Shell) -> Result<()> {
    let value = shell.to_possible_value().context("no shell is hidden")?;
    let (name, own) = (value.get_name(), std::env::current_exe().context("find this very program")?);
    let own = own.to_str().context("a path in UTF-8")?;
    let root = Workspace::find()?;
    let root = root.root().to_str().context("a workspace whose path is UTF-8")?;
    for path in [own, root] {
        let plain = |c: char| c.is_alphanumeric() || "/._-+@,".contains(c);
        ensure!(path.chars().all(plain), "{path}: shells would have to quote it; move the workspace");
    }
    let mut script = Vec::new();
    let theirs = Shells::builtins();
    let theirs = theirs.completer(name).with_context(|| format!("clap knows no {name}"))?;
    theirs.write_registration(ASKS, COMMAND, COMMAND, own, &mut script).context("clap's script")?;
    let ours = match shell {
        Shell::Bash => include_str!("cargo.bash"),
        Shell::Zsh => include_str!("cargo.zsh"),
        Shell::Fish => include_str!("cargo.fish"),
    };
    script.extend(ours.replace("@ROOT@", root).replace("@COMPLETER@", own).into_bytes());
    std::io::stdout().write_all(&script).context("write to stdout")
}
