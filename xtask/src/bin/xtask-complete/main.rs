//! `xtask-complete`: completes the command line, including the names of instances (machines that were kept). A shell
//! calls it at each press of Tab. If it is called in any other way, it prints the script that makes the shell call it.
//! It is a binary of its own because clap's completion engine would take `xtask` past its limit of crates.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory as _, Parser, ValueEnum as _};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};
use xtask_core::cache::Cache;
use xtask_core::cli::{Cli, Shell};
use xtask_core::error::host_fault;
use xtask_core::image::catalogue::Catalogue;
use xtask_core::output::{conclude, write};
use xtask_core::runs::instance;
use xtask_core::workspace::Workspace;

/// The environment variable that the scripts set when they request candidates.
const ASKS: &str = "COMPLETE";
/// The name of the command in clap's scripts, which must be one word; `cargo xtask` is two.
const COMMAND: &str = "cargo-xtask";

const REMEDY: &str =
    "run it in the workspace; if a path cannot be completed, clone elsewhere or set CARGO_TARGET_DIR";

#[derive(Debug, Parser)]
struct Arguments {
    /// The shell to print the script for
    shell: Shell,
}

fn main() -> ExitCode {
    // If a shell requests candidates, this call ends the process.
    CompleteEnv::with_factory(command).var(ASKS).complete();
    let arguments = Arguments::parse();
    let printed = script(arguments.shell)
        .map_err(|error| host_fault(error, "print the completion script".to_owned(), REMEDY))
        .and_then(|script| write(script.as_bytes()));
    conclude(&printed.map(drop))
}

/// Returns the command line with the candidates that are known only at run time.
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

/// Returns the names of the instances. Errors are not shown here: the command that uses the name reports them.
fn machines() -> Vec<CompletionCandidate> {
    let kept = Cache::from_env().map(|cache| instance::all(&cache)).unwrap_or_default();
    let about = |instance::Instance { machine, .. }| {
        let help = format!("{} {}", machine.arch, machine.image);
        CompletionCandidate::new(machine.name).help(Some(help.into()))
    };
    kept.into_iter().map(about).collect()
}

/// Returns clap's script for `cargo-xtask`, followed by our own script. Ours passes the words after `cargo xtask` on
/// to clap's. It acts only in this workspace, since other workspaces have an xtask too.
fn script(shell: Shell) -> Result<String> {
    let name = shell.to_possible_value().expect("no shell is hidden");
    let completer = std::env::current_exe().context("find the path of this program")?;
    let completer = plain(&completer, "this program")?;
    let root = Workspace::find()?.root().canonicalize().context("resolve the path of the workspace")?;
    let root = plain(&root, "the workspace")?;
    let shells = Shells::builtins();
    let theirs = shells.completer(name.get_name()).expect("clap has a script for each of the three");
    let mut script = Vec::new();
    let written = theirs.write_registration(ASKS, COMMAND, COMMAND, completer, &mut script);
    written.context("generate clap's part of the script")?;
    let theirs = String::from_utf8(script).context("read clap's part of the script")?;
    let ours = match shell {
        Shell::Bash => include_str!("cargo.bash"),
        Shell::Zsh => include_str!("cargo.zsh"),
        Shell::Fish => include_str!("cargo.fish"),
    };
    let ours = ours.replace("@ROOT@", root).replace("@COMPLETER@", completer).replace("@ASKS@", ASKS);
    Ok(theirs + &ours)
}

/// Returns the path as text, or an error if the path cannot be written unquoted into a script. clap quotes only some
/// of the paths in its scripts.
fn plain<'a>(path: &'a Path, whose: &str) -> Result<&'a str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@".contains(c);
    path.to_str().filter(|path| path.chars().all(plain)).with_context(|| {
        let path = path.display();
        format!(
            "the path of {whose}, {path}, has characters that a shell would have to quote; move it elsewhere"
        )
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
