//! The reports of a run for people and for CI, made from its `report.json`: a page ([`html`]), JUnit ([`junit`]), and
//! Markdown with annotations for the page of a CI job ([`markdown`]). Each function returns a text. This crate reads
//! the files of a run ([`Evidence::read`]), and writes none.

mod faults;
mod html;
mod junit;
mod markdown;
#[cfg(all(test, feature = "real"))]
mod pages;
#[cfg(test)]
mod samples;
mod timeline;
mod torture;
mod words;

pub use html::html;
pub use junit::junit;
pub use markdown::{annotations, markdown};

use std::path::Path;

use anyhow::Error;
use xtask_core::fs::read_if_there;
use xtask_core::output::clean;
use xtask_core::report::past::PastRun;
use xtask_core::report::{CONSOLE, GUEST, JOURNAL, PhaseReport, Report};

/// The files of a run that `report.html` shows beside the report.
#[derive(Debug, Default)]
pub struct Evidence {
    /// The content of console.log, as bytes, because the report has offsets into it. Empty if there is no such file.
    pub console: Vec<u8>,
    /// The content of journal.log. Empty if there is no such file.
    pub journal: Vec<u8>,
    /// The content of guest.txt. Empty if there is no such file.
    pub guest: Vec<u8>,
    /// The last runs of the cache, the newest last.
    pub past: Vec<PastRun>,
}

impl Evidence {
    /// Reads the files in the directory of a run or of `--report`. A file that does not exist counts as empty. A file
    /// that cannot be read also does, and its error is returned, too.
    pub fn read(directory: &Path, past: Vec<PastRun>) -> (Self, Vec<Error>) {
        let mut errors = Vec::new();
        let mut read = |name| match read_if_there(&directory.join(name)) {
            Ok(content) => content.unwrap_or_default(),
            Err(error) => {
                errors.push(error);
                Vec::new()
            }
        };
        let (console, journal, guest) = (read(CONSOLE), read(JOURNAL), read(GUEST));
        (Self { console, journal, guest, past }, errors)
    }
}

/// The maximum number of characters of a line of an output of the guest.
const LINE_CHARACTERS: usize = 240;

/// Returns the non-empty lines of an output of the guest, without escape sequences.
fn lines(output: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(output);
    let lines = text.lines().map(|line| shortened(clean(line).trim_end(), LINE_CHARACTERS));
    lines.filter(|line| !line.is_empty()).collect()
}

/// Returns the last lines of a list: at most `count`, which have at most `bytes` in HTML.
fn last(lines: &[String], count: usize, bytes: usize) -> &[String] {
    let mut left = bytes;
    let fits = lines.iter().rev().take(count).take_while(|line| {
        let enough = left.checked_sub(escaped_length(line));
        left = enough.unwrap_or(0);
        enough.is_some()
    });
    &lines[lines.len() - fits.count()..]
}

/// Returns the length in bytes of a line in HTML.
fn escaped_length(line: &str) -> usize {
    line.len() + 1 + 5 * line.matches(['&', '<', '>', '"']).count()
}

/// Returns a text of at most `characters` characters.
pub(crate) fn shortened(text: &str, characters: usize) -> String {
    match text.char_indices().nth(characters) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// Returns the part of the console that was printed during the phase with this index; `None` if the report has no
/// offset for the phase.
fn console_of<'a>(report: &Report, console: &'a [u8], phase: usize) -> Option<&'a [u8]> {
    let at = |phase: &PhaseReport| Some(usize::try_from(phase.console_offset?).ok()?.min(console.len()));
    let start = at(report.phases.get(phase)?)?;
    let end = report.phases[phase + 1..].iter().find_map(at).unwrap_or(console.len());
    console.get(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_its_part_of_the_console() {
        let mut report = samples::verified();
        let console = vec![b'x'; 100];
        let sizes = |report: &Report| -> Vec<_> {
            let phases = 0..report.phases.len();
            phases.map(|phase| console_of(report, &console, phase).map(<[u8]>::len)).collect()
        };
        let none = [None; 3];
        assert_eq!(sizes(&report), [&none[..], &[Some(9); 8], &[Some(28)]].concat());
        assert_eq!(console_of(&samples::failed(), &console, 10), None, "the phase was not reached");
        report.phases[11].console_offset = Some(u64::MAX);
        assert_eq!(sizes(&report)[10..], [Some(37), Some(0)]);
        report.phases[11].console_offset = Some(0);
        assert_eq!(sizes(&report)[10..], [None, Some(100)], "the log was replaced");
    }

    #[test]
    fn the_last_lines_fit_into_a_number_of_bytes() {
        let lines: Vec<_> = ["a", "<b>", "c"].map(str::to_owned).to_vec();
        assert_eq!(*last(&lines, 9, 99), lines[..]);
        assert_eq!(*last(&lines, 2, 99), lines[1..]);
        assert_eq!(*last(&lines, 9, 15), lines[2..], "the line has ten bytes more in HTML");
        assert_eq!(super::lines(b"a\r\n\r\n\x1b[31mb\xff\x1b[0m\r\n"), ["a", "b\u{fffd}"]);
        assert_eq!(shortened("aäb", 2), "aä…");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_an_error_and_counts_as_empty() {
        let directory = tempfile::tempdir().unwrap();
        let (evidence, errors) = Evidence::read(directory.path(), Vec::new());
        assert!(evidence.console.is_empty() && errors.is_empty());
        std::fs::write(directory.path().join(JOURNAL), "a").unwrap();
        std::fs::create_dir(directory.path().join(CONSOLE)).unwrap();
        let (evidence, errors) = Evidence::read(directory.path(), Vec::new());
        assert_eq!(evidence.journal, b"a");
        assert!(format!("{:#}", errors[0]).contains(CONSOLE), "{errors:?}");
    }
}
