//! `cargo xtask bench inspect`: measures the whole command on the agent and on executables of 100 MB, and compares the
//! times with their limits.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use inspect::elf::Elf;
use xtask_core::arch::VmArchitecture;
use xtask_core::fs::write_private;
use xtask_core::limits;

use super::Bench;
use super::preflight::{TimedCommand, xtask_binary};

/// The size of the large executables, in bytes.
const LARGE: usize = 100_000_000;

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let agent = bench.agent()?.path;
    let own = std::env::current_exe().context("find this program")?;
    let of_host = VmArchitecture::of_host().context("this host's architecture is not supported")?;
    let arch = bench.args.arch;
    let commands = [
        command("the agent", &agent, arch, limits::INSPECTION)?,
        command("100 MB", &large(bench, &agent, arch)?, arch, limits::INSPECTION_OF_100_MB)?,
        command("100 MB", &large(bench, &own, of_host)?, of_host, limits::INSPECTION_OF_100_MB)?,
    ];
    bench.check_times(&commands, "find the slow check in xtask/inspect")
}

fn command(what: &str, path: &Path, arch: VmArchitecture, limit: Duration) -> Result<TimedCommand> {
    let (what, name) = (format!("inspect {what} for {arch}"), arch.to_string());
    // With these devices, the inspection looks at every instruction for features of newer cores.
    let device = arch.pick("x86-64-v4", "pi5");
    let path = path.to_str().context("a path in the cache is not UTF-8")?;
    let words = ["inspect", path, "--arch", &name, "--device", device].map(str::to_owned).into();
    Ok(TimedCommand { what, program: xtask_binary()?, words, limit })
}

/// Makes an executable that repeats the code of `source`.
fn large(bench: &Bench<'_>, source: &Path, arch: VmArchitecture) -> Result<PathBuf> {
    const START: usize = 4096;
    let bytes = fs_err::read(source)?;
    let elf = Elf::parse(&bytes).map_err(anyhow::Error::msg)?;
    let code = elf
        .code()
        .into_iter()
        .max_by_key(|code| code.bytes.len())
        .with_context(|| format!("find code in {}", source.display()))?;
    ensure!(code.bytes.len() > START, "{} has hardly any code", source.display());
    // The file has a header and one segment, which is readable and executable and contains the entry point (gABI).
    let mut file = vec![0; START];
    file[..20].copy_from_slice(&bytes[..20]);
    file[16] = 2;
    let rest = LARGE - START;
    let words = [(24, START), (32, 64), (72, START), (80, START), (96, rest), (104, rest), (112, START)];
    for (at, value) in words {
        file[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes());
    }
    for (at, value) in [(20, 1), (52, 64), (54, 56), (56, 1), (64, 1), (68, 5)] {
        file[at] = value;
    }
    file.extend(code.bytes.iter().cycle().take(rest));
    let path = bench.scratch.join(format!("large-{arch}"));
    write_private(&path, file)?;
    Ok(path)
}
