//! A state of the disk after a power cut, and the check whether it is legal.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::log::{EntryKind, WriteLog};
use crate::view::View;

/// A state of the disk after a power cut. The entries of the log before `point` are applied in their order, without the
/// sectors in `missing`. The documentation of this crate has the rules.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CrashState {
    /// The number of entries that had completed.
    pub point: usize,
    /// The generator sorts this list by entry. Another order, and several items for an entry, have the same meaning.
    pub missing: Vec<MissingWrite>,
}

/// The part of a write or discard that is not on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MissingWrite {
    pub entry: usize,
    /// Sectors of 512 bytes, relative to the start of the entry.
    pub sectors: Vec<Range<u64>>,
}

impl MissingWrite {
    /// One run of sectors is missing.
    pub fn run(entry: usize, sectors: Range<u64>) -> Self {
        Self { entry, sectors: Vec::from([sectors]) }
    }

    /// The whole write or discard is missing.
    pub(crate) fn whole(log: &WriteLog, entry: usize) -> Self {
        Self::run(entry, 0..log.entries()[entry].sectors())
    }
}

impl CrashState {
    /// Checks that a power cut can leave this state. A durable write may be missing where a later operation on the same
    /// sectors is not missing, because the disk's content is then the same.
    ///
    /// # Errors
    /// Returns a sentence that names the entry which the log does not have, or the durable write that is missing.
    pub fn check(&self, log: &WriteLog) -> Result<(), String> {
        let count = log.entries().len();
        if self.point > count {
            return Err(format!("the crash is after entry {}, but the log has {count} entries", self.point));
        }
        let view = self.view();
        for (number, ranges) in view.missing() {
            let entry = log.entries().get(number).filter(|entry| number < self.point && entry.changes());
            let Some(entry) = entry else {
                return Err(format!("entry {number} is missing, but it is no write before the crash"));
            };
            if ranges.last().is_some_and(|last| last.end > entry.sectors()) {
                return Err(format!("sectors are missing behind the end of entry {number}"));
            }
            let Some(reason) = self.durable(log, number) else { continue };
            for range in ranges {
                let sectors = entry.first() + range.start..entry.first() + range.end;
                let lost = view.runs(log, sectors).find(|run| run.entry.is_none_or(|later| later < number));
                if let Some(lost) = lost {
                    let sector = lost.sectors.start;
                    return Err(format!("entry {number} is missing at sector {sector}, but {reason}"));
                }
            }
        }
        Ok(())
    }

    pub(crate) fn view(&self) -> View {
        View::new(self.point, self.missing.iter().map(|write| (write.entry, write.sectors.as_slice())))
    }

    /// Returns the reason why an entry is durable at the moment of the crash.
    fn durable(&self, log: &WriteLog, number: usize) -> Option<String> {
        let entry = &log.entries()[number];
        if entry.kind == EntryKind::Discard {
            return None;
        }
        let after = log.flushes().partition_point(|flush| *flush <= number);
        match log.flushes().get(after) {
            Some(flush) if *flush < self.point => Some(format!("entry {flush} has flushed it")),
            _ => entry.fua.then(|| "it has the flag FUA".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{Sample, discard, flush, write};

    #[test]
    fn states_are_refused_with_the_reason() {
        let operations =
            [write(0, 4), flush(), write(2, 4).fua(), write(0, 8), discard(0, 4), flush(), write(9, 1)];
        let sample = Sample::new(&operations);
        let log = sample.log();
        let cases = [
            (8, vec![], "after entry 8"),
            (2, vec![MissingWrite::run(2, 0..1)], "entry 2 is missing, but it is no write"),
            (2, vec![MissingWrite::run(1, 0..1)], "entry 1 is missing, but it is no write"),
            (2, vec![MissingWrite::run(0, 3..5)], "behind the end"),
            (2, vec![MissingWrite::run(0, 1..2)], "entry 0 is missing at sector 1, but entry 1 has flushed"),
            (3, vec![MissingWrite::run(0, 1..4)], "entry 0 is missing at sector 1, but entry 1 has flushed"),
            (3, vec![MissingWrite::run(2, 3..4)], "entry 2 is missing at sector 5, but it has the flag FUA"),
            (
                4,
                vec![MissingWrite::run(2, 3..4), MissingWrite::run(3, 5..6)],
                "entry 2 is missing at sector 5",
            ),
            (
                6,
                vec![MissingWrite::run(4, 0..4), MissingWrite::run(3, 0..1)],
                "entry 3 is missing at sector 0, but entry 5",
            ),
        ];
        for (point, missing, reason) in cases {
            let refusal = CrashState { point, missing }.check(&log).unwrap_err();
            assert!(refusal.contains(reason), "{reason}: {refusal}");
        }
        let cases = [
            (7, vec![]),
            (1, vec![MissingWrite::run(0, 0..4)]),
            (3, vec![MissingWrite::run(0, 2..4)]),
            (4, vec![MissingWrite::run(2, 0..4), MissingWrite::run(3, 0..2)]),
            (6, vec![MissingWrite::run(4, 1..3)]),
            (6, vec![MissingWrite::run(3, 0..4)]),
            (7, vec![MissingWrite::run(6, 0..1), MissingWrite::run(4, 0..4)]),
        ];
        for (point, missing) in cases {
            CrashState { point, missing }.check(&log).unwrap();
        }
    }

    #[test]
    fn a_state_survives_its_file() {
        let state = CrashState { point: 7, missing: vec![MissingWrite::run(3, 0..1)] };
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<CrashState>(&text).unwrap(), state);
    }
}
