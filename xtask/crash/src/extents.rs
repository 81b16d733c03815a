//! The blocks of a file, from its extent tree (Linux, Documentation/filesystems/ext4/ifork.rst).

use anyhow::{Result, ensure};

use crate::disk::StateDisk;
use crate::structures::{Layout, little};

/// The offset and the length of the root of the tree in an inode.
const ROOT_AT: u64 = 40;
const ROOT: usize = 60;
/// The length of the header of a node, and of an entry.
const ENTRY: usize = 12;
const MAGIC: u64 = 0xf30a;
/// The greatest depth of a tree.
const DEEPEST: u64 = 5;

/// Returns the blocks of an inode without holes, in their order.
///
/// # Errors
/// Returns an error if the disk cannot be read, or if the inode has no extent tree.
pub(crate) fn blocks(disk: &StateDisk, layout: &Layout, inode: u64) -> Result<Vec<u64>> {
    let place = layout.inode_at(inode);
    ensure!(place.is_some(), "the file system has no inode {inode}");
    let mut root = [0; ROOT];
    disk.read_partition(place.unwrap_or_default() + ROOT_AT, &mut root)?;
    let mut blocks = Vec::new();
    walk(disk, layout.block, &root, DEEPEST, &mut blocks)?;
    Ok(blocks)
}

fn walk(disk: &StateDisk, block: u64, node: &[u8], deepest: u64, blocks: &mut Vec<u64>) -> Result<()> {
    let (entries, depth) = (little(node, 2, 2) as usize, little(node, 6, 2));
    let is_node = little(node, 0, 2) == MAGIC && depth <= deepest && (entries + 1) * ENTRY <= node.len();
    ensure!(is_node, "the extent tree is damaged");
    for entry in node[ENTRY..].chunks_exact(ENTRY).take(entries) {
        if depth == 0 {
            let start = little(entry, 8, 4) | little(entry, 6, 2) << 32;
            blocks.extend(start..start + little(entry, 4, 2));
        } else {
            let mut child = vec![0; usize::try_from(block)?];
            disk.read_partition((little(entry, 4, 4) | little(entry, 8, 2) << 32) * block, &mut child)?;
            walk(disk, block, &child, depth - 1, blocks)?;
        }
    }
    Ok(())
}
