//! Finds the linker that cargo will use for a target, by cargo's own rules, and checks this linker before the build.
//!
//! The first of these places that names a linker decides (The Cargo Book, Configuration): the environment variable,
//! `.cargo/config.toml` in the workspace and its parent directories, the configuration in `$CARGO_HOME`, and rustc's
//! default. In a directory that also has the older file `.cargo/config`, cargo reads the older file.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xshell::{Shell, cmd};

use crate::arch::MachineProfile;
use crate::fs::read_if_there;

/// The linker that rustc uses for a linux-gnu target if no linker is configured.
const DEFAULT: &str = "cc";

/// The start-up file of the C library, which is linked into every executable.
const START_FILE: &str = "Scrt1.o";

/// A linker and the place where it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linker {
    /// The name of the linker on PATH, or its path.
    pub program: PathBuf,
    /// The place that names the linker: an environment variable, a file, or rustc's default.
    pub origin: String,
}

impl Linker {
    /// Finds the linker that cargo would use for `triple` in `workspace`.
    ///
    /// # Errors
    /// Returns an error if a configuration file cannot be read or is not valid TOML.
    pub fn resolve(triple: &str, workspace: &Path) -> Result<Self> {
        let home = std::env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
        Self::resolve_from(triple, workspace, home.as_deref(), |name| std::env::var_os(name))
    }

    fn resolve_from(
        triple: &str,
        workspace: &Path,
        cargo_home: Option<&Path>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self> {
        let name = variable_name(triple);
        if let Some(program) = variable(&name).filter(|value| !value.is_empty()) {
            return Ok(Self { program: program.into(), origin: name });
        }
        let upwards = workspace.ancestors().map(|directory| directory.join(".cargo"));
        for directory in upwards.chain(cargo_home.map(Path::to_owned)) {
            for file in ["config", "config.toml"] {
                let path = directory.join(file);
                let Some(text) = read_if_there(&path)? else { continue };
                let origin = path.display().to_string();
                let configured = configured(&text, triple);
                if let Some(program) = configured.with_context(|| format!("read the linker from {origin}"))? {
                    return Ok(Self { program: relative_to_config(&program, &directory), origin });
                }
                break;
            }
        }
        Ok(Self { program: DEFAULT.into(), origin: "rustc's default".to_owned() })
    }

    /// Runs the linker with `-dumpmachine`, and checks that it links executables for `machine` and finds the C library.
    ///
    /// # Errors
    /// Returns [`Unfit`]. Its text has the linker, the place that names the linker, the linker's output or error, and a
    /// remedy.
    pub fn check(&self, shell: &Shell, machine: &MachineProfile) -> Result<(), Unfit> {
        let (program, arch) = (&self.program, machine.arch);
        let output = self.ask(shell, "-dumpmachine").map_err(|error| {
            Unfit::Missing(format!(
                "run the linker {} (from {}) for {}: {error}; install {}-gcc, or run: cargo xtask preflight --arch {arch} --fix",
                program.display(),
                self.origin,
                machine.triple,
                machine.multiarch
            ))
        })?;
        let link = format!("link for {}: {} (from {})", machine.triple, program.display(), self.origin);
        if !fits(&output, machine) {
            return Err(Unfit::Foreign(format!(
                "{link} links executables for {:?}; set {} or .cargo/config.toml to {}-gcc",
                output.trim(),
                variable_name(machine.triple),
                machine.multiarch
            )));
        }
        // If the linker does not find this file, it cannot link any executable.
        if !self.finds(shell, START_FILE) {
            return Err(Unfit::Missing(format!(
                "{link} has no C library to link with: -print-file-name={START_FILE} finds none; run: cargo xtask \
                 preflight --arch {arch} --fix"
            )));
        }
        Ok(())
    }

    /// Returns whether the linker finds a file of the C library. A linker that finds the file prints its path, and
    /// otherwise only the given name.
    pub fn finds(&self, shell: &Shell, file: &str) -> bool {
        self.ask(shell, &format!("-print-file-name={file}")).is_ok_and(|path| path.trim() != file)
    }

    fn ask(&self, shell: &Shell, question: &str) -> xshell::Result<String> {
        let program = &self.program;
        cmd!(shell, "{program} {question}").quiet().ignore_stderr().read()
    }

    /// Returns the path and the version (`2.36`) of glibc. The version is read from the library itself. Returns `None`
    /// if the linker finds no glibc, for example because it uses musl.
    pub fn libc(&self, shell: &Shell) -> Option<(PathBuf, String)> {
        let path = self.ask(shell, "-print-file-name=libc.so.6").ok()?;
        let path = PathBuf::from(path.trim());
        let version = glibc_version(&std::fs::read(&path).ok()?)?;
        Some((path, version))
    }
}

/// Returns the version from glibc's banner: `GNU C Library (…) stable release version 2.36.`
fn glibc_version(library: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(library);
    let (_, rest) = text.split_once(" release version ")?;
    let version: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    Some(version.trim_end_matches('.').to_owned()).filter(|version| version.contains('.'))
}

/// The reason why a linker cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub enum Unfit {
    /// The linker or its C library is missing.
    Missing(String),
    /// The linker links executables for another machine.
    Foreign(String),
    /// The configuration of the linker cannot be read.
    Configuration(String),
}

/// Returns the name of cargo's variable for the linker of a target: `CARGO_TARGET_<TRIPLE>_LINKER`.
fn variable_name(triple: &str) -> String {
    format!("CARGO_TARGET_{}_LINKER", triple.to_uppercase().replace('-', "_"))
}

/// Returns the value of `target.<triple>.linker` in one configuration file.
fn configured(text: &[u8], triple: &str) -> Result<Option<String>> {
    let table: toml::Table = toml::from_slice(text)?;
    let linker = table.get("target").and_then(|target| target.get(triple)).and_then(|t| t.get("linker"));
    let Some(linker) = linker else { return Ok(None) };
    let program = linker.as_str().with_context(|| format!("linker is not a string: {linker:?}"))?;
    Ok(Some(program.to_owned()))
}

/// Resolves a program that a configuration file names. A path is relative to the directory that contains `.cargo`. A
/// name without a slash stays as it is, because cargo searches it on PATH.
fn relative_to_config(program: &str, config_directory: &Path) -> PathBuf {
    match config_directory.parent() {
        Some(parent) if program.contains('/') => parent.join(program),
        _ => program.into(),
    }
}

/// Returns whether the output of `-dumpmachine` names this machine. gcc prints `aarch64-linux-gnu`, Fedora's gcc
/// `aarch64-redhat-linux`, and clang `x86_64-pc-linux-gnu`.
fn fits(dumpmachine: &str, machine: &MachineProfile) -> bool {
    let mut parts = dumpmachine.trim().split('-');
    parts.next() == Some(machine.machine) && parts.any(|part| part == "linux")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::VmArchitecture;

    const TRIPLE: &str = "aarch64-unknown-linux-gnu";

    fn config(directory: &Path, file: &str, linker: &str) {
        std::fs::create_dir_all(directory.join(".cargo")).unwrap();
        let text = format!("[target.{TRIPLE}]\nlinker = \"{linker}\"\n");
        std::fs::write(directory.join(".cargo").join(file), text).unwrap();
    }

    #[test]
    fn the_search_goes_as_cargos_does() {
        let root = tempfile::tempdir().unwrap();
        let (inner, home) = (root.path().join("a/b"), root.path().join("home"));
        std::fs::create_dir_all(&inner).unwrap();
        let none = |_: &str| None;
        let resolve = |variable: &dyn Fn(&str) -> Option<OsString>| {
            Linker::resolve_from(TRIPLE, &inner, Some(&home.join(".cargo")), variable).unwrap()
        };
        assert_eq!(resolve(&none).program, Path::new("cc"), "rustc's default");
        config(&home, "config.toml", "from-home");
        assert_eq!(resolve(&none).program, Path::new("from-home"));
        config(&root.path().join("a"), "config.toml", "from-parent");
        assert_eq!(resolve(&none).program, Path::new("from-parent"));
        config(&inner, "config.toml", "tools/ld");
        assert_eq!(resolve(&none).program, inner.join("tools/ld"), "relative to the directory of .cargo");
        config(&inner, "config", "older-name");
        assert_eq!(
            resolve(&none).program,
            Path::new("older-name"),
            "cargo prefers the name without an ending"
        );
        let set =
            |name: &str| (name == "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER").then(|| "mine".into());
        assert_eq!(resolve(&set).program, Path::new("mine"));
    }

    #[test]
    fn a_broken_configuration_is_named() {
        let root = tempfile::tempdir().unwrap();
        config(root.path(), "config.toml", "x");
        std::fs::write(root.path().join(".cargo/config.toml"), "[target\n").unwrap();
        let error = Linker::resolve_from(TRIPLE, root.path(), None, |_| None).unwrap_err();
        assert!(format!("{error:#}").contains(".cargo/config.toml"), "{error:#}");
    }

    #[test]
    fn compilers_are_known_by_what_they_say() {
        let (arm, x86) = (VmArchitecture::Aarch64.profile(), VmArchitecture::X86_64.profile());
        for (output, machine, expected) in [
            ("aarch64-linux-gnu\n", arm, true),
            ("aarch64-redhat-linux", arm, true),
            ("x86_64-linux-gnu", arm, false),
            ("aarch64-none-elf", arm, false),
            ("x86_64-pc-linux-gnu", x86, true),
            ("", x86, false),
        ] {
            assert_eq!(fits(output, machine), expected, "{output:?}");
        }
    }

    #[test]
    fn a_c_library_tells_its_own_version() {
        let banner = b"\0GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.\nCopyright";
        assert_eq!(glibc_version(banner).as_deref(), Some("2.36"));
        assert_eq!(glibc_version(b"musl libc (aarch64)"), None);
        let own = Linker { program: DEFAULT.into(), origin: "a test".into() };
        let (path, version) = own.libc(&Shell::new().unwrap()).expect("this test links against a glibc");
        assert!(version.starts_with("2."), "{} says {version}", path.display());
    }

    #[test]
    fn a_linker_that_is_missing_or_foreign_is_refused() {
        let shell = Shell::new().unwrap();
        let arm = VmArchitecture::Aarch64.profile();
        let origin = "a test".to_owned();
        let missing = Linker { program: "/nonexistent/ld".into(), origin: origin.clone() };
        let error = format!("{:#}", missing.check(&shell, arm).unwrap_err());
        assert!(error.contains("/nonexistent/ld (from a test)") && error.contains("preflight"), "{error}");
        let foreign = Linker { program: "echo".into(), origin };
        let error = format!("{:#}", foreign.check(&shell, arm).unwrap_err());
        assert!(error.contains("links executables for \"-dumpmachine\""), "{error}");
    }
}
