//! The program to run, and what is checked before a machine starts.
//!
//! A container archive would be another kind of subject: its root is the file system, and its entry point is the
//! program.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use inspect::elf::{Elf, Ident};
use xtask_core::arch::VmArchitecture;
use xtask_core::error::Failure;

use crate::root::Root;

/// The directory of the guest at which the program's own directory is mounted.
pub(crate) const SHARE: &str = "/try";

/// The longest first line of a script that Linux reads (BINPRM_BUF_SIZE).
const FIRST_LINE: usize = 256;
/// The length of an ELF header of 64 bits, and the place of `ustar` in a tar archive (pax(1)).
const HEADER: usize = 64;
const USTAR: usize = 257;
/// The types of ELF files that the kernel executes (gABI): ET_EXEC and ET_DYN.
const EXECUTABLE: [u16; 2] = [2, 3];

/// The program, as the host and the guest see it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Subject {
    /// The directory of this host that the guest sees as [`SHARE`]; `None` if the program is in its file system.
    pub(crate) share: Option<PathBuf>,
    /// The path of the program in the guest.
    pub(crate) program: PathBuf,
    /// The working directory.
    pub(crate) directory: String,
    /// The program that the kernel needs to execute this one.
    pub(crate) runner: Option<Runner>,
}

/// The file that the kernel executes with the program: a dynamic loader or an interpreter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Runner {
    pub(crate) file: String,
    /// A noun with its article, for messages.
    pub(crate) what: &'static str,
}

/// The architecture of a device, and its name for messages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Core<'a> {
    pub(crate) arch: VmArchitecture,
    pub(crate) device: &'a str,
}

impl Subject {
    /// Reads the program's header and returns how to run it.
    ///
    /// # Errors
    /// Returns a usage error if `path` is no executable file for the architecture of the device.
    pub(crate) fn of(path: &Path, root: &Root, core: Core<'_>) -> Result<Self> {
        let refuse = |why: String| Failure::usage(format!("try {}: {why}", path.display()));
        let real = path.canonicalize().map_err(|error| refuse(error.to_string()))?;
        let about = real.metadata().map_err(|error| refuse(error.to_string()))?;
        if !about.is_file() {
            return Err(refuse("it is not a regular file".to_owned()).into());
        }
        if about.permissions().mode() & 0o111 == 0 {
            return Err(refuse(format!("it is not executable; run chmod +x {}", path.display())).into());
        }
        let runner = runner(&real, core).map_err(refuse)?;
        if let Some(inner) = root.within(&real) {
            return Ok(Self { share: None, program: inner, directory: "/".to_owned(), runner });
        }
        let name = real.file_name().unwrap_or_default();
        let share = real.parent().map(Path::to_owned);
        Ok(Self { share, program: Path::new(SHARE).join(name), directory: SHARE.to_owned(), runner })
    }
}

/// Returns the file that the kernel needs to execute the program; `None` for a static program.
fn runner(path: &Path, core: Core<'_>) -> Result<Option<Runner>, String> {
    let mut start = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    file.take((USTAR + HEADER) as u64).read_to_end(&mut start).map_err(|error| error.to_string())?;
    if start.starts_with(b"#!") {
        return interpreter(&start).map(Some);
    }
    if start.get(USTAR..).is_some_and(|rest| rest.starts_with(b"ustar")) {
        let container =
            "it is an archive; unpack it, and name the directory with --sysroot and a program in it";
        return Err(container.to_owned());
    }
    let ident =
        Ident::read(&start).map_err(|why| format!("it is neither an executable nor a script: {why}"))?;
    check(ident, core)?;
    // If the rest of the file is damaged, the kernel says so.
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let loader = Elf::parse(&bytes).ok().and_then(|elf| elf.interpreter().ok().flatten());
    let file = loader.map(|loader| String::from_utf8_lossy(loader).into_owned());
    Ok(file.map(|file| Runner { file, what: "the dynamic loader" }))
}

fn check(ident: Ident, Core { arch, device }: Core<'_>) -> Result<(), String> {
    let is_64_bit = (ident.class, ident.data) == (2, 1);
    let own =
        VmArchitecture::ALL.into_iter().find(|own| own.profile().elf_machine == ident.machine && is_64_bit);
    match own {
        Some(own) if own == arch && EXECUTABLE.contains(&ident.kind) => Ok(()),
        Some(own) if own == arch => Err("it is an object file, not an executable; link it first".to_owned()),
        Some(own) => {
            let device_of = inspect::device::built_in()
                .into_iter()
                .find(|device| device.isa == xtask_inspection::isa(own) && device.default);
            let other = device_of
                .map_or(String::new(), |device| format!(", or try it with --device {}", device.name));
            Err(format!("it is for {own}, and {device} is {arch}; build it for {arch}{other}"))
        }
        None => Err(format!(
            "it is for a machine that is neither x86_64 nor aarch64 (ELF class {}, e_machine {})",
            ident.class, ident.machine
        )),
    }
}

/// Returns the interpreter in the first line of a script.
fn interpreter(start: &[u8]) -> Result<Runner, String> {
    let line = start[2..].split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = &line[..line.len().min(FIRST_LINE)];
    let word = line.split(|byte| b" \t".contains(byte)).find(|word| !word.is_empty()).unwrap_or_default();
    if word.ends_with(b"\r") {
        return Err("its first line ends with a carriage return; convert it with dos2unix".to_owned());
    }
    if !word.starts_with(b"/") {
        return Err("its first line names no interpreter with an absolute path".to_owned());
    }
    let file = std::ffi::OsStr::from_bytes(word).to_string_lossy().into_owned();
    Ok(Runner { file, what: "the interpreter" })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PI5: Core<'_> = Core { arch: VmArchitecture::Aarch64, device: "pi5" };

    /// Returns an ELF header of an executable without segments.
    fn header(class: u8, machine: u16, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1]);
        bytes[16..18].copy_from_slice(&kind.to_le_bytes());
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes
    }

    struct Place(tempfile::TempDir);

    impl Place {
        fn put(&self, name: &str, bytes: &[u8], mode: u32) -> PathBuf {
            let path = self.0.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    #[test]
    fn what_cannot_run_is_refused_before_a_machine_starts() {
        let place = Place(tempfile::tempdir().unwrap());
        let mut tar = vec![b'a'; 512];
        tar[USTAR..USTAR + 5].copy_from_slice(b"ustar");
        let table: [(&[u8], u32, &str); 9] = [
            (&header(2, 183, 2), 0o644, "chmod +x"),
            (
                &header(2, 62, 2),
                0o755,
                "it is for x86_64, and pi5 is aarch64; build it for aarch64, or try it with --device max-x86",
            ),
            (&header(2, 183, 1), 0o755, "object file"),
            (&header(1, 40, 2), 0o755, "neither x86_64 nor aarch64"),
            (b"text", 0o755, "neither an executable nor a script"),
            (b"", 0o755, "it is empty"),
            (b"#!sh\n", 0o755, "absolute path"),
            (b"#!/bin/sh\r\n", 0o755, "dos2unix"),
            (&tar, 0o755, "--sysroot"),
        ];
        for (bytes, mode, expected) in table {
            let path = place.put("program", bytes, mode);
            let error = Subject::of(&path, &Root::Nothing, PI5).unwrap_err();
            assert_eq!(xtask_core::error::code(&error), 2);
            assert!(error.to_string().contains(expected), "{error}");
        }
        for path in [place.0.path().join("missing"), place.0.path().to_owned()] {
            assert_eq!(xtask_core::error::code(&Subject::of(&path, &Root::Nothing, PI5).unwrap_err()), 2);
        }
    }

    #[test]
    fn a_program_of_the_sysroot_runs_in_its_place() {
        let place = Place(tempfile::tempdir().unwrap());
        let real = place.0.path().canonicalize().unwrap();
        let path = place.put("tool", b"#! /usr/bin/env python3\n", 0o755);
        let link = place.0.path().join("link");
        std::os::unix::fs::symlink("tool", &link).unwrap();
        let runner = Some(Runner { file: "/usr/bin/env".to_owned(), what: "the interpreter" });
        let shared = Subject {
            share: Some(real.clone()),
            program: "/try/tool".into(),
            directory: SHARE.to_owned(),
            runner: runner.clone(),
        };
        assert_eq!(Subject::of(&link, &Root::Nothing, PI5).unwrap(), shared);
        let inside = Subject { share: None, program: "/tool".into(), directory: "/".to_owned(), runner };
        assert_eq!(Subject::of(&path, &Root::Directory(real), PI5).unwrap(), inside);
        let path = place.put("static", &header(2, 183, 2), 0o755);
        assert_eq!(Subject::of(&path, &Root::Nothing, PI5).unwrap().runner, None);
    }
}
