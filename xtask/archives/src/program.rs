//! Finds the files that a container starts: the file of its command, and the interpreters of scripts.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::config::ImageConfig;
use crate::start::Start;
use crate::walk::resolve;

/// The `PATH` of a container whose image sets none; podman and docker have the same.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The interpreters that Linux follows if an interpreter is a script itself (execve(2)).
pub const MAX_SCRIPTS: usize = 5;

/// The files that a container starts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    /// The file of the command, and then the interpreter of each file that is a script. The paths are relative to the
    /// root and contain no link.
    pub files: Vec<PathBuf>,
    /// The command or interpreter that the tree does not have, or that is not executable. The last of `files` then
    /// needs it.
    pub missing: Option<String>,
    /// True if Linux does not execute the last of `files` ("exec format error"): it is neither a linked ELF file nor a
    /// script that names its interpreter.
    pub is_no_program: bool,
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
            if let Start::Script { interpreter, looked_up } = start {
                wanted = [Some(interpreter), looked_up].into_iter().flatten().collect();
            }
        }
        program.missing = wanted.into_iter().next();
        Ok(program)
    }

    /// Returns the interpreter of an executable script that the tree does not have, or that is not executable. `file`
    /// is relative to the root and contains no link.
    ///
    /// # Errors
    /// Returns an error that names the path if the script cannot be read.
    pub fn missing_interpreter(&self, root: &Path, file: &Path) -> Result<Option<String>> {
        if executable(root, file)?.is_none() {
            return Ok(None);
        }
        let Start::Script { interpreter, looked_up } = Start::of(&root.join(file))? else { return Ok(None) };
        for name in [Some(interpreter), looked_up].into_iter().flatten() {
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

/// Returns the file at a path of the tree, if it is executable. A path that leads through a file, or in a circle, has
/// no file.
fn executable(root: &Path, path: &Path) -> Result<Option<PathBuf>> {
    let Ok(Some(found)) = resolve(root, path) else { return Ok(None) };
    let metadata = fs_err::symlink_metadata(root.join(&found))?;
    let is_executable = metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
    Ok(is_executable.then_some(found))
}
