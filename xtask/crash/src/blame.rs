//! The files and structures to which the missing writes of a state belong.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use ext4_view::Ext4;

use crate::SECTOR;
use crate::disk::{BaseDisk, StateDisk};
use crate::journal;
use crate::log::{EntryKind, WriteLog};
use crate::names::Names;
use crate::records::{Record, Records};
use crate::state::{CrashState, MissingWrite};
use crate::structures::{Layout, Structure};

/// The inodes of the root directory and of the reserved group descriptors.
const ROOT: u64 = 2;
const RESERVED: u64 = 7;

/// The words for blocks that no file owns.
pub const NO_FILE: &str = "blocks that no file owned";

/// The number of names after which a list is cut off.
const NAMES: usize = 8;

/// Returns a sentence for each missing write of a state, such as "write 312 (8 sectors): the content of
/// /var/lib/iot-agent/state". The names are those that the files have if no write is missing and the journal has been
/// replayed. `scratch` is a copy of the base. Afterwards, it is no longer such a copy.
///
/// # Errors
/// Returns an error if debugfs is missing or fails, if the disk or the log cannot be read, or if `scratch` cannot be
/// written.
pub fn describe(
    base: &Arc<BaseDisk>,
    log: &Arc<WriteLog>,
    state: &CrashState,
    scratch: &Path,
) -> Result<Vec<String>> {
    let complete = CrashState { point: state.point, missing: Vec::new() };
    let (complete, lost) = (StateDisk::new(base, log, &complete), StateDisk::new(base, log, state));
    let file = fs::File::options().write(true).open(scratch);
    complete.write_to(&file.with_context(|| format!("open {}", scratch.display()))?)?;
    let names = Names::replayed(scratch, &base.partition())?;
    let layout = Layout::read(&complete)?;
    let blocks = |write: &MissingWrite| blocks(base, log, &layout, write);
    let direct: BTreeSet<_> = state.missing.iter().flat_map(blocks).flatten().collect();
    let mut owners = names.owners(&unstructured(&layout, &direct))?;
    let records = match owners.values().any(|owner| *owner == journal::INODE) {
        true => {
            let journal = Records::new(&complete, layout.block, names.blocks(journal::INODE)?);
            let own = owners.iter().filter(|(_, owner)| **owner == journal::INODE);
            own.map(|(block, _)| Ok((*block, journal.record(*block)?))).collect::<Result<BTreeMap<_, _>>>()?
        }
        false => BTreeMap::new(),
    };
    owners.extend(names.owners(&unstructured(&layout, &records.values().flat_map(targets).collect()))?);
    let tree = complete.load().ok();
    let mut blame = Blame { complete, lost, layout: &layout, owners, records, paths: BTreeMap::new(), tree };
    let uses: Vec<BTreeSet<_>> = state
        .missing
        .iter()
        .map(|write| blocks(write).into_iter().map(|block| blame.use_of(block)).collect())
        .collect::<Result<_>>()?;
    let inodes: BTreeSet<_> = uses.iter().flatten().flat_map(Use::inodes).collect();
    blame.paths = names.paths(&inodes.into_iter().collect::<Vec<_>>())?;
    let sentence = |(write, uses): (&MissingWrite, &BTreeSet<Use>)| {
        let sectors: u64 = write.sectors.iter().map(|range| range.end - range.start).sum();
        let words = match log.entries()[write.entry].kind {
            EntryKind::Discard => "blocks that the file system does not use".to_owned(),
            _ => listed(uses.iter().map(|one| blame.words(one))),
        };
        let kind = if log.entries()[write.entry].is_write() { "write" } else { "discard" };
        let plural = if sectors == 1 { "" } else { "s" };
        format!("{kind} {} ({sectors} sector{plural}): {words}", write.entry)
    };
    Ok(state.missing.iter().zip(&uses).map(sentence).collect())
}

/// Returns the blocks of the file system that a missing write changes; `None` stands for those outside. A discard
/// concerns no file, so it has none.
fn blocks(base: &BaseDisk, log: &WriteLog, layout: &Layout, write: &MissingWrite) -> BTreeSet<Option<u64>> {
    let entry = &log.entries()[write.entry];
    let partition = base.partition();
    let sectors = write.sectors.iter().cloned().flatten().filter(|_| entry.is_write());
    let bytes = sectors.map(|sector| entry.offset + sector * SECTOR);
    bytes.map(|at| partition.contains(&at).then(|| (at - partition.start) / layout.block)).collect()
}

fn unstructured(layout: &Layout, blocks: &BTreeSet<u64>) -> Vec<u64> {
    blocks.iter().copied().filter(|block| layout.structure(*block).is_none()).collect()
}

/// Returns the blocks of the file system that a block of the journal concerns.
fn targets(record: &Record) -> Vec<u64> {
    match record {
        Record::Copy(block) => vec![*block],
        Record::Descriptor(_, blocks) | Record::Commit(_, blocks) => blocks.clone(),
        Record::Revocation(_) | Record::Superblock | Record::Unknown => Vec::new(),
    }
}

/// The use of a block.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    Structure(Structure),
    /// Inodes in the inode table.
    Inodes(BTreeSet<u64>),
    /// A block of an inode.
    Content(u64),
    Journal(Record, Vec<Use>),
    Free,
    Outside,
}

impl Use {
    fn inodes(&self) -> Vec<u64> {
        match self {
            Self::Inodes(inodes) => inodes.iter().copied().collect(),
            Self::Content(inode) => vec![*inode],
            Self::Journal(_, uses) => uses.iter().flat_map(Self::inodes).collect(),
            Self::Structure(_) | Self::Free | Self::Outside => Vec::new(),
        }
    }
}

struct Blame<'a> {
    /// The disk without and with the missing writes.
    complete: StateDisk,
    lost: StateDisk,
    layout: &'a Layout,
    /// The inode of each block that one owns.
    owners: BTreeMap<u64, u64>,
    /// The content of blocks of the journal.
    records: BTreeMap<u64, Record>,
    paths: BTreeMap<u64, String>,
    tree: Option<Ext4>,
}

impl Blame<'_> {
    fn use_of(&self, block: Option<u64>) -> Result<Use> {
        let Some(block) = block else { return Ok(Use::Outside) };
        let Some(record) = self.records.get(&block) else { return self.part(block, (block, &self.lost)) };
        let uses = targets(record).into_iter().map(|target| match record {
            Record::Copy(_) => self.part(target, (block, &self.complete)),
            _ => self.part(target, (target, &self.complete)),
        });
        let uses: BTreeSet<_> = uses.collect::<Result<_>>()?;
        Ok(Use::Journal(record.clone(), uses.into_iter().collect()))
    }

    /// Returns the use of a block. For a block of the inode table, these are the inodes that differ from those in the block
    /// `other` of `disk`.
    fn part(&self, block: u64, (other, disk): (u64, &StateDisk)) -> Result<Use> {
        let structure = self.layout.structure(block);
        if let Some(Structure::Inodes(_, first)) = structure {
            let read = |disk: &StateDisk, block: u64| {
                let mut content = vec![0; self.layout.block as usize];
                disk.read_partition(block * self.layout.block, &mut content).map(|()| content)
            };
            let (one, other) = (read(&self.complete, block)?, read(disk, other)?);
            let inodes = self.layout.differing(first, &one, &other);
            if !inodes.is_empty() {
                return Ok(Use::Inodes(inodes));
            }
        }
        let content = || self.owners.get(&block).map(|inode| Use::Content(*inode));
        Ok(structure.map(Use::Structure).or_else(content).unwrap_or(Use::Free))
    }

    fn words(&self, one: &Use) -> String {
        match one {
            Use::Structure(structure) => match structure {
                Structure::Superblock => "the superblock".to_owned(),
                Structure::Descriptors => "the group descriptors".to_owned(),
                Structure::BlockBitmap(group) => format!("the block bitmap of group {group}"),
                Structure::InodeBitmap(group) => format!("the inode bitmap of group {group}"),
                Structure::Inodes(group, _) => format!("the inode table of group {group}"),
            },
            Use::Inodes(inodes) => {
                let names = listed(inodes.iter().map(|inode| self.path(*inode)));
                format!("the inode{} of {names}", if inodes.len() == 1 { "" } else { "s" })
            }
            Use::Content(RESERVED) => "the reserved group descriptors".to_owned(),
            Use::Content(inode) => {
                let is_directory = self.is_directory(*inode);
                format!("the {} {}", if is_directory { "directory" } else { "content of" }, self.path(*inode))
            }
            Use::Journal(record, uses) => {
                let words = listed(uses.iter().map(|one| self.words(one)));
                match record {
                    Record::Copy(_) => format!("the journal: {words}"),
                    Record::Descriptor(number, _) => {
                        format!("the journal: the descriptor of transaction {number} ({words})")
                    }
                    Record::Commit(number, _) => {
                        format!("the journal: the commit of transaction {number} ({words})")
                    }
                    Record::Revocation(number) => {
                        format!("the journal: a revocation of transaction {number}")
                    }
                    Record::Superblock => "the superblock of the journal".to_owned(),
                    Record::Unknown => "the journal".to_owned(),
                }
            }
            Use::Free => NO_FILE.to_owned(),
            Use::Outside => "outside the root file system".to_owned(),
        }
    }

    fn path(&self, inode: u64) -> String {
        match self.paths.get(&inode) {
            _ if inode == ROOT => "/".to_owned(),
            Some(path) => path.clone(),
            None => format!("inode {inode}, which has no name"),
        }
    }

    fn is_directory(&self, inode: u64) -> bool {
        let (path, tree) = (self.path(inode), self.tree.as_ref());
        tree.is_some_and(|tree| tree.symlink_metadata(path.as_str()).is_ok_and(|found| found.is_dir()))
    }
}

/// Joins different words, and cuts off a long list.
fn listed(words: impl Iterator<Item = String>) -> String {
    let words: BTreeSet<_> = words.collect();
    let more = words.len().saturating_sub(NAMES);
    let mut text = words.into_iter().take(NAMES).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text += &format!(" and {more} more");
    }
    text
}
