//! Locks that live in files and end with their process, however it ends (flock(2)).

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

/// Waits for the lock.
///
/// # Errors
/// Names the file.
pub fn lock(path: &Path) -> Result<Option<File>> {
    take(path, FlockOperation::LockExclusive)
}

/// The lock, or `None` where another process holds it.
///
/// # Errors
/// Names the file.
pub fn try_lock(path: &Path) -> Result<Option<File>> {
    take(path, FlockOperation::NonBlockingLockExclusive)
}

fn take(path: &Path, operation: FlockOperation) -> Result<Option<File>> {
    let mut options = File::options();
    let file = options.create(true).truncate(false).write(true).open(path);
    let file = file.with_context(|| format!("open the lock {}", path.display()))?;
    match flock(&file, operation) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}
