//! A part of a file that is read without a copy: a layer or a member within an archive.

use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use xtask_core::error::Failure;

/// A part of a file. Clones share the file but not the position.
#[derive(Debug, Clone)]
pub(crate) struct Slice {
    file: Arc<std::fs::File>,
    start: u64,
    end: u64,
    at: u64,
}

impl Slice {
    /// Opens a whole file.
    ///
    /// # Errors
    /// Returns an error that names the path if it cannot be opened or is no regular file. A FIFO would block the reader.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let metadata = fs_err::metadata(path)?;
        if !metadata.is_file() {
            let message = format!("read {}: it is not a file", path.display());
            return Err(Failure::usage(message).into());
        }
        let (file, _) = fs_err::File::open(path)?.into_parts();
        Ok(Self { file: Arc::new(file), start: 0, end: metadata.len(), at: 0 })
    }

    /// Makes a slice of a whole file that is open already.
    pub(crate) fn whole(file: std::fs::File) -> io::Result<Self> {
        let end = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), start: 0, end, at: 0 })
    }

    /// Returns a part of this slice, or `None` if the slice ends before the part does.
    pub(crate) fn part(&self, offset: u64, length: u64) -> Option<Self> {
        let start = self.start.checked_add(offset)?;
        let end = start.checked_add(length)?;
        (end <= self.end).then(|| Self { file: self.file.clone(), start, end, at: start })
    }

    /// Returns the slice's length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Reads the first bytes without moving the position. Returns fewer bytes than `count` if the slice is shorter.
    pub(crate) fn beginning(&self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut slice = self.clone();
        slice.at = slice.start;
        slice.take(count as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl Read for Slice {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_sub(self.at);
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read_at(&mut buffer[..wanted], self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Slice {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(offset) => self.start.checked_add(offset),
            SeekFrom::Current(offset) => self.at.checked_add_signed(offset),
            SeekFrom::End(offset) => self.end.checked_add_signed(offset),
        };
        let at = at.filter(|at| *at >= self.start).ok_or(io::ErrorKind::InvalidInput)?;
        self.at = at;
        Ok(at - self.start)
    }
}
