//! What Linux does with a file that is to be executed: the first line of a script, and the header of an ELF file.

use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use anyhow::Result;

/// The bytes of a file that Linux reads to find out how to execute it (BINPRM_BUF_SIZE).
const READ: u64 = 256;

/// The types of ELF files that Linux executes (gABI, `e_type`): executables and shared objects.
const LINKED: [u8; 2] = [2, 3];

/// What Linux does with a file that is to be executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    Elf,
    Script {
        /// The path of the interpreter. A relative one, which begins with `./` or another directory, is looked for in
        /// the working directory.
        interpreter: String,
        /// The program that the interpreter `env` looks up in `PATH`.
        looked_up: Option<String>,
    },
    /// Linux does not execute the file.
    Nothing,
}

impl Start {
    /// Reads the beginning of a file.
    ///
    /// # Errors
    /// Returns an error that names the path if the file cannot be read.
    pub fn of(file: &Path) -> Result<Self> {
        let mut beginning = Vec::new();
        fs_err::File::open(file)?.take(READ).read_to_end(&mut beginning)?;
        if let Some(line) = beginning.strip_prefix(b"#!") {
            return Ok(Self::of_script(line));
        }
        // The byte order decides which byte of `e_type` has the value.
        let is_linked =
            beginning.get(16..18).is_some_and(|kind| kind.iter().any(|byte| LINKED.contains(byte)));
        let is_elf = beginning.starts_with(b"\x7fELF") && is_linked;
        Ok(if is_elf { Self::Elf } else { Self::Nothing })
    }

    /// Reads the first line of a script as Linux does (fs/binfmt_script.c). The interpreter ends at a space or a tab.
    /// The rest of the line is one argument. A carriage return belongs to the name, which is why scripts with the line
    /// ends of Windows do not start.
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
        Self::Script { interpreter: name, looked_up }
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
