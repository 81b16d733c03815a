//! The root file system of a crash state, as a boot sees it.

use std::error::Error;

use anyhow::Result;
use ext4_view::{Ext4, Ext4Read};

use crate::disk::StateDisk;
use crate::replay::{Replayed, replayed};

impl StateDisk {
    /// Loads the root file system, and replays its journal in memory.
    ///
    /// # Errors
    /// Returns an error if the disk cannot be read, or if its file system is corrupt or has an unknown feature.
    pub fn load(&self) -> Result<Ext4> {
        Ok(Ext4::load(Box::new(self.recovered()?))?)
    }

    pub(crate) fn recovered(&self) -> Result<Recovered> {
        let (block, replayed) = replayed(self)?;
        Ok(Recovered { disk: self.clone(), block, replayed })
    }
}

/// A partition after the replay of its journal.
pub(crate) struct Recovered {
    disk: StateDisk,
    block: u64,
    replayed: Replayed,
}

impl Ext4Read for Recovered {
    fn read(&mut self, at: u64, into: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        self.disk.read_partition(at, into)?;
        let end = at + into.len() as u64;
        for (number, content) in self.replayed.range(at / self.block..end.div_ceil(self.block)) {
            let start = number * self.block;
            let (first, last) = (start.max(at), (start + self.block).min(end));
            let place = |byte: u64, from: u64| (byte - from) as usize;
            into[place(first, at)..place(last, at)]
                .copy_from_slice(&content[place(first, start)..place(last, start)]);
        }
        Ok(())
    }
}
