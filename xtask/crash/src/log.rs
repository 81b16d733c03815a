//! The log of a disk's writes, in the format of dm-log-writes. The entries are kept in memory. The data stay in the file.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use fs_err::File;
use fs_err::os::unix::fs::FileExt as _;

use crate::SECTOR;
use crate::versions::Versions;

const MAGIC: u64 = 0x6a_7366_7773_6872;
const VERSION: u64 = 1;

const FLUSH: u64 = 1;
const FUA: u64 = 1 << 1;
const DISCARD: u64 = 1 << 2;
const MARK: u64 = 1 << 3;
/// Newer kernels set this flag on writes of metadata.
const METADATA: u64 = 1 << 4;

/// The lengths of the log's superblock and of the header of an entry, in bytes.
const SUPERBLOCK: u64 = 28;
const HEADER: u64 = 32;

/// The kind of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A write of data or zeroes. It may carry the flags FLUSH and FUA.
    Write,
    Discard,
    /// A flush without data.
    Flush,
    /// A mark that a user of dm-log-writes has set. It has no effect on the disk.
    Mark,
}

/// One operation that the disk has completed.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The first byte on the disk, a multiple of [`SECTOR`].
    pub offset: u64,
    /// The number of bytes, a multiple of [`SECTOR`]; 0 for a flush and a mark.
    pub length: u64,
    pub kind: EntryKind,
    /// Whether the writes before this entry are durable.
    pub flushes: bool,
    /// Whether this write is durable itself.
    pub fua: bool,
    /// The place of the data in the log, in bytes.
    data: u64,
}

impl Entry {
    /// Returns the first sector on the disk.
    pub(crate) fn first(&self) -> u64 {
        self.offset / SECTOR
    }

    /// Returns the number of sectors.
    pub(crate) fn sectors(&self) -> u64 {
        self.length / SECTOR
    }

    pub(crate) fn is_write(&self) -> bool {
        self.kind == EntryKind::Write
    }

    /// Says whether the entry changes sectors.
    pub(crate) fn changes(&self) -> bool {
        matches!(self.kind, EntryKind::Write | EntryKind::Discard) && self.length > 0
    }
}

/// A log that is no longer written.
pub struct WriteLog {
    file: File,
    entries: Vec<Entry>,
    flushes: Vec<usize>,
    discards: Vec<usize>,
    versions: Versions,
}

impl WriteLog {
    /// Reads the headers of all entries.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, is not such a log, or is shorter than its entries, or if an entry
    /// does not consist of whole sectors of 512 bytes.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let read = || format!("read the write log {}", path.display());
        let entries = parse(&file).with_context(read)?;
        let numbers_of = |is: fn(&Entry) -> bool| {
            let numbered = entries.iter().enumerate().filter(|(_, entry)| is(entry));
            numbered.map(|(number, _)| number).collect()
        };
        let flushes = numbers_of(|entry| entry.flushes);
        let discards = numbers_of(|entry| entry.kind == EntryKind::Discard && entry.length > 0);
        let changes = entries.iter().enumerate().filter(|(_, entry)| entry.changes());
        let sectors = |entry: &Entry| entry.first()..entry.first() + entry.sectors();
        let versions =
            Versions::new(&changes.map(|(number, entry)| (number, sectors(entry))).collect::<Vec<_>>());
        Ok(Self { file, flushes, discards, versions, entries })
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Reads data of a write, from the byte `start` of the write on.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, or if the entry has no data or fewer.
    pub fn read(&self, entry: usize, start: u64, into: &mut [u8]) -> Result<()> {
        let found = self.entries.get(entry).filter(|found| found.is_write());
        let Some(found) = found else { bail!("the log has no write {entry}") };
        let end = start.checked_add(into.len() as u64);
        ensure!(end.is_some_and(|end| end <= found.length), "read behind the end of the write {entry}");
        Ok(self.file.read_exact_at(into, found.data + start)?)
    }

    /// Checks that the log belongs to a disk of this size.
    ///
    /// # Errors
    /// Returns an error that names the first entry beyond the end of the disk.
    pub fn check_size(&self, disk_bytes: u64) -> Result<()> {
        let beyond = |entry: &Entry| entry.offset + entry.length > disk_bytes;
        match self.entries.iter().position(beyond) {
            Some(number) => bail!(
                "the entry {number} of the write log ends at byte {}, but the disk has only {disk_bytes} bytes; is this \
                 the log of another disk?",
                self.entries[number].offset + self.entries[number].length
            ),
            None => Ok(()),
        }
    }

    /// Returns the entries that flush, in ascending order.
    pub(crate) fn flushes(&self) -> &[usize] {
        &self.flushes
    }

    /// Returns the last entry before `point` that flushes.
    pub(crate) fn last_flush(&self, point: usize) -> Option<usize> {
        let before = self.flushes.partition_point(|flush| *flush < point);
        before.checked_sub(1).map(|last| self.flushes[last])
    }

    /// Returns the discards before `point`.
    pub(crate) fn discards(&self, point: usize) -> &[usize] {
        &self.discards[..self.discards.partition_point(|discard| *discard < point)]
    }

    pub(crate) fn versions(&self) -> &Versions {
        &self.versions
    }
}

/// Returns the number of entries in a log to which QEMU still appends. An empty file has none. The filter must have
/// been started with `log-super-update-interval=1`.
///
/// # Errors
/// Returns an error if the file cannot be read or is not such a log.
pub fn completed_entries(path: &Path) -> Result<u64> {
    let file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(0);
    }
    Ok(superblock(&file).with_context(|| format!("read the write log {}", path.display()))?.entries)
}

struct Superblock {
    entries: u64,
    sector: u64,
}

fn number(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn superblock(file: &File) -> Result<Superblock> {
    let mut bytes = [0; 32];
    let length = file.metadata()?.len();
    ensure!(length >= SUPERBLOCK, "the log is truncated: it has {length} bytes, fewer than its superblock");
    file.read_exact_at(&mut bytes[..28], 0)?;
    let (magic, version, entries) = (number(&bytes, 0), number(&bytes, 8), number(&bytes, 16));
    ensure!(magic == MAGIC, "the file is not a log of dm-log-writes: it begins with {magic:#x}");
    ensure!(version == VERSION, "the log has version {version}, and only version {VERSION} is known");
    let sector = number(&bytes, 24);
    ensure!(
        sector.is_power_of_two() && (HEADER..1 << 24).contains(&sector),
        "the log has an impossible sector size: {sector} bytes"
    );
    Ok(Superblock { entries, sector })
}

fn parse(file: &File) -> Result<Vec<Entry>> {
    let Superblock { entries: count, sector } = superblock(file)?;
    let length = file.metadata()?.len();
    let mut entries = Vec::new();
    let mut at = sector;
    for number in 0..count {
        let truncated = || format!("the log is truncated: it ends in the entry {number} of {count}");
        ensure!(at.checked_add(HEADER).is_some_and(|end| end <= length), truncated());
        let mut header = [0; HEADER as usize];
        file.read_exact_at(&mut header, at)?;
        let entry = entry(&header, sector, at + sector).with_context(|| format!("the entry {number}"))?;
        at = if entry.is_write() { entry.data + entry.length } else { entry.data };
        ensure!(!entry.is_write() || at <= length, truncated());
        entries.push(entry);
    }
    Ok(entries)
}

fn entry(header: &[u8], sector: u64, data: u64) -> Result<Entry> {
    let (flags, inline) = (number(header, 16), number(header, 24));
    let unknown = flags & !(FLUSH | FUA | DISCARD | MARK | METADATA);
    ensure!(unknown == 0, "unknown flags {unknown:#x}");
    // QEMU counts an entry before it has written it. If QEMU is killed in between, the file has a hole there.
    ensure!(header.iter().any(|byte| *byte != 0), "empty: the program that wrote the log was killed");
    ensure!(inline <= sector - HEADER, "{inline} bytes of data in its header");
    let bytes = |sectors: u64| sectors.checked_mul(sector).filter(|bytes| *bytes <= i64::MAX as u64);
    let (offset, length) = (bytes(number(header, 0)), bytes(number(header, 8)));
    let (Some(offset), Some(length)) = (offset, length) else { bail!("beyond the end of any disk") };
    ensure!(data.checked_add(length).is_some(), "beyond the end of any log");
    let aligned = offset.is_multiple_of(SECTOR) && length.is_multiple_of(SECTOR);
    ensure!(aligned, "not aligned to {SECTOR} bytes: {length} bytes at {offset}");
    let kind = match length {
        _ if flags & MARK != 0 => EntryKind::Mark,
        _ if flags & DISCARD != 0 => EntryKind::Discard,
        0 => EntryKind::Flush,
        _ => EntryKind::Write,
    };
    let length = if kind == EntryKind::Mark { 0 } else { length };
    Ok(Entry { offset, length, kind, flushes: flags & FLUSH != 0, fua: flags & FUA != 0, data })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{Sample, discard, flush, write};

    #[test]
    fn all_sector_sizes_of_a_log_are_read() {
        for sector in [512, 4096] {
            let operations = [write(8, 16), discard(0, 8), flush(), write(16, 8).fua()];
            let sample = Sample::with_sector(&operations, sector);
            let log = sample.log();
            let found: Vec<_> = log.entries().iter().map(|entry| (entry.first(), entry.sectors())).collect();
            assert_eq!(found, [(8, 16), (0, 8), (0, 0), (16, 8)]);
            let kinds: Vec<_> = log.entries().iter().map(|entry| entry.kind).collect();
            assert_eq!(kinds, [EntryKind::Write, EntryKind::Discard, EntryKind::Flush, EntryKind::Write]);
            assert!(log.entries()[2].flushes && log.entries()[3].fua && !log.entries()[0].fua);
            let mut data = [0; 512];
            log.read(3, 7 * 512, &mut data).unwrap();
            assert_eq!(data, Sample::content(3, 7));
            log.read(3, 7 * 512 + 1, &mut data).unwrap_err();
            log.read(1, 0, &mut data).unwrap_err();
            log.check_size(24 * 512).unwrap();
            assert!(log.check_size(23 * 512).unwrap_err().to_string().contains("entry 0"));
            assert_eq!(completed_entries(&sample.path()).unwrap(), 4);
        }
    }

    #[test]
    fn damaged_logs_are_refused_with_the_reason() {
        type Damage = fn(&mut Vec<u8>);
        let damages: [(&str, Damage); 10] = [
            ("truncated: it has 0 bytes", |bytes| bytes.clear()),
            ("not a log", |bytes| bytes[0] ^= 1),
            ("version 2", |bytes| bytes[8] = 2),
            ("impossible sector size: 513", |bytes| bytes[24] = 1),
            ("not aligned to 512", |bytes| {
                bytes[24..26].copy_from_slice(&256_u16.to_le_bytes());
                bytes[256] = 1;
            }),
            ("ends in the entry 1 of 2", |bytes| bytes.truncate(512 * 4 - 1)),
            ("ends in the entry 2 of 3", |bytes| bytes[16] = 3),
            ("the entry 0: empty", |bytes| bytes[512..544].fill(0)),
            ("unknown flags 0x80", |bytes| bytes[512 + 16] |= 0x80),
            ("beyond the end of any disk", |bytes| bytes[512 + 7] = 0xff),
        ];
        for (reason, damage) in damages {
            let sample = Sample::new(&[write(1, 1), write(3, 1)]);
            let mut bytes = std::fs::read(sample.path()).unwrap();
            damage(&mut bytes);
            std::fs::write(sample.path(), bytes).unwrap();
            let error = WriteLog::open(&sample.path()).err().map(|error| format!("{error:#}")).unwrap();
            assert!(error.contains(reason), "{reason}: {error}");
        }
    }

    #[test]
    fn a_log_that_is_not_yet_begun_has_no_entries() {
        let sample = Sample::new(&[]);
        std::fs::write(sample.path(), b"").unwrap();
        assert_eq!(completed_entries(&sample.path()).unwrap(), 0);
        std::fs::write(sample.path(), b"abc").unwrap();
        completed_entries(&sample.path()).unwrap_err();
    }
}
