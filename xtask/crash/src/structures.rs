//! The places of ext4's own structures (Linux, Documentation/filesystems/ext4).

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Result, ensure};

use crate::disk::StateDisk;

pub(crate) const SUPERBLOCK: u64 = 1024;
const META_BG: u64 = 0x10;
const WIDE: u64 = 0x80;

pub(crate) fn little(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

pub(crate) fn big(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 4].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A structure that belongs to no file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Structure {
    Superblock,
    Descriptors,
    BlockBitmap(usize),
    InodeBitmap(usize),
    /// A block of the inode table of a group, and the first inode in it.
    Inodes(usize, u64),
}

/// The sizes and places in a file system. Blocks are numbered from the start of the partition.
pub(crate) struct Layout {
    /// Bytes in a block and in an inode.
    pub(crate) block: u64,
    pub(crate) inode: u64,
    inodes_per_group: u64,
    descriptors: Range<u64>,
    /// The block bitmap, the inode bitmap and the inode table of each group.
    groups: Vec<[u64; 3]>,
}

impl Layout {
    /// # Errors
    /// Returns an error if the disk cannot be read, or if its descriptors are not all at the start of the file system.
    pub(crate) fn read(disk: &StateDisk) -> Result<Self> {
        let mut head = [0; 1024];
        disk.read_partition(SUPERBLOCK, &mut head)?;
        let features = little(&head, 96, 4);
        ensure!(features & META_BG == 0, "the file system has the feature meta_bg");
        let (scale, per_group) = (little(&head, 24, 4), little(&head, 32, 4));
        ensure!(scale <= 6 && per_group > 0, "the superblock is damaged");
        let is_wide = features & WIDE != 0;
        let (block, first) = (1024 << scale, little(&head, 20, 4));
        let size = if is_wide { little(&head, 254, 2).max(32) } else { 32 };
        let blocks = little(&head, 4, 4) | if is_wide { little(&head, 0x150, 4) << 32 } else { 0 };
        let count = blocks.saturating_sub(first).div_ceil(per_group);
        let start = first + 1;
        let descriptors = start..start + (count * size).div_ceil(block);
        let mut groups = Vec::new();
        for group in 0..count {
            let mut bytes = [0; 64];
            disk.read_partition(start * block + group * size, &mut bytes[..size.min(64) as usize])?;
            let high = |at| if size >= 64 { little(&bytes, at + 32, 4) << 32 } else { 0 };
            groups.push([0, 4, 8].map(|at| little(&bytes, at, 4) | high(at)));
        }
        let (inode, inodes_per_group) = (little(&head, 88, 2).max(128), little(&head, 40, 4));
        Ok(Self { block, inode, inodes_per_group, descriptors, groups })
    }

    pub(crate) fn structure(&self, block: u64) -> Option<Structure> {
        if block == SUPERBLOCK / self.block {
            return Some(Structure::Superblock);
        }
        if self.descriptors.contains(&block) {
            return Some(Structure::Descriptors);
        }
        let table = (self.inodes_per_group * self.inode).div_ceil(self.block);
        self.groups.iter().enumerate().find_map(|(group, [blocks, inodes, start])| match block {
            _ if block == *blocks => Some(Structure::BlockBitmap(group)),
            _ if block == *inodes => Some(Structure::InodeBitmap(group)),
            _ if (*start..start + table).contains(&block) => {
                let before = (block - start) * (self.block / self.inode);
                Some(Structure::Inodes(group, group as u64 * self.inodes_per_group + before + 1))
            }
            _ => None,
        })
    }

    /// Returns the place of an inode in bytes of the partition.
    pub(crate) fn inode_at(&self, inode: u64) -> Option<u64> {
        let (group, index) = ((inode - 1) / self.inodes_per_group, (inode - 1) % self.inodes_per_group);
        let [_, _, table] = *self.groups.get(usize::try_from(group).ok()?)?;
        Some(table * self.block + index * self.inode)
    }

    /// Returns the inodes that differ in two versions of a block of the inode table.
    pub(crate) fn differing(&self, first: u64, one: &[u8], other: &[u8]) -> BTreeSet<u64> {
        let slots = one.chunks(self.inode as usize).zip(other.chunks(self.inode as usize));
        (first..).zip(slots).filter(|(_, (one, other))| one != other).map(|(inode, _)| inode).collect()
    }
}
