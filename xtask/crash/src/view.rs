//! The version of each sector that a crash state chooses.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::log::WriteLog;

/// A run of sectors that have the version of one entry.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Run {
    /// Sectors of the disk.
    pub(crate) sectors: Range<u64>,
    /// The entry; `None` for the content from before the log.
    pub(crate) entry: Option<usize>,
}

/// The versions that a crash state chooses.
pub(crate) struct View {
    point: usize,
    /// The missing sectors of each entry, relative to the entry's start. They are sorted and do not touch.
    missing: BTreeMap<usize, Vec<Range<u64>>>,
}

impl View {
    /// `lost` has entries and their missing sectors, in any order.
    pub(crate) fn new<'a>(point: usize, lost: impl Iterator<Item = (usize, &'a [Range<u64>])>) -> Self {
        let mut missing = BTreeMap::<usize, Vec<Range<u64>>>::new();
        for (entry, sectors) in lost {
            missing.entry(entry).or_default().extend(sectors.iter().cloned());
        }
        for ranges in missing.values_mut() {
            *ranges = merged(std::mem::take(ranges));
        }
        Self { point, missing }
    }

    /// Returns the missing sectors of each entry, relative to the entry's start.
    pub(crate) fn missing(&self) -> impl Iterator<Item = (usize, &[Range<u64>])> {
        self.missing.iter().map(|(entry, ranges)| (*entry, ranges.as_slice()))
    }

    /// Returns the entry whose version a sector of the disk has, and the sector at which this answer ends.
    fn version(&self, log: &WriteLog, sector: u64) -> (Option<usize>, u64) {
        let (entries, mut end) = log.versions().at(sector);
        let before = entries.partition_point(|entry| (*entry as usize) < self.point);
        for entry in entries[..before].iter().rev().map(|entry| *entry as usize) {
            let Some(ranges) = self.missing.get(&entry) else { return (Some(entry), end) };
            let first = log.entries()[entry].first();
            let next = ranges.partition_point(|range| first + range.end <= sector);
            match ranges.get(next) {
                Some(range) if first + range.start <= sector => end = end.min(first + range.end),
                Some(range) => return (Some(entry), end.min(first + range.start)),
                None => return (Some(entry), end),
            }
        }
        (None, end)
    }

    /// Returns the versions of these sectors of the disk, as runs that are as long as possible.
    pub(crate) fn runs(&self, log: &WriteLog, sectors: Range<u64>) -> impl Iterator<Item = Run> {
        let mut at = sectors.start;
        std::iter::from_fn(move || {
            let start = at;
            let (entry, mut end) = (start < sectors.end).then(|| self.version(log, start))?;
            while end < sectors.end {
                let (other, next) = self.version(log, end);
                if other != entry {
                    break;
                }
                end = next;
            }
            at = end.min(sectors.end);
            Some(Run { sectors: start..at, entry })
        })
    }

    /// Returns the runs that have the version of an entry.
    pub(crate) fn changed(&self, log: &WriteLog) -> impl Iterator<Item = Run> {
        self.runs(log, log.versions().range()).filter(|run| run.entry.is_some())
    }
}

/// Sorts ranges, and joins those that touch. Empty ranges vanish.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged = Vec::<Range<u64>>::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_become_one() {
        assert_eq!(merged(vec![5..7, 0..2, 2..3, 9..9, 6..8]), [0..3, 5..8]);
    }
}
