//! `xtask-complete`: what may follow on the command line. A shell asks it at each press of Tab, names of kept machines included; without
//! that question it prints the script that has the shell ask. Apart from `xtask`: clap's engine would take that past its crates.

use std::io::{ErrorKind, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory as _, Parser, ValueEnum as _};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};
use xtask_core::cache::Cache;
use xtask_core::cli::{Cli, Shell};
use xtask_core::error::{self, host_fault};
use xtask_core::image::catalogue::Catalogue;
use xtask_core::runs::instance;
use xtask_core::workspace::Workspace;

/// The variable by which the scripts ask.
const ASKS: &str = "COMPLETE";
/// The command as far as clap's scripts are concerned; `cargo xtask` is two words.
const COMMAND: &str = "cargo-xtask";

const REMEDY: &str =
    "run it in the workspace; if a path cannot be completed, clone elsewhere or set CARGO_TARGET_DIR";

#[derive(Debug, Parser)]
struct Arguments {
    /// The shell whose script is wanted
    shell: Shell,
}

fn main() -> ExitCode {
    // Ends the process where a shell asks.
    CompleteEnv::with_factory(command).var(ASKS).complete();
    let arguments = Arguments::parse();
    let printed = script(arguments.shell)
        .map_err(|error| host_fault(error, "print the completion script".to_owned(), REMEDY))
        .and_then(|script| print(script.as_bytes()));
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for line in error::lines(&error) {
                eprintln!("{line}");
            }
            ExitCode::from(error::code(&error))
        }
    }
}

/// A reader that has had enough of it (`| head`) is no error.
fn print(script: &[u8]) -> Result<()> {
    match std::io::stdout().write_all(script) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("write the completion script to stdout"),
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
            (_, "device") => arg.add(ArgValueCandidates::new(|| {
                candidates(inspect::device::built_in().into_iter().map(|device| device.name))
            })),
            _ => arg,
        })
        .mut_subcommands(with_values)
}

fn candidates(names: impl Iterator<Item = impl AsRef<str>>) -> Vec<CompletionCandidate> {
    names.map(|name| CompletionCandidate::new(name.as_ref())).collect()
}

/// The kept ones. Nobody is told of an error at a press of Tab: the command itself tells it.
fn machines() -> Vec<CompletionCandidate> {
    let kept = Cache::from_env().map(|cache| instance::all(&cache)).unwrap_or_default();
    let about = |instance::Instance { machine, .. }| {
        let help = format!("{} {}", machine.arch, machine.image);
        CompletionCandidate::new(machine.name).help(Some(help.into()))
    };
    kept.into_iter().map(about).collect()
}

/// clap's script for `cargo-xtask`, and ours, which leads `cargo xtask` there: in this workspace alone, since others have an xtask too.
fn script(shell: Shell) -> Result<String> {
    let name = shell.to_possible_value().expect("no shell is hidden");
    let completer = std::env::current_exe().context("find this very program")?;
    let completer = plain(&completer, "this program")?;
    let root = Workspace::find()?.root().canonicalize().context("follow the links to the workspace")?;
    let root = plain(&root, "the workspace")?;
    let shells = Shells::builtins();
    let theirs = shells.completer(name.get_name()).expect("clap has a script for each of the three");
    let mut script = Vec::new();
    let written = theirs.write_registration(ASKS, COMMAND, COMMAND, completer, &mut script);
    written.context("write clap's part of it")?;
    let theirs = String::from_utf8(script).context("read clap's part of it")?;
    let ours = match shell {
        Shell::Bash => include_str!("cargo.bash"),
        Shell::Zsh => include_str!("cargo.zsh"),
        Shell::Fish => include_str!("cargo.fish"),
    };
    let ours = ours.replace("@ROOT@", root).replace("@COMPLETER@", completer).replace("@ASKS@", ASKS);
    Ok(theirs + &ours)
}

/// A path that stands in a script as it is, also where clap's puts quotes around it.
fn plain<'a>(path: &'a Path, whose: &str) -> Result<&'a str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@".contains(c);
    path.to_str().filter(|path| path.chars().all(plain)).with_context(|| {
        let path = path.display();
        format!("{path} holds {whose}, and a shell would have to quote that path; move it elsewhere")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_a_shell_would_have_to_quote_is_refused() {
        assert_eq!(plain(Path::new("/a/b-c_1.2/x"), "it").unwrap(), "/a/b-c_1.2/x");
        for path in ["/a b", "/ä", "/a,b", "/a'b", "/$a"] {
            let error = plain(Path::new(path), "this program").unwrap_err().to_string();
            assert!(error.contains(path) && error.contains("this program"), "{error}");
        }
    }
}
