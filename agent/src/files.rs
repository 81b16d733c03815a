//! Files that are replaced in one step.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Replaces `path` atomically: writes a file beside it and renames that file (rename(2)). Only the owner can
/// read the result.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (beside, _) = write_beside(path, bytes)?;
    fs::rename(beside, path)
}

/// Replaces `path` like [`replace`], and syncs the new content before it returns. A power cut leaves the old
/// content or the new one.
pub(crate) fn replace_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (beside, file) = write_beside(path, bytes)?;
    file.sync_all()?;
    fs::rename(beside, path)?;
    sync_parent(path)
}

/// Gives the file `path` a second name, which may have been that of another file. A file of either name is there at any
/// time.
pub(crate) fn keep(path: &Path, second: &Path) -> io::Result<()> {
    let beside = second.with_extension("link");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => fs::hard_link(path, &beside)?,
    }
    fs::rename(beside, second)
}

fn write_beside(path: &Path, bytes: &[u8]) -> io::Result<(PathBuf, File)> {
    let beside = path.with_extension("new");
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&beside)?;
    file.write_all(bytes)?;
    Ok((beside, file))
}

/// Syncs the directory that contains `path`. Without this sync, a power cut may lose a new file (fsync(2)).
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}
