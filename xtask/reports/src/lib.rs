//! The reports of a run for people and for CI, made from its `report.json`: a page ([`html`]), JUnit ([`junit`]), and
//! Markdown with annotations for the page of a CI job ([`markdown`]). Each function returns a text. This crate reads
//! the files of a run ([`Evidence::read`]), and writes none.

mod html;
mod junit;
mod markdown;
#[cfg(all(test, feature = "real"))]
mod pages;
#[cfg(test)]
mod samples;
mod timeline;
mod words;

pub use html::html;
pub use junit::junit;
pub use markdown::{annotations, markdown};

use std::path::Path;

use anyhow::Result;
use xtask_core::fs::read_if_there;
use xtask_core::output::clean;
use xtask_core::report::past::PastRun;
use xtask_core::report::{CONSOLE, JOURNAL, PhaseReport, PhaseStatus, Report};

/// The files of a run that `report.html` shows beside the report.
#[derive(Debug, Default)]
pub struct Evidence {
    /// The content of console.log, as bytes, because the report has offsets into it. Empty if there is no such file.
    pub console: Vec<u8>,
    /// The last lines of the guest's journal.
    pub journal: Vec<String>,
    /// The last runs of the cache, the newest last.
    pub past: Vec<PastRun>,
}

/// The number of the journal's lines that a page shows.
const JOURNAL_LINES: usize = 80;

impl Evidence {
    /// Reads the files in the directory of a run or of `--report`. A file that does not exist counts as empty.
    ///
    /// # Errors
    /// Returns an error that names the file that exists and cannot be read.
    pub fn read(directory: &Path, past: Vec<PastRun>) -> Result<Self> {
        let read = |name| anyhow::Ok(read_if_there(&directory.join(name))?.unwrap_or_default());
        Ok(Self { console: read(CONSOLE)?, journal: last_lines(&read(JOURNAL)?, JOURNAL_LINES), past })
    }
}

/// Returns the last lines of an output of the guest, without escape sequences.
fn last_lines(output: &[u8], count: usize) -> Vec<String> {
    let text = String::from_utf8_lossy(output);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].iter().map(|line| clean(line.trim_end()).to_string()).collect()
}

/// Returns the part of the console that was printed during the phase with this index.
fn console_of<'a>(report: &Report, console: &'a [u8], phase: usize) -> &'a [u8] {
    let at =
        |phase: &PhaseReport| usize::try_from(phase.console_offset).unwrap_or(usize::MAX).min(console.len());
    let mut ran = report.phases[phase..].iter().filter(|phase| phase.status != PhaseStatus::Skipped);
    match ran.next() {
        Some(first) if first.name == report.phases[phase].name => {
            console.get(at(first)..ran.next().map_or(console.len(), at)).unwrap_or_default()
        }
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_its_part_of_the_console() {
        let report = samples::verified();
        let console = vec![b'x'; 100];
        let sizes: Vec<_> =
            (0..report.phases.len()).map(|phase| console_of(&report, &console, phase).len()).collect();
        assert_eq!(sizes, [0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9, 28]);
        assert!(console_of(&samples::failed(), &console, 10).is_empty(), "the phase was not reached");
        assert!(console_of(&report, b"", 4).is_empty());
    }

    #[test]
    fn the_files_of_a_run_are_read_where_they_exist() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Evidence::read(directory.path(), Vec::new()).unwrap().console, b"");
        std::fs::write(directory.path().join(JOURNAL), "a\n\x1b[31mb\x1b[0m\n").unwrap();
        assert_eq!(Evidence::read(directory.path(), Vec::new()).unwrap().journal, ["a", "b"]);
        std::fs::create_dir(directory.path().join(CONSOLE)).unwrap();
        let error = Evidence::read(directory.path(), Vec::new()).unwrap_err();
        assert!(format!("{error:#}").contains(CONSOLE), "{error:#}");
    }
}
