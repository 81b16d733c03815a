//! The build of the agent: the checks of its requirements, the build itself, and the executable that it produces.

pub mod artifact;
pub mod compiler;
pub mod configuration;
pub mod linker;
pub mod origin;
pub mod profile;
pub mod standalone;

use std::io::{BufRead as _, BufReader, IsTerminal as _, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use xshell::{Shell, cmd};

use crate::arch::{MachineProfile, VmArchitecture};
use crate::cli::BuildArgs;
use crate::digest::Algorithm;
use crate::error::host_fault;
use crate::output::write_message;
use crate::workspace::Workspace;
use crate::{bail_guest, bail_host};
use configuration::Configuration;
use linker::Linker;
use origin::Origin;

/// The package of the agent.
pub const AGENT_PACKAGE: &str = "iot-agent";

/// The packages of this workspace from which the agent is built.
const AGENT_PACKAGES: [&str; 2] = [AGENT_PACKAGE, "agent-protocol"];

/// An executable of the agent that was read into memory.
#[derive(Debug, Clone)]
pub struct Agent {
    pub path: PathBuf,
    /// The content of the file. A smoke tests this content, even if the file is replaced later.
    pub content: Vec<u8>,
    /// The SHA-256 digest in lower-case hex.
    pub sha256: String,
    /// The architecture for which the executable is meant.
    pub arch: VmArchitecture,
    pub origin: Origin,
}

impl Agent {
    /// Reads the executable at `path`.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read.
    pub fn read(path: &Path, arch: VmArchitecture, origin: Origin) -> Result<Self> {
        let bytes = fs_err::read(path)?;
        let sha256 = Algorithm::Sha256.of(&bytes).hex().to_owned();
        Ok(Self { path: path.to_owned(), content: bytes, sha256, arch, origin })
    }

    /// Formats the path, the size and the digest for a message.
    pub fn describe(&self) -> String {
        let mib = self.content.len() as f64 / f64::from(1 << 20);
        format!("{} ({mib:.1} MiB, sha256 {}…)", self.path.display(), &self.sha256[..12])
    }
}

/// Checks the requirements of the build: the profile, the Rust target and the linker. This takes milliseconds.
///
/// # Errors
/// Returns a usage error if the profile does not exist, and a failure of the host if another requirement is missing.
/// The error says what is missing and how to get it.
pub fn check(shell: &Shell, workspace: &Workspace, args: &BuildArgs) -> Result<Linker> {
    profile::check(workspace, &args.profile)?;
    let machine = args.arch.profile();
    let checked = check_tools(shell, workspace, machine);
    let what = format!("check the build tools for {}", machine.triple);
    checked.map_err(|error| host_fault(error, what, "cargo xtask preflight --fix installs what is missing"))
}

fn check_tools(shell: &Shell, workspace: &Workspace, machine: &MachineProfile) -> Result<Linker> {
    let triple = machine.triple;
    if !rust_target_installed(shell, triple)? {
        bail_host!(
            "build for {triple}: Rust's standard library for it is not installed";
            "run rustup target add {triple}; without rustup, install the distribution's package with this library"
        );
    }
    let configuration = Configuration::load(workspace)?;
    let linker = configuration.linker(machine)?;
    linker.check(shell, machine)?;
    compiler::check(shell, &configuration, machine, &linker.program)?;
    Ok(linker)
}

/// Builds the agent and reads the executable.
///
/// Another checkout may have built its agent into this checkout's target directory. Cargo then treats that executable
/// as up to date, because it compares only modification times (rust-lang/cargo#2383). This function deletes such an
/// executable and builds it again.
///
/// # Errors
/// Returns the errors of [`check`]. If the compiler finds an error in the source code, returns a failure of the guest.
/// In every other case, for example if cargo cannot reach the registry, returns a failure of the host.
pub fn build(shell: &Shell, workspace: &Workspace, args: &BuildArgs) -> Result<Agent> {
    let linker = check(shell, workspace, args)?;
    let machine = args.arch.profile();
    let what = format!("build {AGENT_PACKAGE} for {}", machine.triple);
    let built = compile(workspace, args, &linker, &what).and_then(|mut executable| {
        if !artifact::is_built_in(&executable, workspace.root())? {
            delete_build(workspace, args)?;
            executable = compile(workspace, args, &linker, &what)?;
        }
        let rustflags = Configuration::load(workspace)?.rustflags(machine)?;
        Agent::read(&executable, args.arch, Origin::Built { profile: args.profile.clone(), rustflags })
    });
    built.map_err(|error| host_fault(error, what.as_str(), "see the causes and cargo's messages above"))
}

/// Deletes the files that cargo has built for the packages of the agent.
fn delete_build(workspace: &Workspace, args: &BuildArgs) -> Result<()> {
    let mut command = workspace.cargo();
    command.args(["clean", "--quiet", "--target", args.arch.profile().triple, "--profile", &args.profile]);
    for package in AGENT_PACKAGES {
        command.args(["--package", package]);
    }
    let status = command.status().context("run cargo to delete the agent of another checkout")?;
    ensure!(status.success(), "delete the agent of another checkout: cargo {status}; see its messages above");
    Ok(())
}

/// Builds the agent with cargo, and returns the path of the executable.
fn compile(workspace: &Workspace, args: &BuildArgs, linker: &Linker, what: &str) -> Result<PathBuf> {
    let machine = args.arch.profile();
    let configuration = Configuration::load(workspace)?;
    // If the target directory is shared with another checkout, `Workspace::cargo` selects a directory of this checkout.
    let mut command = workspace.cargo();
    command.args(["build", "--package", AGENT_PACKAGE, "--bin", AGENT_PACKAGE, "--target", machine.triple]);
    command.args(["--profile", &args.profile]).envs(compiler::variable_for(&configuration, machine, linker));
    artifact::executable(&run_cargo(command, what)?, AGENT_PACKAGE)
}

/// Runs a `cargo build` that prints JSON messages. Prints the compiler's diagnostics in them, and returns all messages.
fn run_cargo(mut command: Command, what: &str) -> Result<String> {
    let on_terminal = std::io::stderr().is_terminal();
    let format = if on_terminal { "json-diagnostic-rendered-ansi" } else { "json" };
    // Cargo shows a bar if its own stderr is a terminal. Otherwise cargo's progress goes through this process, because
    // cargo fails if it cannot write its progress, for example after `2>&1 | head`.
    let stderr = if on_terminal { Stdio::inherit() } else { Stdio::piped() };
    command.args(["--message-format", format]).stdout(Stdio::piped()).stderr(stderr);
    let mut cargo = command.spawn().context("run cargo")?;
    let progress = cargo.stderr.take().map(|stderr| std::thread::spawn(move || pass_on(stderr)));
    let mut messages = String::new();
    let mut is_rejected = false;
    for line in BufReader::new(cargo.stdout.take().context("read cargo's messages")?).lines() {
        let line = line.context("read cargo's messages")?;
        if let Some(diagnostic) = artifact::diagnostic(&line) {
            // Cargo may show its progress in the last line of the terminal. Clear this line first.
            let clear = if on_terminal { "\r\x1b[K" } else { "" };
            write_message(&format!("{clear}{}", diagnostic.rendered.as_deref().unwrap_or_default()));
            is_rejected |= artifact::rejects_source(&diagnostic);
        }
        messages.push_str(&line);
        messages.push('\n');
    }
    let status = cargo.wait().context("wait for cargo")?;
    progress.map_or(Ok(()), |thread| thread.join().expect("a thread that passes lines on does not panic"))?;
    if status.success() {
        return Ok(messages);
    }
    if is_rejected {
        bail_guest!("{what}: the compiler rejects the source code"; "correct the errors above");
    }
    bail_host!(
        "{what}: cargo {status}, and no error in the source code; its messages are above";
        "nothing is known about the agent. A compiler that was killed (signal: 9) lacked memory: build with \
         CARGO_BUILD_JOBS=1. If the crate registry cannot be reached, check the network. If target/ is full, free space"
    )
}

/// Writes cargo's progress to stderr.
fn pass_on(progress: impl Read) -> Result<()> {
    for line in BufReader::new(progress).lines() {
        write_message(&(line.context("read cargo's progress")? + "\n"));
    }
    Ok(())
}

/// Returns whether rustc has a standard library for the target. rustup is not asked, because the Rust of a distribution
/// comes without rustup.
pub fn rust_target_installed(shell: &Shell, triple: &str) -> Result<bool> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let directory = cmd!(shell, "{rustc} --print target-libdir --target {triple}")
        .quiet()
        .read()
        .with_context(|| format!("ask rustc for the library directory of {triple}"))?;
    let found = std::fs::read_dir(directory.trim())
        .is_ok_and(|mut files| files.any(|file| file.is_ok_and(|file| is_std(&file.file_name()))));
    Ok(found)
}

fn is_std(name: &std::ffi::OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with("libstd-") && name.ends_with(".rlib"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error;

    /// Returns a diagnostic as a line of cargo's JSON messages.
    fn diagnostic(level: &str, text: &str, has_place: bool) -> String {
        let place = serde_json::json!({
            "file_name": "src/main.rs", "byte_start": 0, "byte_end": 1, "line_start": 1, "line_end": 1, "column_start": 1,
            "column_end": 2, "is_primary": true, "text": [], "label": null, "suggested_replacement": null,
            "suggestion_applicability": null, "expansion": null,
        });
        let spans: Vec<_> = has_place.then_some(place).into_iter().collect();
        serde_json::json!({
            "reason": "compiler-message", "package_id": "path+file:///w#iot-agent@0.1.0", "manifest_path": "/w/Cargo.toml",
            "target": {"kind": ["bin"], "crate_types": ["bin"], "name": "iot-agent", "src_path": "/w/main.rs",
                "edition": "2024", "doc": true, "doctest": false, "test": true},
            "message": {"message": text, "code": null, "level": level, "spans": spans, "children": [], "rendered": text},
        })
        .to_string()
    }

    /// Returns a command that replaces cargo: it prints `messages` and then runs the shell command `end`.
    fn cargo(messages: &str, end: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("printf '%s\\n' \"$0\"; {end}"), messages]);
        command
    }

    #[test]
    fn only_a_diagnostic_of_source_code_is_the_agents_fault() {
        let source = diagnostic("error", "mismatched types", true);
        let linker = diagnostic("error", "linking with `cc` failed: exit status: 1", false);
        let warning = diagnostic("warning", "unused variable", true);
        let table = [
            (source.as_str(), "exit 101", 1),
            (&linker, "exit 101", 69),
            // If rustc was killed or the registry cannot be reached, the JSON messages contain no error. Cargo reports
            // it only on stderr.
            (&warning, "exit 101", 69),
            ("", "exit 101", 69),
            ("", "kill -9 $$", 69),
        ];
        for (messages, end, code) in table {
            let error = run_cargo(cargo(messages, end), "build iot-agent").unwrap_err();
            assert_eq!(error::code(&error), code, "{messages} {end}: {error:#}");
            assert!(error::hint(&error).is_some(), "{error:#}");
        }
        assert!(run_cargo(cargo(&warning, "exit 0"), "build iot-agent").unwrap().contains("unused variable"));
        // Cargo does not get this process's stderr, which may be closed, unless it is a terminal.
        let own_stderr = "[ -t 2 ] || [ $(readlink /proc/self/fd/2) != $(readlink /proc/$PPID/fd/2) ]";
        run_cargo(cargo("", own_stderr), "build iot-agent").unwrap();
    }
}
