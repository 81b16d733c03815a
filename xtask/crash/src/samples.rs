//! Small logs for the tests. Each sector of each write has a content of its own.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use fastrand::Rng;

use crate::log::WriteLog;

/// An operation of a log, in sectors of 512 bytes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Operation {
    pub(crate) sectors: Range<u64>,
    flags: u64,
    data: Option<Vec<u8>>,
}

pub(crate) fn write(first: u64, count: u64) -> Operation {
    Operation { sectors: first..first + count, ..Operation::default() }
}

/// A write of these data.
#[cfg(feature = "real")]
pub(crate) fn write_data(first: u64, data: &[u8]) -> Operation {
    Operation { data: Some(data.to_owned()), ..write(first, data.len() as u64 / 512) }
}

pub(crate) fn flush() -> Operation {
    Operation { flags: 1, ..Operation::default() }
}

pub(crate) fn discard(first: u64, count: u64) -> Operation {
    Operation { flags: 4, ..write(first, count) }
}

impl Operation {
    pub(crate) fn fua(mut self) -> Self {
        self.flags |= 2;
        self
    }

    pub(crate) fn flushing(mut self) -> Self {
        self.flags |= 1;
        self
    }

    pub(crate) fn is_discard(&self) -> bool {
        self.flags & 4 != 0
    }

    pub(crate) fn is_fua(&self) -> bool {
        self.flags & 2 != 0
    }

    pub(crate) fn flushes(&self) -> bool {
        self.flags & 1 != 0
    }

    /// An operation on a disk with this number of sectors.
    pub(crate) fn random(random: &mut Rng, sectors: u64) -> Self {
        let first = random.u64(0..sectors);
        let count = random.u64(1..=sectors - first);
        match random.u8(0..10) {
            0..5 => write(first, count),
            5 => write(first, count).flushing(),
            6 => write(first, count).fua(),
            7 => discard(first, count),
            _ => flush(),
        }
    }
}

/// The file of a log.
pub(crate) struct Sample {
    directory: tempfile::TempDir,
}

impl Sample {
    pub(crate) fn new(operations: &[Operation]) -> Self {
        Self::with_sector(operations, 512)
    }

    /// Writes a log that has this sector size, in bytes.
    pub(crate) fn with_sector(operations: &[Operation], sector: u64) -> Self {
        let mut bytes = Vec::new();
        for number in [0x6a_7366_7773_6872, 1, operations.len() as u64, sector] {
            bytes.extend(number.to_le_bytes());
        }
        for (entry, operation) in operations.iter().enumerate() {
            bytes.resize(bytes.len().next_multiple_of(sector as usize), 0);
            let Range { start, end } = operation.sectors;
            for number in [start * 512 / sector, (end - start) * 512 / sector, operation.flags, 0] {
                bytes.extend(u64::to_le_bytes(number));
            }
            bytes.resize(bytes.len().next_multiple_of(sector as usize), 0);
            if let Some(data) = &operation.data {
                bytes.extend(data);
            } else if !operation.is_discard() {
                (0..end - start).for_each(|sector| bytes.extend(Self::content(entry, sector)));
            }
        }
        bytes.resize(bytes.len().next_multiple_of(sector as usize), 0);
        let sample = Self { directory: tempfile::tempdir().unwrap() };
        std::fs::write(sample.path(), bytes).unwrap();
        sample
    }

    /// Returns the content of a sector, relative to the start of the entry.
    pub(crate) fn content(entry: usize, sector: u64) -> [u8; 512] {
        let mut content = [0xa5; 512];
        content[..8].copy_from_slice(&(entry as u64 + 1).to_le_bytes());
        content[504..].copy_from_slice(&sector.to_le_bytes());
        content
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    pub(crate) fn log(&self) -> Arc<WriteLog> {
        Arc::new(WriteLog::open(&self.path()).unwrap())
    }
}
