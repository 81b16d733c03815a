//! Makes archives of each kind, and unpacks them.

mod broken;
mod hostile;
mod images;
mod kinds;
mod make;
mod programs;
#[cfg(feature = "real")]
mod real;

use std::path::{Path, PathBuf};

use anyhow::Result;
use tempfile::TempDir;

use crate::{Limits, Request, Unpacked, unpack};

/// A directory for an archive, and another one inside for its content.
pub(super) struct Place {
    directory: TempDir,
}

impl Place {
    pub(super) fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    /// Writes an archive. Its name says nothing about its kind.
    pub(super) fn archive(&self, bytes: &[u8]) -> PathBuf {
        let path = self.directory.path().join("shipped");
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Returns the directory into which this place unpacks.
    pub(super) fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    pub(super) fn unpack(&self, bytes: &[u8]) -> Result<Unpacked> {
        self.unpack_with(bytes, &Request::default())
    }

    pub(super) fn unpack_with(&self, bytes: &[u8], request: &Request) -> Result<Unpacked> {
        unpack(&self.archive(bytes), &self.root(), request, &mut |_, _| Ok(()))
    }

    pub(super) fn limited(&self, bytes: &[u8], limits: Limits) -> Result<Unpacked> {
        self.unpack_with(bytes, &Request { limits, ..Request::default() })
    }

    /// Returns the files and links below the directory, sorted, each with its content or target.
    pub(super) fn tree(&self) -> Vec<(String, String)> {
        let (root, mut found) = (self.root(), Vec::new());
        let mut pending = vec![root.clone()];
        while let Some(directory) = pending.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let entry = entry.unwrap();
                let (path, kind) = (entry.path(), entry.file_type().unwrap());
                if kind.is_dir() {
                    pending.push(path);
                    continue;
                }
                let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
                let content = match std::fs::read_link(&path) {
                    Ok(target) => format!("-> {}", target.display()),
                    Err(_) => String::from_utf8(std::fs::read(&path).unwrap()).unwrap(),
                };
                found.push((name, content));
            }
        }
        found.sort();
        found
    }
}

/// Returns the whole text of an error, with its causes and its remedy.
pub(super) fn text<T: std::fmt::Debug>(result: Result<T>) -> String {
    let error = result.unwrap_err();
    let hint = xtask_core::error::failure(&error).and_then(xtask_core::error::Failure::hint);
    format!("{error:#}; {}", hint.unwrap_or("no remedy"))
}

/// Writes `(path, content)` pairs as [`Place::tree`] returns them.
pub(super) fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, content)| ((*name).to_owned(), (*content).to_owned())).collect()
}
