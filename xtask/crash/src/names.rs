//! The files to which blocks and inodes belong, as debugfs(8) reports them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Result;
use xtask_core::host::tools;

/// The number of blocks or inodes in one request. An argument of a program has at most 128 KiB.
const NUMBERS: usize = 4000;

/// A file system in a file.
pub(crate) struct Names {
    debugfs: PathBuf,
    /// The name by which the ext2fs library opens the file system.
    image: String,
}

impl Names {
    /// Opens the file system in the given bytes of a file, and replays its journal in the file.
    ///
    /// # Errors
    /// Returns an error if debugfs is missing or fails.
    pub(crate) fn replayed(raw: &Path, partition: &Range<u64>) -> Result<Self> {
        let image = format!("{}?offset={}", raw.display(), partition.start);
        let names = Self { debugfs: tools::require("debugfs")?, image };
        tools::read(&names.debugfs, &["-w", "-R", "journal_run", &names.image])?;
        Ok(names)
    }

    fn ask(&self, request: &str) -> Result<String> {
        tools::read(&self.debugfs, &["-R", request, &self.image])
    }

    /// Returns the answer to a request as pairs of a number and a text.
    fn pairs(&self, request: &str, numbers: &[u64]) -> Result<BTreeMap<u64, String>> {
        let mut pairs = BTreeMap::new();
        for numbers in numbers.chunks(NUMBERS) {
            let words: Vec<_> = numbers.iter().map(u64::to_string).collect();
            for line in self.ask(&format!("{request} {}", words.join(" ")))?.lines() {
                let Some((number, text)) = line.split_once('\t') else { continue };
                if let Ok(number) = number.trim().parse() {
                    pairs.entry(number).or_insert_with(|| text.to_owned());
                }
            }
        }
        Ok(pairs)
    }

    /// Returns the inodes that own blocks. Free blocks and those of structures have no inode.
    ///
    /// # Errors
    /// Returns an error if debugfs fails.
    pub(crate) fn owners(&self, blocks: &[u64]) -> Result<BTreeMap<u64, u64>> {
        let pairs = self.pairs("icheck", blocks)?;
        Ok(pairs.into_iter().filter_map(|(block, inode)| Some((block, inode.trim().parse().ok()?))).collect())
    }

    /// Returns the absolute path of each inode that has a name.
    ///
    /// # Errors
    /// Returns an error if debugfs fails.
    pub(crate) fn paths(&self, inodes: &[u64]) -> Result<BTreeMap<u64, String>> {
        let pairs = self.pairs("ncheck", inodes)?;
        Ok(pairs
            .into_iter()
            .map(|(inode, path)| (inode, format!("/{}", path.trim_start_matches('/'))))
            .collect())
    }

    /// Returns the blocks of an inode in their order.
    ///
    /// # Errors
    /// Returns an error if debugfs fails.
    pub(crate) fn blocks(&self, inode: u64) -> Result<Vec<u64>> {
        let answer = self.ask(&format!("blocks <{inode}>"))?;
        Ok(answer.split_whitespace().filter_map(|word| word.parse().ok()).collect())
    }
}
