//! The format of the blocks of ext4's journal, with checksums of version 3 (Linux,
//! Documentation/filesystems/ext4/journal.rst).

use crate::structures::big;

/// The inode of the journal.
pub(crate) const INODE: u64 = 8;
/// The beginning of a block with a header: a superblock, or a block of one of the types below.
pub(crate) const MAGIC: [u8; 4] = [0xc0, 0x3b, 0x39, 0x98];
/// The length of the header: magic number, type, transaction.
pub(crate) const HEADER: usize = 12;
pub(crate) const DESCRIPTOR: u64 = 1;
pub(crate) const COMMIT: u64 = 2;
pub(crate) const REVOCATION: u64 = 5;
/// The offset of the features in the journal's superblock, and the feature of checksums of version 3.
pub(crate) const FEATURES: usize = 0x28;
pub(crate) const CHECKSUMS: u64 = 0x10;
/// The length of a tag and of the UUID after it, and the flags of a tag.
pub(crate) const TAG: usize = 16;
const UUID: usize = 16;
const ESCAPED: u64 = 1;
const SAME_UUID: u64 = 2;
const LAST: u64 = 8;

/// An item of a descriptor block. The contents follow the descriptor in the order of its tags.
pub(crate) struct Tag {
    /// The block of the file system that gets the content.
    pub(crate) block: u64,
    /// Whether the content begins with [`MAGIC`], in whose place the journal has zeroes.
    pub(crate) is_escaped: bool,
    pub(crate) checksum: u32,
}

/// Returns the type and the transaction of a block, or `None` if the block has no header.
pub(crate) fn header(content: &[u8]) -> Option<(u64, u64)> {
    content.starts_with(&MAGIC).then(|| (big(content, 4), big(content, 8)))
}

/// Returns the tags of a descriptor block, whose last four bytes are its checksum.
pub(crate) fn tags(content: &[u8]) -> Vec<Tag> {
    let (mut tags, mut at) = (Vec::new(), HEADER);
    while at + TAG <= content.len() - 4 {
        let flags = big(content, at + 4);
        tags.push(Tag {
            block: big(content, at) | big(content, at + 8) << 32,
            is_escaped: flags & ESCAPED != 0,
            checksum: big(content, at + 12) as u32,
        });
        at += TAG + if flags & SAME_UUID == 0 { UUID } else { 0 };
        if flags & LAST != 0 {
            break;
        }
    }
    tags
}
