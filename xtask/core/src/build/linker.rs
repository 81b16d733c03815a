//! Checks the linker that cargo will use for a target, before the build.

use std::fmt;
use std::path::PathBuf;

use xshell::{Shell, cmd};

use crate::arch::MachineProfile;

/// The start-up file of the C library, which is linked into every executable.
const START_FILE: &str = "Scrt1.o";

/// A linker and the place that names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linker {
    /// The name of the linker on PATH, or its path.
    pub program: PathBuf,
    pub origin: LinkerOrigin,
}

/// The place that names a linker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkerOrigin {
    /// An environment variable.
    Variable(String),
    /// A flag for rustc. The value names the variable with the flags, or cargo's configuration.
    Flags(String),
    /// A file of cargo's configuration.
    File(String),
    /// No place names a linker, so rustc uses its default.
    Default,
}

impl LinkerOrigin {
    /// Returns how to correct a linker that a variable or a flag of the user names. Such a linker overrides that of the
    /// workspace's configuration. Therefore neither a package nor a change of this configuration helps.
    pub fn correction(&self) -> Option<String> {
        match self {
            Self::Variable(name) => Some(format!("unset {name}, or set it to such a linker")),
            Self::Flags(place) => Some(format!("remove -Clinker from {place}, or name such a linker there")),
            Self::File(_) | Self::Default => None,
        }
    }
}

impl fmt::Display for LinkerOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Variable(place) | Self::File(place) => f.write_str(place),
            Self::Flags(place) => write!(f, "-Clinker in {place}"),
            Self::Default => f.write_str("rustc's default"),
        }
    }
}

impl Linker {
    /// Runs the linker with `-dumpmachine`, and checks that it links executables for `machine` and finds the C library.
    ///
    /// # Errors
    /// Returns [`Unfit`]. Its text has the linker, the place that names the linker, the linker's output or error, and a
    /// remedy.
    pub fn check(&self, shell: &Shell, machine: &MachineProfile) -> Result<(), Unfit> {
        let link = format!("link for {}: {} (from {})", machine.triple, self.program.display(), self.origin);
        let preflight = format!("run: cargo xtask preflight --arch {} --fix", machine.arch);
        let unfit = |kind, reason: String, remedy: String| {
            let correction = self.origin.correction();
            let is_users = correction.is_some();
            let remedy = correction.unwrap_or(remedy);
            Unfit { kind, reason: format!("{link} {reason}"), remedy, is_users }
        };
        let output = self.ask(shell, "-dumpmachine").map_err(|error| {
            unfit(
                UnfitKind::Missing,
                format!("does not run: {error}"),
                format!("install {}-gcc, or {preflight}", machine.multiarch),
            )
        })?;
        if !fits(&output, machine) {
            let reason = format!("links executables for {:?}", output.trim());
            let (variable, gcc) = (machine.cargo_variable("LINKER"), machine.multiarch);
            let remedy = format!("set {variable} or .cargo/config.toml to {gcc}-gcc");
            return Err(unfit(UnfitKind::Foreign, reason, remedy));
        }
        // If the linker does not find this file, it cannot link any executable.
        if !self.finds(shell, START_FILE) {
            let reason = format!("has no C library to link with: -print-file-name={START_FILE} finds none");
            return Err(unfit(UnfitKind::Missing, reason, preflight));
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

/// The reason why a linker or a C compiler cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}; {remedy}")]
pub struct Unfit {
    pub kind: UnfitKind,
    pub reason: String,
    pub remedy: String,
    /// True if a variable or a flag of the user names the program. Only the user can change it then.
    pub is_users: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnfitKind {
    /// The linker or its C library is missing.
    Missing,
    /// The linker links executables for another machine.
    Foreign,
    /// cargo's configuration cannot be read.
    Configuration,
    /// The C compiler or its flags, which variables set, are not for this machine.
    Compiler,
}

/// Returns whether the output of `-dumpmachine` names this machine. gcc prints `aarch64-linux-gnu`, Fedora's gcc
/// `aarch64-redhat-linux`, and clang `x86_64-pc-linux-gnu`. A compiler for musl cannot link for a target with glibc.
fn fits(dumpmachine: &str, machine: &MachineProfile) -> bool {
    let mut parts = dumpmachine.trim().split('-');
    parts.next() == Some(machine.machine)
        && parts.any(|part| part == "linux")
        && !dumpmachine.contains("musl")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::VmArchitecture;

    #[test]
    fn compilers_are_known_by_what_they_say() {
        let (arm, x86) = (VmArchitecture::Aarch64.profile(), VmArchitecture::X86_64.profile());
        for (output, machine, expected) in [
            ("aarch64-linux-gnu\n", arm, true),
            ("aarch64-redhat-linux", arm, true),
            ("aarch64-linux-musl", arm, false),
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
        let own = Linker { program: "cc".into(), origin: LinkerOrigin::Default };
        let (path, version) = own.libc(&Shell::new().unwrap()).expect("this test links against a glibc");
        assert!(version.starts_with("2."), "{} says {version}", path.display());
    }

    #[test]
    fn a_linker_that_is_missing_or_foreign_is_refused() {
        let shell = Shell::new().unwrap();
        let arm = VmArchitecture::Aarch64.profile();
        let origin = LinkerOrigin::File("a test".to_owned());
        let missing = Linker { program: "/nonexistent/ld".into(), origin: origin.clone() };
        let error = missing.check(&shell, arm).unwrap_err();
        assert_eq!((error.kind, error.is_users), (UnfitKind::Missing, false));
        let text = error.to_string();
        assert!(text.contains("/nonexistent/ld (from a test)") && text.contains("preflight"), "{text}");
        let foreign = Linker { program: "echo".into(), origin };
        let error = foreign.check(&shell, arm).unwrap_err();
        assert_eq!(error.kind, UnfitKind::Foreign);
        assert!(error.reason.contains("links executables for \"-dumpmachine\""), "{error}");
        let variable = LinkerOrigin::Variable("MY_LINKER".to_owned());
        for program in ["/nonexistent/ld", "echo"] {
            let own = Linker { program: program.into(), origin: variable.clone() };
            let error = own.check(&shell, arm).unwrap_err();
            assert!(error.to_string().ends_with("; unset MY_LINKER, or set it to such a linker"), "{error}");
            assert!(error.is_users);
        }
    }
}
