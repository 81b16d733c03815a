//! Finds the files that a container starts: the file of its command, and the interpreters of scripts.

use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::config::ImageConfig;
use crate::walk::resolve;

/// The `PATH` of a container whose image sets none; podman and docker have the same.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The bytes of a script that Linux reads to find its interpreter (BINPRM_BUF_SIZE).
const SCRIPT: u64 = 256;

/// The interpreters that Linux follows if an interpreter is a script itself (execve(2)).
const MAX_SCRIPTS: usize = 5;

/// The types of ELF files that Linux executes (gABI, `e_type`): executables and shared objects.
const LINKED: [u8; 2] = [2, 3];

/// The files that a container starts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    /// The file of the command, and then the interpreter of each file that is a script. The paths are relative to the
    /// root and contain no link.
    pub files: Vec<PathBuf>,
    /// The command or interpreter that the tree does not have, or that is not executable. The last of `files` then needs
    /// it.
    pub missing: Option<String>,
    /// True if Linux does not execute the last of `files` ("exec format error"): it is neither a linked ELF file nor a
    /// script that names its interpreter.
    pub is_no_program: bool,
}

/// What Linux does with a file that is to be executed.
#[derive(Debug, PartialEq, Eq)]
enum Start {
    Elf,
    /// The interpreter and, if that is `env`, the program that it looks up.
    Script(Vec<String>),
    Nothing,
}

impl ImageConfig {
    /// Returns the files that a container of the image starts, in the tree of the image. Nothing is found if the image
    /// has neither an entrypoint nor a command.
    ///
    /// # Errors
    /// Returns an error that names the path if a file cannot be read.
    pub fn program(&self, root: &Path) -> Result<Program> {
        let mut program = Program::default();
        let mut wanted: Vec<String> = self.command().next().map(str::to_owned).into_iter().collect();
        for _ in 0..=MAX_SCRIPTS {
            let mut found = Vec::new();
            for name in std::mem::take(&mut wanted) {
                let Some(file) = self.find(root, &name)? else {
                    program.missing = Some(name);
                    return Ok(program);
                };
                found.push(file);
            }
            let Some(last) = found.last() else { break };
            let start = Start::of(&root.join(last))?;
            // env starts a file without an interpreter with the shell (execvp(3)).
            program.is_no_program = start == Start::Nothing && found.len() == 1;
            program.files.append(&mut found);
            if let Start::Script(names) = start {
                wanted = names;
            }
        }
        program.missing = wanted.into_iter().next();
        Ok(program)
    }

    /// Returns the interpreter of an executable script that the tree does not have, or that is not executable. `file` is
    /// relative to the root and contains no link.
    ///
    /// # Errors
    /// Returns an error that names the path if the script cannot be read.
    pub fn missing_interpreter(&self, root: &Path, file: &Path) -> Result<Option<String>> {
        if executable(root, file)?.is_none() {
            return Ok(None);
        }
        let Start::Script(names) = Start::of(&root.join(file))? else { return Ok(None) };
        for name in names {
            if self.find(root, &name)?.is_none() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// Returns the executable file that a name leads to: a path from the working directory, or a name in `PATH`.
    fn find(&self, root: &Path, name: &str) -> Result<Option<PathBuf>> {
        let directory = Path::new("/").join(&self.working_directory);
        if name.contains('/') {
            return executable(root, &directory.join(name));
        }
        let path = self.env.iter().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(PATH);
        for entry in path.split(':') {
            if let Some(found) = executable(root, &directory.join(entry).join(name))? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// Returns the file at a path of the tree, if it is executable. A path that leads through a file, or in a circle, has no
/// file.
fn executable(root: &Path, path: &Path) -> Result<Option<PathBuf>> {
    let Ok(Some(found)) = resolve(root, path) else { return Ok(None) };
    let metadata = fs_err::symlink_metadata(root.join(&found))?;
    let is_executable = metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
    Ok(is_executable.then_some(found))
}

impl Start {
    fn of(file: &Path) -> Result<Self> {
        let mut beginning = Vec::new();
        fs_err::File::open(file)?.take(SCRIPT).read_to_end(&mut beginning)?;
        if let Some(line) = beginning.strip_prefix(b"#!") {
            return Ok(Self::of_script(line));
        }
        // The byte order decides which byte of `e_type` has the value.
        let is_linked =
            beginning.get(16..18).is_some_and(|kind| kind.iter().any(|byte| LINKED.contains(byte)));
        let is_elf = beginning.starts_with(b"\x7fELF") && is_linked;
        Ok(if is_elf { Self::Elf } else { Self::Nothing })
    }

    /// Reads the first line of a script as Linux does (fs/binfmt_script.c). The interpreter ends at a space or a tab. The
    /// rest of the line is one argument. A carriage return belongs to the name, which is why scripts with the line ends
    /// of Windows do not start.
    fn of_script(line: &[u8]) -> Self {
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        let line = line.trim_matches([' ', '\t']);
        let (name, argument) = line.split_once([' ', '\t']).unwrap_or((line, ""));
        if name.is_empty() {
            return Self::Nothing;
        }
        let is_env = Path::new(name).file_name().is_some_and(|name| name.as_bytes() == b"env");
        // Linux does not search PATH.
        let name = if name.contains('/') { name.to_owned() } else { format!("./{name}") };
        let looked_up = is_env.then(|| looked_up(argument.trim_start_matches([' ', '\t']))).flatten();
        Self::Script([Some(name), looked_up].into_iter().flatten().collect())
    }
}

/// Returns the program that env(1) looks up. Only `-S` splits the argument of a script into words.
fn looked_up(argument: &str) -> Option<String> {
    let split = ["-S", "-vS", "--split-string="].iter().find_map(|flag| argument.strip_prefix(flag));
    let Some(words) = split else {
        let is_program = !argument.is_empty() && !argument.starts_with('-') && !argument.contains('=');
        return is_program.then(|| argument.to_owned());
    };
    let mut words = words.split_ascii_whitespace();
    while let Some(word) = words.next() {
        match word {
            "-u" | "--unset" | "-C" | "--chdir" => drop(words.next()),
            _ if word.starts_with('-') || word.contains('=') => {}
            _ => return Some(word.to_owned()),
        }
    }
    None
}
