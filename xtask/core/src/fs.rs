//! Files and directories: locks, private and atomic writing, deleting; and which directories are this workflow's own.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Waits for a lock that lives in a file and ends with its process, however it ends (flock(2)).
///
/// # Errors
/// Names the file.
pub fn lock(path: &Path) -> Result<File> {
    let file = open_lock(path)?;
    file.lock().with_context(|| format!("lock {}", path.display()))?;
    Ok(file)
}

/// The lock, or `None` where another process holds it.
///
/// # Errors
/// Names the file.
pub fn try_lock(path: &Path) -> Result<Option<File>> {
    let file = open_lock(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

fn open_lock(path: &Path) -> Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(path);
    file.with_context(|| format!("open the lock {}", path.display()))
}

/// Makes `path` and its parents; the last one for this user alone.
///
/// # Errors
/// Names the directory.
pub fn make_private_dir(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("make the directory {}", path.display()))
}

/// In each directory that this workflow may delete as a whole; a directory without it is somebody else's.
pub const MARKER: &str = ".iot-xtask";

/// Makes `path` as [`make_private_dir`] does, and marks it as one that this workflow may delete.
///
/// # Errors
/// Names the directory, or its marker.
pub fn make_own_dir(path: &Path) -> Result<()> {
    make_private_dir(path)?;
    mark(path)
}

/// Marks a directory as one that this workflow may delete.
///
/// # Errors
/// Names the marker.
pub fn mark(directory: &Path) -> Result<()> {
    write_private(
        &directory.join(MARKER),
        "This directory belongs to cargo xtask, which deletes it when it is not needed.\n",
    )
}

/// Whether this workflow made the directory, and may delete it.
pub fn is_own(directory: &Path) -> bool {
    directory.join(MARKER).symlink_metadata().is_ok_and(|meta| meta.is_file())
}

/// Deletes a directory of this workflow's in which nothing is but the marker. Any other stays as it is.
pub fn remove_if_empty(directory: &Path) {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    if matches!(&names[..], [name] if name == MARKER) {
        // What cannot be deleted now is deleted by `image prune`.
        drop(std::fs::remove_dir_all(directory));
    }
}

/// Writes a file that only this user may read.
///
/// # Errors
/// Names the file.
pub fn write_private(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options
        .open(path)
        .and_then(|mut file| file.write_all(content.as_ref()))
        .with_context(|| format!("write {}", path.display()))
}

/// Writes a private file beside `path` and renames it: whoever reads `path` sees the old content or the new one. Nothing
/// is flushed to the disk.
///
/// # Errors
/// Names the file.
pub fn write_atomically(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = Path::new(&beside);
    write_private(beside, content)?;
    std::fs::rename(beside, path).with_context(|| format!("rename {}", beside.display()))
}

/// The directories in `parent`; none where that does not exist.
pub fn directories(parent: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// Deletes a file; one that is not there is gone already.
///
/// # Errors
/// Names the file.
pub fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("delete {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Deletes a directory and all that is in it; one that is not there is gone already.
///
/// # Errors
/// Names the directory.
pub fn remove_tree(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("delete {}", path.display())),
    }
}
