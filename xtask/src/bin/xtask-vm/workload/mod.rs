//! The smoke's workload as an image: `xtask/workload/main.rs` compiled for the guest, and packed by [`archive`] as podman
//! loads it. No registry has a part in it.

mod archive;

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest as _, Sha256};
use xshell::{Shell, cmd};
use xtask::agent_build::linker::Linker;
use xtask::agent_build::{elf, hex};
use xtask::arch::VmArchitecture;
use xtask::paths::{Cache, make_private_dir};
use xtask::workspace::Workspace;

/// The image's reference.
pub(crate) const IMAGE: &str = "localhost/iot-workload:1";

/// From the workspace's root.
const SOURCE: &str = "xtask/workload/main.rs";
/// Static, so that the image needs no other file, and small.
const FLAGS: [&str; 6] = [
    "--edition=2024",
    "--crate-name=workload",
    "-Ctarget-feature=+crt-static",
    "-Copt-level=s",
    "-Cpanic=abort",
    "-Cstrip=symbols",
];

/// The archive's name where the agent looks for images: its reference, as a file's name.
pub(crate) fn file_name() -> String {
    format!("{}.tar", IMAGE.replace(['/', ':'], "_"))
}

/// The image's archive for `arch`.
///
/// # Errors
/// Where rustc fails, with its own words; where the linker makes something else than was asked for.
pub(crate) fn image(workspace: &Workspace, cache: &Cache, arch: VmArchitecture) -> Result<Vec<u8>> {
    let program = program(workspace, cache, arch).context("compile the smoke's workload")?;
    archive::oci(IMAGE, arch.profile().debian_arch, &program).context("pack the workload's image")
}

/// The executable, kept by all that it is made of.
fn program(workspace: &Workspace, cache: &Cache, arch: VmArchitecture) -> Result<Vec<u8>> {
    let shell = Shell::new().context("start a shell of commands")?;
    let profile = arch.profile();
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = cmd!(shell, "{rustc} -vV").quiet().read().context("ask rustc for its version")?;
    let source = workspace.root().join(SOURCE);
    let text = std::fs::read(&source).with_context(|| format!("read {}", source.display()))?;
    let mut arguments: Vec<OsString> = FLAGS.map(OsString::from).to_vec();
    arguments.push(format!("--target={}", profile.triple).into());
    arguments.push("-C".into());
    let mut linker = OsString::from("linker=");
    linker.push(Linker::resolve(profile.triple, workspace.root())?.program);
    arguments.push(linker);

    let mut key = Sha256::new();
    key.update(Sha256::digest(&text));
    key.update(Sha256::digest(&version));
    arguments.iter().for_each(|word| key.update(Sha256::digest(word.as_encoded_bytes())));
    let kept = cache.workloads().join(format!("{arch}-{}", &hex(&key.finalize())[..16]));
    if !kept.exists() {
        // From the root: the path of the source is in the executable.
        let _root = shell.push_dir(workspace.root());
        compile(&shell, &rustc, &arguments, &kept)?;
    }
    let program = std::fs::read(&kept).with_context(|| format!("read {}", kept.display()))?;
    elf::check(&program, arch).with_context(|| format!("check {}", kept.display()))?;
    Ok(program)
}

/// Beside and renamed: another run may make the same.
fn compile(shell: &Shell, rustc: &OsString, arguments: &[OsString], kept: &Path) -> Result<()> {
    let directory = kept.parent().context("a file in the cache has a directory")?;
    make_private_dir(directory)?;
    let beside = tempfile::tempdir_in(directory)
        .with_context(|| format!("make a directory in {}", directory.display()))?;
    let made = beside.path().join("workload");
    cmd!(shell, "{rustc} {arguments...} -o {made} {SOURCE}").quiet().run()?;
    std::fs::rename(&made, kept).with_context(|| format!("rename {} to {}", made.display(), kept.display()))
}
