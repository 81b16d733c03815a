//! The build of the agent: checks of the requirements, the build itself, and the executable that it makes.

pub mod artifact;
pub mod linker;
pub mod profile;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use xshell::{Shell, cmd};

use crate::arch::VmArchitecture;
use crate::cli::BuildArgs;
use crate::digest::Algorithm;
use crate::workspace::Workspace;

/// The package that is built and tested.
pub const AGENT_PACKAGE: &str = "iot-agent";

/// That package and the one in this workspace that it uses.
const AGENT_PACKAGES: [&str; 2] = [AGENT_PACKAGE, "agent-protocol"];

/// An executable that was read into memory.
#[derive(Debug, Clone)]
pub struct Agent {
    pub path: PathBuf,
    /// The content of the file. It is tested even if another file has this path later.
    pub content: Vec<u8>,
    /// The SHA-256 digest in lower-case hex.
    pub sha256: String,
    /// The architecture for which it was built.
    pub arch: VmArchitecture,
}

impl Agent {
    /// Reads the executable at `path`.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read.
    pub fn read(path: &Path, arch: VmArchitecture) -> Result<Self> {
        let bytes = fs_err::read(path)?;
        let sha256 = Algorithm::Sha256.of(&bytes).hex().to_owned();
        Ok(Self { path: path.to_owned(), content: bytes, sha256, arch })
    }

    /// Formats the path, the size and the digest for a message.
    pub fn describe(&self) -> String {
        let mib = self.content.len() as f64 / f64::from(1 << 20);
        format!("{} ({mib:.1} MiB, sha256 {}…)", self.path.display(), &self.sha256[..12])
    }
}

/// Checks the requirements of the build (the profile, the Rust target, the linker) within milliseconds.
///
/// # Errors
/// Returns an error that names what is missing and how to get it.
pub fn check(shell: &Shell, workspace: &Workspace, args: &BuildArgs) -> Result<linker::Linker> {
    profile::check(workspace.root(), &args.profile)?;
    let machine = args.arch.profile();
    anyhow::ensure!(
        rust_target_installed(shell, machine.triple)?,
        "build for {triple}: Rust's standard library for it is not installed; run: rustup target add {triple}",
        triple = machine.triple
    );
    let linker = linker::Linker::resolve(machine.triple, workspace.root())?;
    linker.check(shell, machine)?;
    Ok(linker)
}

/// Builds the agent and reads the executable.
///
/// Another checkout whose builds use this checkout's target directory leaves its executable there, and cargo takes it for up to
/// date, because it compares times only (rust-lang/cargo#2383). Such an executable is deleted and built again.
///
/// # Errors
/// Returns the errors of [`check`], and an error if cargo fails or its messages do not name exactly one executable.
pub fn build(shell: &Shell, workspace: &Workspace, args: &BuildArgs) -> Result<Agent> {
    check(shell, workspace, args)?;
    let mut executable = compile(workspace, args)?;
    if !artifact::is_built_in(&executable, workspace.root())? {
        delete_build(workspace, args)?;
        executable = compile(workspace, args)?;
    }
    Agent::read(&executable, args.arch)
}

/// Deletes what cargo has compiled of the agent's own packages.
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

/// Runs cargo, and returns the path of the executable.
fn compile(workspace: &Workspace, args: &BuildArgs) -> Result<PathBuf> {
    let triple = args.arch.profile().triple;
    // The build directory may contain intermediate files of another checkout, so cargo is run with the directories of
    // this workspace.
    let mut command = workspace.cargo();
    command.args(["build", "--package", AGENT_PACKAGE, "--bin", AGENT_PACKAGE, "--target", triple]);
    command.args(["--profile", &args.profile, "--message-format", "json-render-diagnostics"]);
    let what = || format!("build {AGENT_PACKAGE} for {triple}");
    let output = command.stderr(Stdio::inherit()).output().with_context(what)?;
    ensure!(
        output.status.success(),
        "{}: cargo {}; the compiler's own messages are above",
        what(),
        output.status
    );
    let messages = String::from_utf8(output.stdout).with_context(what)?;
    artifact::executable(&messages, AGENT_PACKAGE)
}

/// Returns whether rustc has a standard library for the target. This also works with a distribution's compiler, for
/// which there is no rustup.
///
/// # Errors
/// Returns an error if rustc does not run or does not know the target.
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
