//! The program to run, and what is checked before a machine starts. [`crate::container`] makes the subject of a
//! container image.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use inspect::elf::{Elf, Ident};
use xtask_archives::{Kind, PATH, Start, resolve};
use xtask_core::arch::VmArchitecture;
use xtask_core::cli::TryArgs;
use xtask_core::error::Failure;

use crate::container::kind_of;
use crate::root::Root;
use crate::wire::User;

/// The directory of the guest at which the program's own directory is mounted.
pub(crate) const SHARE: &str = "/try";

/// The length of the longer ELF header (gABI), that of ELFCLASS64.
const HEADER: usize = 64;
/// The first bytes of an ELF file (gABI).
const ELF_MAGIC: &[u8] = b"\x7fELF";
/// The types of ELF files that the kernel executes (gABI): ET_EXEC and ET_DYN.
const EXECUTABLE: [u16; 2] = [2, 3];

/// The program, as the host and the guest see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Subject {
    /// The directory of this host that the guest sees as [`SHARE`]; `None` if the program is in its file system.
    pub(crate) share: Option<PathBuf>,
    /// The path of the program in the guest.
    pub(crate) program: PathBuf,
    /// The working directory.
    pub(crate) directory: Vec<u8>,
    /// The program that the kernel needs to execute this one.
    pub(crate) runner: Option<Runner>,
    /// The variables of the environment, as `NAME=VALUE`. Of two with one name, the later one counts.
    pub(crate) environment: Vec<Vec<u8>>,
    /// The arguments. The first one is the program's own name.
    pub(crate) arguments: Vec<Vec<u8>>,
    pub(crate) user: User,
}

/// The environment of a program that is no container's, before `--env`.
const ENVIRONMENT: [(&str, &str); 4] =
    [("PATH", PATH), ("HOME", "/root"), ("LANG", "C.UTF-8"), ("TERM", "dumb")];

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
        let inner = root.within(path);
        let real = match (&inner, root) {
            (Some(inner), Root::Directory { path: directory, name }) => {
                let found = resolve(directory, inner).map_err(|error| refuse(format!("{error:#}")))?;
                directory.join(found.ok_or_else(|| refuse(format!("{name} has no such file")))?)
            }
            _ => path.canonicalize().map_err(|error| refuse(error.to_string()))?,
        };
        let about = real.metadata().map_err(|error| refuse(error.to_string()))?;
        if !about.is_file() {
            return Err(refuse("it is not a regular file".to_owned()).into());
        }
        if about.permissions().mode() & 0o111 == 0 {
            return Err(refuse(format!("it is not executable; run chmod +x {}", path.display())).into());
        }
        let runner = runner(&real, core).map_err(refuse)?;
        let (share, program, own_path, directory) = match inner {
            // A program may look for its files beside the link by which it was started.
            Some(inner) => (None, inner.clone(), inner, "/"),
            None => {
                let program = Path::new(SHARE).join(real.file_name().unwrap_or_default());
                let own_path = program.with_file_name(path.file_name().unwrap_or_default());
                (real.parent().map(Path::to_owned), program, own_path, SHARE)
            }
        };
        Ok(Self {
            share,
            arguments: vec![own_path.into_os_string().into_vec()],
            program,
            directory: directory.as_bytes().to_vec(),
            runner,
            environment: ENVIRONMENT.map(|(name, value)| format!("{name}={value}").into_bytes()).into(),
            user: User::default(),
        })
    }

    /// Adds the arguments and variables of the command line.
    pub(crate) fn given(mut self, args: &TryArgs) -> Self {
        self.environment.extend(args.env.iter().map(|variable| variable.as_bytes().to_vec()));
        self.arguments.extend(args.arguments.iter().map(|word| word.as_bytes().to_vec()));
        self
    }
}

/// Returns whether a path is a container image. Whatever is no archive is a program.
///
/// # Errors
/// Returns a usage error if the path is another archive, which names no program, or a damaged one.
pub(crate) fn is_image_at(path: &Path) -> Result<bool> {
    let is_readable = path.metadata().is_ok_and(|about| about.is_file() || about.is_dir());
    let is_program = || start_of(path, 4).is_ok_and(|start| start.starts_with(b"#!") || start == ELF_MAGIC);
    if !is_readable || is_program() {
        return Ok(false);
    }
    let Some(kind) = kind_of(path)? else { return Ok(false) };
    let shown = path.display();
    let unpack = match kind {
        Kind::DockerArchive | Kind::OciArchive | Kind::OciLayout => return Ok(true),
        Kind::Tar | Kind::Apk => format!("tar -C DIRECTORY -xf {shown}"),
        Kind::Zip | Kind::Wheel => format!("unzip -d DIRECTORY {shown}"),
        Kind::Deb => format!("dpkg-deb -x {shown} DIRECTORY"),
        Kind::Squashfs => format!("unsquashfs -d DIRECTORY {shown}"),
    };
    let message = format!(
        "try {shown}: it is a {kind}, which names no program to run; unpack it with {unpack}, and name a program of \
         the directory"
    );
    Err(Failure::usage(message).into())
}

fn start_of(path: &Path, length: usize) -> std::io::Result<Vec<u8>> {
    let mut start = Vec::new();
    File::open(path)?.take(length as u64).read_to_end(&mut start)?;
    Ok(start)
}

/// Returns the file that the kernel needs to execute the program; `None` for a static program.
pub(crate) fn runner(path: &Path, core: Core<'_>) -> Result<Option<Runner>, String> {
    let start = start_of(path, HEADER).map_err(|error| error.to_string())?;
    if start.starts_with(b"#!") {
        return interpreter(path).map(Some);
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
        Some(own) if own == arch => Err("it is an object file or a core dump, not an executable".to_owned()),
        Some(own) => {
            let other =
                default_device(own).map_or(String::new(), |name| format!(", or try it with --device {name}"));
            Err(format!("it is for {own}, and {device} is {arch}; build it for {arch}{other}"))
        }
        None => Err(format!(
            "it is for a machine that is neither x86_64 nor aarch64 (ELF class {}, e_machine {})",
            ident.class, ident.machine
        )),
    }
}

/// Returns the name of the device that an architecture has by default.
pub(crate) fn default_device(arch: VmArchitecture) -> Option<String> {
    let isa = xtask_inspection::isa(arch);
    let found = inspect::device::built_in().into_iter().find(|device| device.isa == isa && device.default);
    found.map(|device| device.name)
}

/// Returns the interpreter of a script.
fn interpreter(path: &Path) -> Result<Runner, String> {
    let start = Start::of(path).map_err(|error| format!("{error:#}"))?;
    let file = if let Start::Script { interpreter, .. } = start { interpreter } else { String::new() };
    if file.ends_with('\r') {
        return Err("its first line ends with a carriage return; convert it with dos2unix".to_owned());
    }
    if !file.starts_with('/') {
        return Err("its first line names no interpreter with an absolute path".to_owned());
    }
    Ok(Runner { file, what: "the interpreter" })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PI5: Core<'_> = Core { arch: VmArchitecture::Aarch64, device: "pi5" };

    /// Returns an ELF header of an executable without segments.
    fn header(class: u8, machine: u16, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0; 64];
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
        let table: [(&[u8], u32, &str); 8] = [
            (&header(2, 183, 2), 0o644, "chmod +x"),
            (
                &header(2, 62, 2),
                0o755,
                "it is for x86_64, and pi5 is aarch64; build it for aarch64, or try it with --device max-x86",
            ),
            (&header(2, 183, 1), 0o755, "object file or a core dump"),
            (&header(1, 40, 2), 0o755, "neither x86_64 nor aarch64"),
            (b"text", 0o755, "neither an executable nor a script"),
            (b"", 0o755, "it is empty"),
            (b"#!sh\n", 0o755, "absolute path"),
            (b"#!/bin/sh\r\n", 0o755, "dos2unix"),
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
    fn an_archive_without_a_program_is_refused_with_the_command_that_unpacks_it() {
        let place = Place(tempfile::tempdir().unwrap());
        let mut tar = tar::Builder::new(Vec::new());
        let mut entry = tar::Header::new_gnu();
        entry.set_size(0);
        tar.append_data(&mut entry, "bin/tool", &b""[..]).unwrap();
        let tar = tar.into_inner().unwrap();
        let mut package = b"!<arch>\n".to_vec();
        package.extend(format!("{:<48}{:<10}`\n2.0\n", "debian-binary", 4).bytes());
        let table: [(&[u8], &str); 4] = [
            (&tar, "it is a tar archive, which names no program to run; unpack it with tar"),
            (&package, "it is a Debian package, which names no program to run; unpack it with dpkg-deb -x"),
            (b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", "it is a zip archive"),
            (b"hsqs....", "unsquashfs -d DIRECTORY"),
        ];
        for (bytes, expected) in table {
            let error = is_image_at(&place.put("archive", bytes, 0o644)).unwrap_err();
            assert_eq!(xtask_core::error::code(&error), 2, "{error:#}");
            assert!(error.to_string().contains(expected), "{error}");
        }
        // A damaged archive is a usage error, too, and no exit code of a program.
        let error = is_image_at(&place.put("archive", b"\x1f\x8b\x08broken", 0o644)).unwrap_err();
        assert_eq!(xtask_core::error::code(&error), 2, "{error:#}");
        for bytes in [&header(2, 183, 2)[..], b"#!/bin/sh\n", b"text", b""] {
            assert!(!is_image_at(&place.put("program", bytes, 0o755)).unwrap());
        }
        assert!(!is_image_at(&place.0.path().join("missing")).unwrap());
        assert!(!is_image_at(place.0.path()).unwrap(), "a directory that is no layout");
    }

    #[test]
    fn a_program_of_the_sysroot_runs_in_its_place() {
        let place = Place(tempfile::tempdir().unwrap());
        let real = place.0.path().canonicalize().unwrap();
        let path = place.put("tool", b"#! /usr/bin/env python3\n", 0o755);
        let link = place.0.path().join("link");
        std::os::unix::fs::symlink("tool", &link).unwrap();
        let runner = Some(Runner { file: "/usr/bin/env".to_owned(), what: "the interpreter" });
        let shared = Subject::of(&link, &Root::Nothing, PI5).unwrap();
        assert_eq!(shared.runner, runner);
        assert_eq!((shared.share, shared.program), (Some(real.clone()), "/try/tool".into()));
        assert_eq!((shared.directory, shared.arguments), (b"/try".to_vec(), vec![b"/try/link".to_vec()]));
        let root = Root::Directory { path: real, name: String::new() };
        let inside = Subject::of(&path, &root, PI5).unwrap();
        assert_eq!((inside.share, inside.program), (None, "/tool".into()));
        assert_eq!((inside.directory, inside.arguments), (b"/".to_vec(), vec![b"/tool".to_vec()]));
        // On this host, this link leads nowhere.
        let link = place.0.path().join("absolute");
        std::os::unix::fs::symlink("/tool", &link).unwrap();
        let linked = Subject::of(&link, &root, PI5).unwrap();
        assert_eq!((linked.share, linked.program, linked.runner), (None, "/absolute".into(), inside.runner));
        assert_eq!(linked.arguments, vec![b"/absolute".to_vec()]);
        let error = Subject::of(&place.0.path().join("missing"), &root, PI5).unwrap_err();
        assert_eq!(xtask_core::error::code(&error), 2);
        let path = place.put("static", &header(2, 183, 2), 0o755);
        assert_eq!(Subject::of(&path, &Root::Nothing, PI5).unwrap().runner, None);
    }
}
