//! The versions of each sector: an index of the log, which is made once. Therefore a state does not need a map of the disk.

use std::ops::Range;

/// The disk, cut at each border of an entry. The same entries change all sectors of a piece.
pub(crate) struct Versions {
    /// The first sector of each piece, and the end of the last one.
    borders: Vec<u64>,
    /// The place in `entries` at which the versions of a piece begin.
    starts: Vec<usize>,
    entries: Vec<u32>,
}

impl Versions {
    /// Makes the index from the changes of the log in their order: the number of each entry and its sectors.
    pub(crate) fn new(changes: &[(usize, Range<u64>)]) -> Self {
        let mut borders: Vec<_> =
            changes.iter().flat_map(|(_, sectors)| [sectors.start, sectors.end]).collect();
        borders.sort_unstable();
        borders.dedup();
        let place = |sector: u64| borders.partition_point(|border| *border < sector);
        let pieces = |sectors: &Range<u64>| place(sectors.start)..place(sectors.end);
        let mut starts = vec![0; borders.len() + 1];
        for piece in changes.iter().flat_map(|(_, sectors)| pieces(sectors)) {
            starts[piece + 1] += 1;
        }
        for piece in 1..starts.len() {
            starts[piece] += starts[piece - 1];
        }
        let mut next = starts.clone();
        let mut all = vec![0; starts.last().copied().unwrap_or(0)];
        for (number, sectors) in changes {
            for piece in pieces(sectors) {
                all[next[piece]] = *number as u32;
                next[piece] += 1;
            }
        }
        Self { borders, starts, entries: all }
    }

    /// Returns the entries that change a sector, in ascending order, and the sector at which this answer ends.
    pub(crate) fn at(&self, sector: u64) -> (&[u32], u64) {
        let behind = self.borders.partition_point(|border| *border <= sector);
        let end = self.borders.get(behind).copied().unwrap_or(u64::MAX);
        let entries = behind.checked_sub(1).map(|piece| self.starts[piece]..self.starts[piece + 1]);
        (&self.entries[entries.unwrap_or_default()], end)
    }

    /// Returns the sectors from the first change to the last one.
    pub(crate) fn range(&self) -> Range<u64> {
        self.borders.first().copied().unwrap_or(0)..self.borders.last().copied().unwrap_or(0)
    }
}
