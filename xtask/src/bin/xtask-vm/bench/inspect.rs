//! `cargo xtask bench inspect`: measures `xtask-inspect`, without the build that precedes it, on the agent and on executables of 100 MB, and compares the
//! times with their limits. The large executables use a feature that the device lacks, so that the calls between all
//! their functions are followed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use inspect::elf::Elf;
use xtask_core::arch::VmArchitecture;
use xtask_core::fs::write_private;
use xtask_core::limits;

use super::Bench;
use super::preflight::{TimedCommand, binary_beside};

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
    let program = binary_beside("xtask-inspect", "cargo xtask inspect --help")?;
    Ok(TimedCommand { what, program, words, limit })
}

/// An instruction that no device of these measurements has: `rdseed eax`, and `cntb x0` of SVE.
const RDSEED: [u8; 3] = [0x0f, 0xc7, 0xf8];
const CNTB: [u8; 4] = 0x0420_e3e0u32.to_le_bytes();
/// The sizes of a function and of its entry in the unwinder's table, in bytes.
const FUNCTION: usize = 256;
const FRAME: usize = 8;

/// Makes an executable that begins with an instruction that the device lacks, and then repeats the code of `source`. The
/// unwinder's table divides the code into functions.
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
    let functions = (LARGE - START) / (FUNCTION + FRAME);
    let size = functions * FUNCTION;
    let mut file = head(&bytes[..20], START as u64, size as u64, (functions * FRAME) as u64);
    file.resize(START, 0);
    file.extend(arch.pick(&RDSEED[..], &CNTB));
    file.extend(code.bytes.iter().cycle().take(START + size - file.len()));
    file.extend([&[1, 0x1b, 3, 0x3b][..], &[0; 4], &(functions as u32).to_le_bytes()].concat());
    for function in 0..functions {
        let start = (function * FUNCTION) as i32 - size as i32;
        file.extend([start, 0].map(i32::to_le_bytes).as_flattened());
    }
    let path = bench.scratch.join(format!("large-{arch}"));
    write_private(&path, file)?;
    Ok(path)
}

/// Returns the file header, a segment of code that contains the entry point, and the header of the unwinder's table
/// behind it (gABI). `start` and `size` are those of the code, and `frames` is the size of the table's entries.
fn head(identity: &[u8], start: u64, size: u64, frames: u64) -> Vec<u8> {
    const TABLE: u32 = 0x6474_e550;
    let mut file = vec![0; 64 + 2 * 56];
    file[..20].copy_from_slice(identity);
    file[16] = 2;
    let (table, frames) = (start + size, frames + 12);
    let segment = [(64, 0x5_0000_0001, start, size), (120, 0x4_0000_0000 | u64::from(TABLE), table, frames)];
    for (at, kind, offset, size) in segment {
        for (index, value) in [kind, offset, offset, offset, size, size, start].into_iter().enumerate() {
            file[at + index * 8..][..8].copy_from_slice(&value.to_le_bytes());
        }
    }
    for (at, value) in [(24, start), (32, 64)] {
        file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    for (at, value) in [(20, 1), (52, 64), (54, 56), (56, 2)] {
        file[at] = value;
    }
    file
}
