//! The use of each block of ext4's journal, for the sentences about missing writes.

use std::collections::HashMap;

use anyhow::Result;

use crate::disk::StateDisk;
use crate::journal::{CHECKSUMS, COMMIT, DESCRIPTOR, FEATURES, REVOCATION, TAG, header, tags};
use crate::structures::big;

/// The content of a block of the journal.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Record {
    /// The new content of a block of the file system.
    Copy(u64),
    /// The descriptor of a transaction, and the blocks that it lists.
    Descriptor(u64, Vec<u64>),
    /// The commit of a transaction, and the blocks of all its descriptors.
    Commit(u64, Vec<u64>),
    Revocation(u64),
    Superblock,
    /// A block that no transaction uses, or whose transaction cannot be read.
    Unknown,
}

/// The journal of a disk, whose blocks are explained.
pub(crate) struct Records<'a> {
    disk: &'a StateDisk,
    block: u64,
    /// The blocks of the journal in their order, and the place of each one.
    blocks: Vec<u64>,
    places: HashMap<u64, usize>,
}

impl<'a> Records<'a> {
    pub(crate) fn new(disk: &'a StateDisk, block: u64, blocks: Vec<u64>) -> Self {
        let places = blocks.iter().enumerate().map(|(place, block)| (*block, place)).collect();
        Self { disk, block, blocks, places }
    }

    /// # Errors
    /// Returns an error if the disk cannot be read.
    pub(crate) fn record(&self, block: u64) -> Result<Record> {
        let Some(place) = self.places.get(&block).copied() else { return Ok(Record::Unknown) };
        let content = self.content(place)?;
        Ok(match header(&content) {
            _ if place == 0 => Record::Superblock,
            Some((DESCRIPTOR, transaction)) => Record::Descriptor(transaction, self.listed(&content)?),
            Some((COMMIT, transaction)) => Record::Commit(transaction, self.committed(place, transaction)?),
            Some((REVOCATION, transaction)) => Record::Revocation(transaction),
            Some(_) => Record::Unknown,
            None => self.copied(place)?.map_or(Record::Unknown, Record::Copy),
        })
    }

    fn content(&self, place: usize) -> Result<Vec<u8>> {
        let mut content = vec![0; self.block as usize];
        self.disk.read_partition(self.blocks[place] * self.block, &mut content)?;
        Ok(content)
    }

    /// Returns the places before one, the nearest first. The journal is a ring behind its superblock.
    fn before(&self, place: usize) -> impl Iterator<Item = usize> {
        (1..place).rev().chain((place + 1..self.blocks.len()).rev())
    }

    /// Returns the blocks that a descriptor lists; none if the journal has another format.
    fn listed(&self, content: &[u8]) -> Result<Vec<u64>> {
        let is_known = big(&self.content(0)?, FEATURES) & CHECKSUMS != 0;
        Ok(tags(content).iter().filter(|_| is_known).map(|tag| tag.block).collect())
    }

    /// Returns the block whose new content is at this place.
    fn copied(&self, place: usize) -> Result<Option<u64>> {
        for (distance, earlier) in self.before(place).enumerate().take(self.block as usize / TAG) {
            let content = self.content(earlier)?;
            match header(&content) {
                None => {}
                Some((DESCRIPTOR, _)) => return Ok(self.listed(&content)?.get(distance).copied()),
                Some(_) => break,
            }
        }
        Ok(None)
    }

    /// Returns the blocks of all descriptors before a commit.
    fn committed(&self, place: usize, transaction: u64) -> Result<Vec<u64>> {
        let mut blocks = Vec::new();
        for earlier in self.before(place) {
            let content = self.content(earlier)?;
            match header(&content) {
                None => {}
                Some((DESCRIPTOR, other)) if other == transaction => blocks.extend(self.listed(&content)?),
                Some((kind, other)) if other == transaction && kind != COMMIT => {}
                Some(_) => break,
            }
        }
        Ok(blocks)
    }
}
