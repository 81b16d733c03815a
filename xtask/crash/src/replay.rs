//! The replay of ext4's journal, as a boot does it (Linux, fs/jbd2/recovery.c). `ext4-view` 1.0 replays a journal, too, but
//! ignores that a later transaction revokes a block of an earlier one, and that the journal is a ring. Therefore it reads
//! old metadata where the kernel reads a file's content.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, bail, ensure};
use crc::{CRC_32_ISCSI, Crc, Table};
use xtask_core::bail_host;

use crate::disk::StateDisk;
use crate::extents;
use crate::journal::{
    CHECKSUMS, COMMIT, DESCRIPTOR, FEATURES, HEADER, INODE, MAGIC, REVOCATION, Tag, header, tags,
};
use crate::structures::{Layout, SUPERBLOCK, big, little};

/// The blocks of the file system that the journal replaces, with their new contents.
pub(crate) type Replayed = BTreeMap<u64, Vec<u8>>;

/// The checksum of ext4 and of its journal, without the inversion at its end.
static CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&crc::Algorithm { xorout: 0, ..CRC_32_ISCSI });

/// Fields of ext4's superblock: the incompatible features with the bit of a journal that must be replayed, the
/// read-only-compatible features with the bit of checksums, and the superblock's checksum.
const INCOMPATIBLE: usize = 0x60;
const NEEDS_RECOVERY: u8 = 4;
const READ_ONLY: usize = 0x64;
const METADATA_CHECKSUMS: u64 = 0x400;
const CHECKSUM: usize = 0x3fc;

/// The other features of the journal that this module supports: block numbers of 64 bits, and revocations.
const WIDE: u64 = 2;
const REVOCATIONS: u64 = 1;
/// The offset of the checksum in a commit block.
const COMMIT_CHECKSUM: usize = 16;

/// The journal of a disk.
struct Journal<'a> {
    disk: &'a StateDisk,
    block: usize,
    /// The blocks of the journal in their order.
    blocks: &'a [u64],
    seed: u32,
    first: usize,
    revocation_width: usize,
}

/// A descriptor block of a transaction, and the place of its first content in the journal.
struct Descriptor {
    transaction: u32,
    place: usize,
    tags: Vec<Tag>,
}

/// Returns the size of a block, and what a boot would replay.
///
/// # Errors
/// Returns an error if the disk cannot be read or is damaged, or if the journal has a feature that this module does not
/// support.
pub(crate) fn replayed(disk: &StateDisk) -> Result<(u64, Replayed)> {
    let layout = Layout::read(disk)?;
    let mut replayed = Replayed::new();
    if needs_recovery(disk)? {
        replay(disk, usize::try_from(layout.block)?, &extents::blocks(disk, &layout, INODE)?, &mut replayed)?;
    }
    Ok((layout.block, replayed))
}

/// `blocks` are the blocks of the journal in their order.
fn replay(disk: &StateDisk, block: usize, blocks: &[u64], replayed: &mut Replayed) -> Result<()> {
    let mut head = vec![0; block];
    let place = *blocks.first().context("the file system has no journal")?;
    disk.read_partition(place * block as u64, &mut head)?;
    ensure!(head.starts_with(&MAGIC), "the journal has no superblock");
    let start = usize::try_from(big(&head, 28))?;
    // A journal that starts at 0 is empty. It has no features before its first transaction.
    if start == 0 {
        return clear_recovery(disk, block, replayed);
    }
    let features = big(&head, FEATURES);
    if features & CHECKSUMS == 0 || features & !(CHECKSUMS | WIDE | REVOCATIONS) != 0 {
        bail_host!(
            "the journal of the guest's file system has the features {features:#x}; only checksums of version 3 are \
             supported";
            "use an image whose file system was made by mke2fs 1.43 or newer without fast_commit; nothing is known \
             about the agent"
        );
    }
    let length = usize::try_from(big(&head, 16))?.min(blocks.len());
    let journal = Journal {
        disk,
        block,
        blocks: &blocks[..length],
        seed: crc(u32::MAX, &head[0x30..0x40]),
        first: usize::try_from(big(&head, 20))?,
        revocation_width: if features & WIDE == 0 { 4 } else { 8 },
    };
    journal.replay(start, big(&head, 24) as u32, replayed)?;
    clear_recovery(disk, block, replayed)
}

fn needs_recovery(disk: &StateDisk) -> Result<bool> {
    let mut features = [0];
    disk.read_partition(SUPERBLOCK + INCOMPATIBLE as u64, &mut features)?;
    Ok(features[0] & NEEDS_RECOVERY != 0)
}

/// Clears the bit of the superblock with which it asks for a replay.
fn clear_recovery(disk: &StateDisk, block: usize, replayed: &mut Replayed) -> Result<()> {
    let number = SUPERBLOCK / block as u64;
    let content = match replayed.entry(number) {
        std::collections::btree_map::Entry::Occupied(found) => found.into_mut(),
        std::collections::btree_map::Entry::Vacant(vacant) => {
            let mut content = vec![0; block];
            disk.read_partition(number * block as u64, &mut content)?;
            vacant.insert(content)
        }
    };
    let at = usize::try_from(SUPERBLOCK)? % block;
    let superblock = &mut content[at..at + 1024];
    superblock[INCOMPATIBLE] &= !NEEDS_RECOVERY;
    if little(superblock, READ_ONLY, 4) & METADATA_CHECKSUMS != 0 {
        let checksum = crc(u32::MAX, &superblock[..CHECKSUM]);
        superblock[CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
    }
    Ok(())
}

impl Journal<'_> {
    fn replay(&self, start: usize, first: u32, replayed: &mut Replayed) -> Result<()> {
        let (mut descriptors, mut revoked) = (Vec::new(), HashMap::new());
        let (mut of_transaction, mut revoked_now) = (Vec::new(), Vec::new());
        let (mut place, mut transaction) = (start, first);
        let mut seen = 0;
        // The log ends at the first block that does not belong to the next transaction, or that was not written whole.
        while seen <= self.blocks.len() {
            let content = self.content(place)?;
            let Some((kind, _)) = header(&content).filter(|(_, number)| *number == u64::from(transaction))
            else {
                break;
            };
            (place, seen) = (self.skip(place, 1), seen + 1);
            match kind {
                DESCRIPTOR if self.has_tail_checksum(&content) => {
                    let descriptor = Descriptor { transaction, place, tags: tags(&content) };
                    let count = descriptor.tags.len();
                    (place, seen) = (self.skip(place, count), seen + count);
                    of_transaction.push(descriptor);
                }
                REVOCATION if self.has_tail_checksum(&content) => {
                    revoked_now.extend(self.revocations(&content))
                }
                COMMIT if self.has_commit_checksum(&content) => {
                    descriptors.append(&mut of_transaction);
                    for block in revoked_now.drain(..) {
                        revoked.insert(block, transaction);
                    }
                    transaction = transaction.wrapping_add(1);
                }
                _ => break,
            }
        }
        for Descriptor { transaction, place, tags } in descriptors {
            for (count, tag) in tags.iter().enumerate() {
                let is_revoked =
                    revoked.get(&tag.block).is_some_and(|by| by.wrapping_sub(transaction) < 1 << 31);
                if !is_revoked {
                    replayed.insert(tag.block, self.copied(transaction, tag, self.skip(place, count))?);
                }
            }
        }
        Ok(())
    }

    fn content(&self, place: usize) -> Result<Vec<u8>> {
        let mut content = vec![0; self.block];
        let block = self.blocks.get(place).context("the journal is shorter than its superblock says")?;
        self.disk.read_partition(block * self.block as u64, &mut content)?;
        Ok(content)
    }

    /// The journal is a ring behind its superblock.
    fn skip(&self, place: usize, count: usize) -> usize {
        let next = place + count;
        if next < self.blocks.len() { next } else { next - self.blocks.len() + self.first }
    }

    /// Returns the blocks that a revocation block lists. Its field at 12 is the number of bytes in use.
    fn revocations(&self, content: &[u8]) -> Vec<u64> {
        let used = (big(content, HEADER) as usize).clamp(HEADER + 4, content.len());
        let numbers = content[HEADER + 4..used].chunks_exact(self.revocation_width);
        numbers.map(|bytes| bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))).collect()
    }

    /// Returns the new content of a block, which is at `place` in the journal.
    ///
    /// # Errors
    /// Returns an error if the content does not match its checksum, with which a kernel would refuse to mount.
    fn copied(&self, transaction: u32, tag: &Tag, place: usize) -> Result<Vec<u8>> {
        let mut content = self.content(place)?;
        let checksum = crc(crc(self.seed, &transaction.to_be_bytes()), &content);
        if checksum != tag.checksum {
            bail!("the journal's copy of the block {} does not match its checksum", tag.block);
        }
        if tag.is_escaped {
            content[..4].copy_from_slice(&MAGIC);
        }
        Ok(content)
    }

    /// Returns whether a descriptor or a revocation block has the right checksum, in its last four bytes.
    fn has_tail_checksum(&self, content: &[u8]) -> bool {
        self.has_checksum(content, content.len() - 4)
    }

    fn has_commit_checksum(&self, content: &[u8]) -> bool {
        self.has_checksum(content, COMMIT_CHECKSUM)
    }

    /// Returns whether the block has the right checksum at this offset. The checksum is that of the block with zeroes in
    /// its place.
    fn has_checksum(&self, content: &[u8], at: usize) -> bool {
        let before = crc(self.seed, &content[..at]);
        crc(crc(before, &[0; 4]), &content[at + 4..]) == big(content, at) as u32
    }
}

/// Continues a checksum.
fn crc(seed: u32, bytes: &[u8]) -> u32 {
    let mut digest = CRC.digest_with_initial(seed.reverse_bits());
    digest.update(bytes);
    digest.finalize()
}
