//! Programs of this workspace that rustc compiles alone, without cargo, for a guest: static executables that need no
//! other file there, and libraries that a program of the guest preloads.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xshell::{Shell, cmd};

use super::configuration::Configuration;
use crate::arch::VmArchitecture;
use crate::cache::Cache;
use crate::digest::Algorithm;
use crate::fs::{make_private_dir, remove_file, write_private};
use crate::workspace::Workspace;

/// rustc's flags for an executable. The program is static, so that the guest needs no other file, and small.
const FLAGS: [&str; 5] =
    ["--edition=2024", "-Ctarget-feature=+crt-static", "-Copt-level=s", "-Cpanic=abort", "-Cstrip=symbols"];

/// rustc's flags for a shared library. Without the optimisation of the whole library, it would need a function of std
/// that unwinds the stack.
const SHARED: [&str; 6] = [
    "--edition=2024",
    "--crate-type=cdylib",
    "-Copt-level=s",
    "-Clto=fat",
    "-Cpanic=abort",
    "-Cstrip=symbols",
];

/// A program that rustc compiles alone.
#[derive(Debug, Clone, Copy)]
pub struct Standalone {
    /// The name of the crate.
    pub name: &'static str,
    /// The paths of the sources, relative to the workspace's root. rustc compiles the first one, which names the
    /// others.
    pub sources: &'static [&'static str],
}

impl Standalone {
    /// Returns the executable for `arch` and its path in the cache. It is cached under a digest of its sources, rustc's
    /// version and rustc's arguments.
    ///
    /// # Errors
    /// Returns an error if a source cannot be read, if no linker for `arch` is known, or if rustc fails.
    pub fn executable(
        &self,
        workspace: &Workspace,
        cache: &Cache,
        arch: VmArchitecture,
    ) -> Result<(Vec<u8>, PathBuf)> {
        self.compiled(&FLAGS, workspace, cache, arch)
    }

    /// Returns the shared library for `arch` and its path in the cache, like [`Standalone::executable`]. A loader can
    /// put it before the C library (ld.so(8), `LD_PRELOAD`).
    ///
    /// # Errors
    /// Returns the same errors as [`Standalone::executable`].
    pub fn shared_library(
        &self,
        workspace: &Workspace,
        cache: &Cache,
        arch: VmArchitecture,
    ) -> Result<(Vec<u8>, PathBuf)> {
        self.compiled(&SHARED, workspace, cache, arch)
    }

    fn compiled(
        &self,
        flags: &[&str],
        workspace: &Workspace,
        cache: &Cache,
        arch: VmArchitecture,
    ) -> Result<(Vec<u8>, PathBuf)> {
        let shell = Shell::new().context("create the shell that runs commands")?;
        let profile = arch.profile();
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let version = cmd!(shell, "{rustc} -vV").quiet().read().context("ask rustc for its version")?;
        let mut linker = OsString::from("-Clinker=");
        linker.push(Configuration::load(workspace)?.linker(profile)?.program);
        let mut arguments: Vec<OsString> = flags.iter().map(OsString::from).collect();
        arguments.extend(
            [format!("--crate-name={}", self.name), format!("--target={}", profile.triple)]
                .map(OsString::from),
        );
        arguments.push(linker);

        let mut key = Algorithm::Sha256.hasher();
        let mut add = |part: &[u8]| key.update(Algorithm::Sha256.of(part).hex().as_bytes());
        for source in self.sources {
            add(&fs_err::read(workspace.root().join(source))?);
        }
        add(version.as_bytes());
        arguments.iter().for_each(|word| add(word.as_encoded_bytes()));
        let kept = cache.workloads().join(format!("{arch}-{}", &key.finish().hex()[..16]));
        if let Some(program) = kept_program(&kept) {
            return Ok((program, kept));
        }
        // rustc runs in the workspace's root, because the executable contains the path of the source.
        let _root = shell.push_dir(workspace.root());
        arguments.push(self.sources[0].into());
        compile(&shell, &rustc, &arguments, &kept)?;
        Ok((fs_err::read(&kept)?, kept))
    }
}

/// Returns a cached executable; `None` if there is none, or if its digest is not the recorded one, for example after a
/// crash of this host.
fn kept_program(kept: &Path) -> Option<Vec<u8>> {
    let program = std::fs::read(kept).ok()?;
    let recorded = std::fs::read_to_string(digest_path(kept)).ok()?;
    (Algorithm::Sha256.of(&program).hex() == recorded.trim()).then_some(program)
}

fn digest_path(kept: &Path) -> PathBuf {
    kept.with_extension("sha256")
}

/// Returns the path at which a process compiles an executable. rustc puts its object files beside its output, and their
/// names begin with the output's name without its extension. If the process id were an extension, two processes would
/// overwrite each other's object files.
fn beside(kept: &Path, process: u32) -> PathBuf {
    let mut path = kept.as_os_str().to_owned();
    path.push(format!("-{process}"));
    PathBuf::from(path)
}

/// Compiles beside the target file, records the digest and then renames the result, because another run may make the
/// same file. The same compiler makes the same bytes.
fn compile(shell: &Shell, rustc: &OsString, arguments: &[OsString], kept: &Path) -> Result<()> {
    make_private_dir(kept.parent().context("the program's path has no parent directory")?)?;
    let beside = beside(kept, std::process::id());
    let made = || {
        cmd!(shell, "{rustc} {arguments...} -o {beside}").quiet().run()?;
        write_private(&digest_path(kept), Algorithm::Sha256.of(&fs_err::read(&beside)?).hex())?;
        Ok(fs_err::rename(&beside, kept)?)
    };
    made().inspect_err(|_: &anyhow::Error| drop(remove_file(&beside)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_processes_that_compile_the_same_program_use_different_object_files() {
        let of = |process| beside(Path::new("/c/workload/aarch64-0123"), process);
        assert_ne!(of(7).file_stem(), of(8).file_stem());
        assert_eq!(of(7).parent(), Some(Path::new("/c/workload")));
    }

    #[test]
    fn a_cached_executable_that_was_changed_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let kept = directory.path().join("aarch64-0123");
        assert_eq!(kept_program(&kept), None);
        std::fs::write(&kept, "program").unwrap();
        assert_eq!(kept_program(&kept), None, "its digest is not recorded");
        std::fs::write(digest_path(&kept), Algorithm::Sha256.of(b"program").hex()).unwrap();
        assert_eq!(kept_program(&kept).unwrap(), b"program");
        std::fs::write(&kept, "progra").unwrap();
        assert_eq!(kept_program(&kept), None, "it was truncated");
    }
}
