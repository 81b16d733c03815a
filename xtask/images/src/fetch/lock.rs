//! Allows one download of a file at a time, by the lock file `<name>.lock`, which its holder deletes.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use xtask_core::fs::lock_holder;

use crate::store::wait_for_lock;
use xtask_jobs::Ui;

/// The lock that is held while a file is downloaded.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Waits until no other process downloads the same file.
    pub(super) fn wait(target: &Path, ui: &Ui) -> Result<Self> {
        let path = PathBuf::from([target.as_os_str(), ".lock".as_ref()].join("".as_ref()));
        loop {
            let file = wait_for_lock(&path, ui, |_| {
                ui.tick(&format!("{} is downloading this file", lock_holder(&path)))
            })?;
            // If the last holder has deleted the lock file meanwhile, this lock does not exclude other processes.
            if stands(&path, &file) {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

fn stands(path: &Path, file: &File) -> bool {
    let same = |a: std::fs::Metadata, b: std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    path.metadata().and_then(|named| Ok(same(named, file.metadata()?))).unwrap_or(false)
}

impl Drop for Lock {
    fn drop(&mut self) {
        // If the file cannot be deleted, an empty file stays, which the next download uses.
        drop(std::fs::remove_file(&self.path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xtask_core::fs::try_lock;

    #[test]
    fn a_lock_file_that_was_deleted_keeps_nobody_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file.lock");
        let old = try_lock(&path).unwrap().unwrap();
        assert!(stands(&path, &old));
        std::fs::remove_file(&path).unwrap();
        assert!(!stands(&path, &old));
        let _new = try_lock(&path).unwrap().unwrap();
        assert!(!stands(&path, &old));
    }
}
