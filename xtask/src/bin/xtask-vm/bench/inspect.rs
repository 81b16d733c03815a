//! `cargo xtask bench inspect`: the whole command on the agent and on executables of 100 MB, against what it may take.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use inspect::elf::Elf;
use xshell::Shell;
use xtask_core::arch::VmArchitecture;
use xtask_core::build;
use xtask_core::cache::Cache;
use xtask_core::cli::{BenchArgs, BuildArgs};
use xtask_core::fs::write_private;
use xtask_core::limits;
use xtask_core::workspace::Workspace;

use super::Scratch;
use super::preflight::{MeasuredCommand, TimingFigures, xtask_binary};
use xtask_jobs::Ui;

/// The size of the large ones.
const LARGE: usize = 100_000_000;

pub(super) fn run(workspace: &Workspace, args: &BenchArgs, ui: &Ui) -> Result<()> {
    let scratch = Scratch::new(&Cache::from_env()?, ui)?;
    let shell = Shell::new().context("start a shell of commands")?;
    let build = BuildArgs { arch: args.arch, profile: "release".to_owned() };
    let agent = build::build(&shell, workspace, &build)?;
    let own = std::env::current_exe().context("find this program")?;
    let of_host = VmArchitecture::of_host().context("this host's architecture")?;
    let subjects = [
        ("the agent".to_owned(), agent.path.clone(), args.arch, limits::INSPECTION),
        large(&scratch, &agent.path, args.arch)?,
        large(&scratch, &own, of_host)?,
    ];
    let mut measured = Vec::new();
    for (what, path, arch, limit) in subjects {
        let (path, name) = (path.to_str().context("a path of this cache")?, arch.to_string());
        // Of every instruction, that it is none of a newer core.
        let device = arch.pick("x86-64-v4", "pi5");
        let words = ["inspect", path, "--arch", &name, "--device", device];
        let inspection = MeasuredCommand {
            program: &xtask_binary()?,
            words: &words,
            what: &format!("inspect {what} for {name}"),
            limit,
        };
        measured.push(inspection.measure(args.rounds, ui)?);
    }
    TimingFigures::new("inspect", measured).conclude(args.json, "find the slow check in xtask/inspect")
}

/// The code of an executable, repeated.
fn large(
    scratch: &Scratch,
    source: &Path,
    arch: VmArchitecture,
) -> Result<(String, PathBuf, VmArchitecture, std::time::Duration)> {
    const START: usize = 4096;
    let bytes = std::fs::read(source).with_context(|| format!("read {}", source.display()))?;
    let elf = Elf::parse(&bytes).map_err(anyhow::Error::msg)?;
    let code = elf.code().into_iter().max_by_key(|code| code.bytes.len()).context("it has no code")?;
    ensure!(code.bytes.len() > START, "{} has hardly any code", source.display());
    // A header, one segment that is read and executed, an entry point in it (gABI).
    let mut file = vec![0; START];
    file[..20].copy_from_slice(&bytes[..20]);
    file[16] = 2;
    let words = [
        (24, START),
        (32, 64),
        (72, START),
        (80, START),
        (96, LARGE - START),
        (104, LARGE - START),
        (112, START),
    ];
    for (at, value) in words {
        file[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes());
    }
    for (at, value) in [(20, 1), (52, 64), (54, 56), (56, 1), (64, 1), (68, 5)] {
        file[at] = value;
    }
    file.extend(code.bytes.iter().cycle().take(LARGE - START));
    let path = scratch.path.join(format!("large-{arch}"));
    write_private(&path, file)?;
    Ok(("100 MB".to_owned(), path, arch, limits::INSPECTION_OF_100_MB))
}
