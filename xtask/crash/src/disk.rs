//! The disk as it was before the log, and a disk in a crash state.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use fs_err::File;
use fs_err::os::unix::fs::FileExt as _;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::SECTOR;
use crate::log::{EntryKind, WriteLog};
use crate::state::CrashState;
use crate::view::{Run, View};

/// The disk as it was before the first entry of the log: a raw image, which is never written.
pub struct BaseDisk {
    file: File,
    length: u64,
    partition: Range<u64>,
}

impl BaseDisk {
    /// Opens a raw image. `partition` has the bytes with the root file system, an ext4 file system.
    ///
    /// # Errors
    /// Returns an error if the file cannot be opened.
    pub fn open(path: &Path, partition: Range<u64>) -> Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { file, length, partition })
    }

    /// Returns the size of the disk in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Returns the bytes of the disk on which the root file system is, with the free ones behind its partition.
    pub fn partition(&self) -> Range<u64> {
        self.partition.clone()
    }
}

/// A range of the disk that an entry has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Bytes of the disk.
    pub bytes: Range<u64>,
    /// The write or discard whose content the range has.
    pub entry: usize,
}

/// A disk in a crash state. A clone is cheap.
#[derive(Clone)]
pub struct StateDisk {
    base: Arc<BaseDisk>,
    log: Arc<WriteLog>,
    view: Arc<View>,
}

impl StateDisk {
    /// Reads nothing. The time depends only on the number of missing writes.
    pub fn new(base: &Arc<BaseDisk>, log: &Arc<WriteLog>, state: &CrashState) -> Self {
        Self { base: Arc::clone(base), log: Arc::clone(log), view: Arc::new(state.view()) }
    }

    /// Returns the ranges of the disk that differ from the base, in ascending order.
    pub fn changed(&self) -> impl Iterator<Item = Change> {
        self.view.changed(&self.log).filter_map(|Run { sectors, entry }| {
            Some(Change { bytes: sectors.start * SECTOR..sectors.end * SECTOR, entry: entry? })
        })
    }

    /// Reads from the byte `at` of the whole disk on.
    ///
    /// # Errors
    /// Returns an error if the base or the log cannot be read, or at the end of the disk.
    pub fn read_at(&self, at: u64, into: &mut [u8]) -> Result<()> {
        let end = at.checked_add(into.len() as u64).filter(|end| *end <= self.base.length);
        let end =
            end.with_context(|| format!("read {} bytes at {at}: beyond the end of the disk", into.len()))?;
        let mut rest = into;
        for run in self.view.runs(&self.log, at / SECTOR..end.div_ceil(SECTOR)) {
            let start = at.max(run.sectors.start * SECTOR);
            let stop = end.min(run.sectors.end * SECTOR);
            let (piece, others) = rest.split_at_mut((stop - start) as usize);
            match run.entry {
                Some(entry) => read_version(&self.log, entry, start, piece)?,
                None => self.base.file.read_exact_at(piece, start)?,
            }
            rest = others;
        }
        Ok(())
    }

    /// Reads from the byte `at` of the root file system on.
    ///
    /// # Errors
    /// Returns the errors of [`StateDisk::read_at`], or an error at the end of the partition.
    pub(crate) fn read_partition(&self, at: u64, into: &mut [u8]) -> Result<()> {
        let Range { start, end } = self.base.partition;
        let place = start.saturating_add(at);
        let is_inside = place.saturating_add(into.len() as u64) <= end;
        ensure!(is_inside, "read {} bytes at {at}: beyond the end of the partition", into.len());
        self.read_at(place, into)
    }

    /// Writes the state to a file that is a copy of the base. Discarded ranges become holes where the file system of
    /// this host supports them.
    ///
    /// # Errors
    /// Returns an error if the log cannot be read or the file cannot be written, if an entry is beyond the end of the
    /// disk, or if the file does not have the size of the base.
    pub fn write_to(&self, raw: &fs::File) -> Result<()> {
        self.log.check_size(self.base.length)?;
        let length = raw.metadata().context("find the size of the copy of the disk")?.len();
        ensure!(length == self.base.length, "the copy has {length} bytes, the disk {}", self.base.length);
        let mut buffer = vec![0; 1 << 20];
        for Change { bytes, entry } in self.changed() {
            if self.log.entries()[entry].kind == EntryKind::Discard && deallocate(raw, &bytes)? {
                continue;
            }
            let mut at = bytes.start;
            while at < bytes.end {
                let count = (bytes.end - at).min(buffer.len() as u64);
                let piece = &mut buffer[..count as usize];
                read_version(&self.log, entry, at, piece)?;
                raw.write_all_at(piece, at).context("write the state to a copy of the disk")?;
                at += count;
            }
        }
        Ok(())
    }
}

/// Reads the version of an entry, from the byte `at` of the disk on.
pub(crate) fn read_version(log: &WriteLog, entry: usize, at: u64, into: &mut [u8]) -> Result<()> {
    let found = &log.entries()[entry];
    if found.kind == EntryKind::Discard {
        into.fill(0);
        return Ok(());
    }
    log.read(entry, at - found.offset, into)
}

/// Returns false if the file system of the file does not support holes.
fn deallocate(raw: &fs::File, bytes: &Range<u64>) -> Result<bool> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(raw, flags, bytes.start, bytes.end - bytes.start) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
        Err(error) => Err(error).context("deallocate a discarded range of a copy of the disk"),
    }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::*;
    use crate::generator::Generator;
    use crate::samples::{Operation, Sample};

    const SECTORS: u64 = 64;

    fn base(directory: &Path) -> (Arc<BaseDisk>, Vec<u8>) {
        let content = vec![0x11; (SECTORS * SECTOR) as usize];
        let path = directory.join("base");
        fs::write(&path, &content).unwrap();
        (Arc::new(BaseDisk::open(&path, 0..SECTORS * SECTOR).unwrap()), content)
    }

    /// Applies the entries one after the other.
    fn applied(mut content: Vec<u8>, log: &WriteLog, state: &CrashState) -> Vec<u8> {
        for (number, entry) in
            log.entries()[..state.point].iter().enumerate().filter(|(_, one)| one.changes())
        {
            for sector in 0..entry.sectors() {
                let missing = state.missing.iter().filter(|one| one.entry == number);
                if missing.flat_map(|one| &one.sectors).any(|range| range.contains(&sector)) {
                    continue;
                }
                let at = (entry.offset + sector * SECTOR) as usize;
                let data = match entry.kind {
                    EntryKind::Discard => [0; 512],
                    _ => Sample::content(number, sector),
                };
                content[at..at + 512].copy_from_slice(&data);
            }
        }
        content
    }

    #[test]
    fn reads_and_the_written_disk_have_the_same_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let (base, content) = base(directory.path());
        for seed in 0..40 {
            let mut random = Rng::with_seed(seed);
            let operations: Vec<_> = (0..40).map(|_| Operation::random(&mut random, SECTORS)).collect();
            let sample = Sample::new(&operations);
            let log = sample.log();
            let state = Generator::new(&log, seed, &[35]).state(seed);
            let expected = applied(content.clone(), &log, &state);
            let disk = StateDisk::new(&base, &log, &state);
            for _ in 0..50 {
                let start = random.usize(..expected.len());
                let end = random.usize(start..=expected.len());
                let mut read = vec![0; end - start];
                disk.read_at(start as u64, &mut read).unwrap();
                assert_eq!(read, expected[start..end], "{seed}: {start}..{end}");
            }
            let copy = directory.path().join("copy");
            fs::write(&copy, &content).unwrap();
            disk.write_to(&fs::File::options().write(true).open(&copy).unwrap()).unwrap();
            assert_eq!(fs::read(&copy).unwrap(), expected, "{seed}");
            let changed: u64 = disk.changed().map(|change| change.bytes.end - change.bytes.start).sum();
            let differing =
                expected.chunks(512).zip(content.chunks(512)).filter(|(one, other)| one != other).count();
            assert_eq!(changed, differing as u64 * SECTOR);
        }
    }

    #[test]
    fn states_are_judged_by_several_threads_at_a_time() {
        fn is_shared<T: Send + Sync>() {}
        is_shared::<BaseDisk>();
        is_shared::<WriteLog>();
        is_shared::<StateDisk>();
        is_shared::<Generator<'_>>();
    }

    #[test]
    fn the_ends_of_the_disk_are_respected() {
        let directory = tempfile::tempdir().unwrap();
        let (base, _) = base(directory.path());
        let state = CrashState { point: 1, missing: Vec::new() };
        let sample = Sample::new(&[crate::samples::write(SECTORS - 1, 2)]);
        let disk = StateDisk::new(&base, &sample.log(), &state);
        let copy = directory.path().join("copy");
        let file = fs::File::create(&copy).unwrap();
        assert!(disk.write_to(&file).unwrap_err().to_string().contains("entry 0 of the write log ends"));
        assert!(disk.read_at(SECTORS * SECTOR - 1, &mut [0; 2]).unwrap_err().to_string().contains("beyond"));
        assert!(
            disk.read_partition(u64::MAX, &mut [0; 2]).unwrap_err().to_string().contains("beyond the end")
        );
        let sample = Sample::new(&[crate::samples::write(0, 2)]);
        let disk = StateDisk::new(&base, &sample.log(), &state);
        assert!(disk.write_to(&file).unwrap_err().to_string().contains("the copy has 0 bytes"));
    }
}
