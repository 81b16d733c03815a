//! Counts the bytes and the entries of an archive while it is unpacked, and returns an error at a limit. Each error names
//! the archive and the entry.

use std::cell::Cell;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Error, Result};
use xtask_core::error::Failure;
use xtask_core::format::human_bytes;

/// The limits on the content of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The bytes of all files together. The decompressed archive may not be larger either.
    pub bytes: u64,
    /// The number of entries: files, directories, links and whiteouts.
    pub entries: u64,
    /// How many times as large as the archive its decompressed content may be. Content below 64 MiB is never refused
    /// for this reason.
    pub ratio: u64,
}

impl Default for Limits {
    /// Returns 32 GiB, two million entries, and 500 times the size of the archive.
    fn default() -> Self {
        Self { bytes: 32 << 30, entries: 2_000_000, ratio: 500 }
    }
}

/// The content that is never refused for its ratio to the archive's size, in bytes.
const NO_BOMB: u64 = 64 << 20;

/// The bytes that the headers of one entry may have: long names, and the records of pax. The crate `tar` holds them in
/// memory. Linux has at most 4 KiB in a path and 64 KiB in an extended attribute.
const HEADERS: u64 = 1 << 20;

/// The bytes of the archive between two calls of [`Progress`](crate::Progress).
const PROGRESS_STEP: u64 = 1 << 20;

const REMEDY: &str =
    "if you trust the archive, unpack it with the program that made it, and name the directory instead";

#[derive(Debug, Clone, Copy)]
enum Exceeded {
    Bytes,
    Bomb,
    Headers,
}

/// The counters of one archive.
pub(crate) struct Meter {
    archive: PathBuf,
    limits: Limits,
    /// The bytes to read, for the progress and for the ratio.
    total: Cell<u64>,
    read: Cell<u64>,
    shown: Cell<u64>,
    decoded: Cell<u64>,
    written: Cell<u64>,
    entries: Cell<u64>,
    headers: Cell<Option<u64>>,
    exceeded: Cell<Option<Exceeded>>,
}

impl Meter {
    pub(crate) fn new(archive: &Path, total: u64, limits: Limits) -> Self {
        Self {
            archive: archive.to_owned(),
            limits,
            total: Cell::new(total),
            read: Cell::new(0),
            shown: Cell::new(0),
            decoded: Cell::new(0),
            written: Cell::new(0),
            entries: Cell::new(0),
            headers: Cell::new(None),
            exceeded: Cell::new(None),
        }
    }

    /// Starts to count the bytes of another pass over the archive. The limits on entries and written bytes stay those of
    /// the whole archive.
    pub(crate) fn restart(&self, total: u64) {
        self.total.set(total);
        self.read.set(0);
        self.shown.set(0);
        self.decoded.set(0);
    }

    pub(crate) fn archive(&self) -> std::path::Display<'_> {
        self.archive.display()
    }

    /// Returns the number of bytes that may be decompressed or written, and the limit that this number comes from.
    fn allowed(&self) -> (u64, Exceeded) {
        let ratio = self.total.get().saturating_mul(self.limits.ratio).max(NO_BOMB);
        if ratio < self.limits.bytes { (ratio, Exceeded::Bomb) } else { (self.limits.bytes, Exceeded::Bytes) }
    }

    fn exceed(&self, what: Exceeded) -> io::Error {
        self.exceeded.set(Some(what));
        io::Error::other("the archive exceeds a limit")
    }

    fn decode(&self, count: u64) -> io::Result<()> {
        let headers = self.headers.get().map(|left| left.checked_sub(count));
        if headers == Some(None) {
            return Err(self.exceed(Exceeded::Headers));
        }
        self.headers.set(headers.flatten());
        self.decoded.set(self.decoded.get() + count);
        let (allowed, limit) = self.allowed();
        if self.decoded.get() > allowed { Err(self.exceed(limit)) } else { Ok(()) }
    }

    /// Counts bytes of a file before they are written.
    pub(crate) fn write(&self, name: &[u8], count: u64) -> Result<()> {
        self.written.set(self.written.get().saturating_add(count));
        let (allowed, limit) = self.allowed();
        if self.written.get() > allowed {
            let cause = self.exceed(limit);
            return Err(self.broken(Some(name), cause));
        }
        Ok(())
    }

    /// Counts an entry.
    pub(crate) fn entry(&self, name: &[u8]) -> Result<()> {
        self.entries.set(self.entries.get() + 1);
        if self.entries.get() > self.limits.entries {
            let (archive, entry) = (self.archive(), shown(name));
            let message = format!(
                "unpack {archive}: {entry} is one entry more than the limit of {}",
                self.limits.entries
            );
            return Err(Failure::guest(message, REMEDY).into());
        }
        Ok(())
    }

    /// Returns the bytes that were read and the bytes to read, if they are to be shown now.
    pub(crate) fn due(&self) -> Option<(u64, u64)> {
        let read = self.read.get();
        if read - self.shown.get() < PROGRESS_STEP {
            return None;
        }
        self.shown.set(read);
        Some((read.min(self.total.get()), self.total.get()))
    }

    /// Limits the bytes that are decoded until the next call to the headers of one entry, or lifts this limit.
    pub(crate) fn only_headers(&self, only: bool) {
        self.headers.set(only.then_some(HEADERS));
    }

    /// Returns the error for an archive that cannot be read, with the last entry that was begun.
    pub(crate) fn broken(&self, entry: Option<&[u8]>, cause: io::Error) -> Error {
        let archive = self.archive();
        let at = entry.map_or("before its first entry".to_owned(), |name| format!("at {}", shown(name)));
        let (allowed, _) = self.allowed();
        let (allowed, total) = (human_bytes(allowed), human_bytes(self.total.get()));
        let message = match self.exceeded.get() {
            Some(Exceeded::Bytes) => {
                format!("unpack {archive}: {at}, its content exceeds the limit of {allowed}")
            }
            Some(Exceeded::Bomb) => {
                format!(
                    "unpack {archive}: {at}, its {total} decompress to more than {allowed}, as in a decompression bomb"
                )
            }
            Some(Exceeded::Headers) => {
                format!(
                    "unpack {archive}: {at}, the headers of an entry exceed the limit of {}",
                    human_bytes(HEADERS)
                )
            }
            None => {
                let read = self.read.get();
                let message = format!(
                    "unpack {archive}: it is damaged or incomplete {at}, after {read} bytes of {}",
                    self.total.get()
                );
                return Error::new(cause).context(Failure::guest(message, AGAIN));
            }
        };
        Failure::guest(message, REMEDY).into()
    }
}

/// The remedy for a damaged archive.
pub(crate) const AGAIN: &str = "download or make the archive again, and compare its digest";

/// Returns the name of an entry for a message.
pub(crate) fn shown(name: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(name))
}

/// Counts the bytes that are read from the archive.
pub(crate) struct Source<'m, R> {
    pub(crate) inner: R,
    pub(crate) meter: &'m Meter,
}

impl<R: Read> Read for Source<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.meter.read.set(self.meter.read.get() + count as u64);
        Ok(count)
    }
}

impl<R: Seek> Seek for Source<'_, R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

/// Counts the bytes that are decoded, and ends with an error at a limit.
pub(crate) struct Decoded<'m, R> {
    pub(crate) inner: R,
    pub(crate) meter: &'m Meter,
}

impl<R: Read> Read for Decoded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.meter.decode(count as u64)?;
        Ok(count)
    }
}

impl<R: Seek> Seek for Decoded<'_, R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}
