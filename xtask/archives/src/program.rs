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

/// The files that a container starts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    /// The file of the command, and then the interpreter of each file that is a script. The paths are relative to the
    /// root and contain no link.
    pub files: Vec<PathBuf>,
    /// The command or interpreter that the tree does not have, or that is not executable. The last of `files` then needs
    /// it.
    pub missing: Option<String>,
}

impl ImageConfig {
    /// Returns the files that a container of the image starts, in the tree of the image. Nothing is found if the image
    /// has neither an entrypoint nor a command.
    ///
    /// # Errors
    /// Returns an error that names the path if a file cannot be read.
    pub fn program(&self, root: &Path) -> Result<Program> {
        let mut program = Program::default();
        let mut wanted = self.command().next().map(str::to_owned);
        while let Some(name) = wanted {
            let Some(file) = self.find(root, &name)? else {
                program.missing = Some(name);
                break;
            };
            wanted = interpreter(&root.join(&file))?;
            program.files.push(file);
            if program.files.len() > MAX_SCRIPTS {
                program.missing = wanted.take();
            }
        }
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
        let Some(name) = interpreter(&root.join(file))? else { return Ok(None) };
        Ok(self.find(root, &name)?.is_none().then_some(name))
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

/// Returns the interpreter that a script names: `#!/bin/sh`, or the program that `#!/usr/bin/env python3` looks up.
fn interpreter(file: &Path) -> Result<Option<String>> {
    let mut beginning = Vec::new();
    fs_err::File::open(file)?.take(SCRIPT).read_to_end(&mut beginning)?;
    let Some(line) = beginning.strip_prefix(b"#!") else { return Ok(None) };
    let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split_ascii_whitespace();
    let Some(first) = words.next() else { return Ok(None) };
    let is_env = Path::new(first).file_name().is_some_and(|name| name.as_bytes() == b"env");
    // env(1) takes flags, such as -S, and variables before the program.
    let looked_up = words.find(|word| is_env && !word.starts_with('-') && !word.contains('='));
    Ok(Some(looked_up.unwrap_or(first).to_owned()))
}
