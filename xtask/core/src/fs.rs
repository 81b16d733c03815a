//! Files and directories: locks, private and atomic writing, deletion, and the marker of the directories that
//! `cargo xtask` may delete.

use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use fs_err::os::unix::fs::OpenOptionsExt as _;
use rustix::fs::OFlags;

use crate::{limits, message};

/// Waits for the lock of a file, and takes it. The kernel releases the lock when the process ends in any way
/// (flock(2)). If another process holds the lock, a message names this process, and `check` is called until the lock is
/// free.
///
/// # Errors
/// Returns an error that names the file if it cannot be opened or locked, or the error of `check`.
pub fn lock(path: &Path, check: impl Fn() -> Result<()>) -> Result<File> {
    let mut is_told = false;
    loop {
        if let Some(lock) = try_lock(path)? {
            return Ok(lock);
        }
        check()?;
        if !is_told {
            message!("waiting for {}, which holds the lock {}", lock_holder(path), path.display());
            is_told = true;
        }
        std::thread::sleep(limits::POLL);
    }
}

/// Describes the process that holds the lock of a file, for messages.
pub fn lock_holder(path: &Path) -> String {
    let find = || {
        let file = path.metadata().ok()?;
        let locks = std::fs::read_to_string("/proc/locks").ok()?;
        // The fields of a line are: number, FLOCK, ADVISORY, WRITE, pid, device and inode, start, end
        // (proc_locks(5)). The numbers of the device are not those of stat(2) on every file system.
        let pid = |line: &str| {
            let fields: Vec<_> = line.split_ascii_whitespace().collect();
            let [_, "FLOCK", _, _, pid, place, ..] = fields[..] else { return None };
            let inode: u64 = place.rsplit(':').next()?.parse().ok()?;
            (inode == file.ino()).then(|| pid.to_owned())
        };
        let has_open = |pid: &String| {
            let is_it = |open: std::fs::Metadata| (open.dev(), open.ino()) == (file.dev(), file.ino());
            entries(&Path::new("/proc").join(pid).join("fd")).any(|fd| fd.metadata().is_ok_and(is_it))
        };
        locks.lines().filter_map(pid).find(has_open)
    };
    find().map_or_else(|| "another process".to_owned(), |pid| format!("the process {pid}"))
}

/// Takes the lock of a file; returns `None` if another process holds it.
///
/// # Errors
/// Returns an error that names the file if it cannot be opened or locked.
pub fn try_lock(path: &Path) -> Result<Option<File>> {
    let file = open_lock(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file.into_file())),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

fn open_lock(path: &Path) -> io::Result<fs_err::File> {
    // Through a symbolic link, another user could make this process create or lock any file.
    let no_link = OFlags::NOFOLLOW.bits().cast_signed();
    fs_err::OpenOptions::new().create(true).truncate(false).write(true).custom_flags(no_link).open(path)
}

/// Makes the directory `path` and its missing parents, with access for this user only.
///
/// # Errors
/// Returns an error that names the directory if it cannot be made.
pub fn make_private_dir(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("make the directory {}", path.display()))
}

/// The name of the marker file. `cargo xtask` may delete a whole directory only if the directory contains this file.
pub const MARKER: &str = ".iot-xtask";

/// Makes the directory `path` as [`make_private_dir`] does, and puts the marker into it.
///
/// # Errors
/// Returns an error that names the directory or its marker if one of them cannot be made.
pub fn make_own_dir(path: &Path) -> Result<()> {
    make_private_dir(path)?;
    mark(path)
}

/// Puts the marker into a directory. `cargo xtask` may then delete the directory.
///
/// # Errors
/// Returns an error that names the marker if it cannot be written.
pub fn mark(directory: &Path) -> Result<()> {
    write_private(
        &directory.join(MARKER),
        "This directory belongs to cargo xtask, which deletes it when it is not needed.\n",
    )
}

/// Returns whether the directory has the marker, which means that `cargo xtask` may delete the directory.
pub fn is_own(directory: &Path) -> bool {
    directory.join(MARKER).symlink_metadata().is_ok_and(|meta| meta.is_file())
}

/// Deletes a directory if it contains only the marker.
pub fn remove_if_empty(directory: &Path) {
    let entries: Vec<_> = entries(directory).collect();
    if matches!(&entries[..], [only] if only.ends_with(MARKER)) {
        // If the deletion fails, a later `image prune` deletes the directory.
        drop(std::fs::remove_dir_all(directory));
    }
}

/// Writes a file that only this user may read.
///
/// # Errors
/// Returns an error that names the file if it cannot be written.
pub fn write_private(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let mut options = fs_err::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    Ok(options.open(path)?.write_all(content.as_ref())?)
}

/// Writes a private file beside `path` and renames it to `path`, so that a reader of `path` sees either the old or the
/// new content. The file is not flushed to the disk.
///
/// # Errors
/// Returns an error that names the file if it cannot be written or renamed.
pub fn write_atomically(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = Path::new(&beside);
    let written = write_private(beside, content).and_then(|()| Ok(fs_err::rename(beside, path)?));
    written.inspect_err(|_| drop(std::fs::remove_file(beside)))
}

/// Returns the content of a file, or `None` if the file does not exist.
///
/// # Errors
/// Returns an error that names the file if it exists and cannot be read.
pub fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs_err::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        read => Ok(Some(read?)),
    }
}

/// Returns the paths in `parent`; none if `parent` does not exist or cannot be read.
pub fn entries(parent: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    parent.read_dir().into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Returns the directories in `parent`; none if `parent` does not exist or cannot be read.
pub fn directories(parent: &Path) -> Vec<PathBuf> {
    entries(parent).filter(|path| path.is_dir()).collect()
}

/// Deletes a file. If the file does not exist, this is not an error.
///
/// # Errors
/// Returns an error that names the file if it exists and cannot be deleted.
pub fn remove_file(path: &Path) -> Result<()> {
    unless_gone(fs_err::remove_file(path))
}

/// Deletes a directory with its content, the marker last. If the deletion fails or the process is killed, the rest of
/// the directory still has the marker and can be deleted later. If the directory does not exist, this is not an error.
///
/// # Errors
/// Returns an error that names the path that cannot be deleted.
pub fn remove_tree(path: &Path) -> Result<()> {
    let is_directory = path.symlink_metadata().is_ok_and(|about| about.is_dir());
    for entry in entries(path).filter(|entry| is_directory && !entry.ends_with(MARKER)) {
        let entry_is_directory = entry.symlink_metadata().is_ok_and(|about| about.is_dir());
        let remove = if entry_is_directory { fs_err::remove_dir_all } else { fs_err::remove_file };
        unless_gone(remove(&entry))?;
    }
    unless_gone(fs_err::remove_dir_all(path))
}

fn unless_gone(removed: io::Result<()>) -> Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => Ok(removed?),
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::inotify;

    use super::*;

    /// If a killed deletion left a directory without its marker, no later run would delete it.
    #[test]
    fn the_marker_is_deleted_last() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        make_own_dir(&path).unwrap();
        for number in 0..20 {
            std::fs::write(path.join(format!("{number}")), "").unwrap();
        }
        let inotify = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&inotify, &path, inotify::WatchFlags::DELETE).unwrap();
        remove_tree(&path).unwrap();
        assert!(!path.exists());
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&inotify, &mut buffer);
        let mut deleted = Vec::new();
        while let Ok(event) = events.next() {
            deleted.extend(event.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
        assert_eq!(deleted.len(), 21);
        assert_eq!(deleted.last().map(String::as_str), Some(MARKER));
    }

    #[test]
    fn a_wait_for_a_lock_names_its_holder_and_can_be_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let held = lock(&path, || unreachable!("the lock is free")).unwrap();
        assert_eq!(lock_holder(&path), format!("the process {}", std::process::id()));
        let error = lock(&path, || anyhow::bail!("interrupted")).unwrap_err();
        assert_eq!(error.to_string(), "interrupted");
        drop(held);
        assert_eq!(lock_holder(&path), "another process");
    }

    #[test]
    fn a_lock_file_that_is_a_link_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (target, link) = (directory.path().join("target"), directory.path().join("lock"));
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let error = format!("{:#}", try_lock(&link).unwrap_err());
        assert!(error.contains("symbolic link") && error.contains(&link.display().to_string()), "{error}");
        assert!(!target.exists());
    }

    #[test]
    fn a_link_to_a_directory_is_deleted_and_the_directory_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let kept = directory.path().join("kept");
        make_own_dir(&kept.join("inner")).unwrap();
        let run = directory.path().join("run");
        make_own_dir(&run).unwrap();
        std::os::unix::fs::symlink(&kept, run.join("link")).unwrap();
        remove_tree(&run).unwrap();
        std::os::unix::fs::symlink(&kept, &run).unwrap();
        remove_tree(&run).unwrap();
        assert!(!run.is_symlink() && is_own(&kept.join("inner")));
    }
}
