//! The file of `--report`: what is known about the program, for another program. The exit code alone does not say it,
//! because a program may end with each of the codes that `try` has.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result};
use serde_json::{Value, json};
use xtask_core::error::{Failure, code, hint};
use xtask_core::output::clean;

use crate::ending::{Conclusion, Outcome, signal_name};
use crate::wire::End;

/// The version of the document. Raise it when a field changes its meaning.
const SCHEMA: u32 = 1;

/// The number of bytes of the program's standard error that the report has.
const KEPT: usize = 4096;

/// What an attempt has seen of the program so far.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Whether the program was started.
    pub(crate) started: bool,
    /// The last bytes of its standard error.
    stderr: Vec<u8>,
}

impl Seen {
    /// Adds a part of the standard error.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.stderr.extend(bytes);
        self.stderr.drain(..self.stderr.len().saturating_sub(KEPT));
    }
}

/// A report that is not written yet.
pub(crate) struct Report {
    path: PathBuf,
    file: File,
}

impl Report {
    /// Empties the file, or makes it. If this process is killed, the file stays empty.
    ///
    /// # Errors
    /// Returns a usage error if the file cannot be written.
    pub(crate) fn begin(path: &Path) -> Result<Self> {
        let refusal = |error| Failure::usage(format!("--report {}: {error}", path.display()));
        let file = File::create(path).map_err(refusal)?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Writes the document.
    ///
    /// # Errors
    /// Returns a failure of the host if the file cannot be written.
    pub(crate) fn end(mut self, result: &Result<Conclusion>, seen: &Seen) -> Result<()> {
        let text = format!("{}\n", document(result, seen));
        let failure = || {
            let what = format!("write the report {}", self.path.display());
            Failure::host(what, "free space on its file system, and run the command again")
        };
        self.file.write_all(text.as_bytes()).and_then(|()| self.file.flush()).with_context(failure)
    }
}

fn document(result: &Result<Conclusion>, seen: &Seen) -> Value {
    let (mut document, code, sentence) = match result {
        Ok(Conclusion { outcome, code, sentence }) => (outcome_fields(*outcome), *code, sentence.clone()),
        Err(error) => (unknown(error, seen), code(error), Some(format!("{error:#}"))),
    };
    document["schema"] = SCHEMA.into();
    document["exit_code"] = code.into();
    document["sentence"] = sentence.map(|text| clean(&text)).into();
    document["stderr"] = String::from_utf8_lossy(&seen.stderr).into();
    document
}

fn outcome_fields(outcome: Outcome) -> Value {
    match outcome {
        Outcome::Ended(End::Exit(code)) => json!({ "outcome": "exited", "code": code }),
        Outcome::Ended(End::Signal(number)) => {
            json!({ "outcome": "signal", "signal": signal_name(number), "number": number })
        }
        Outcome::Ended(End::Starved) => json!({ "outcome": "out-of-memory" }),
        Outcome::Ended(End::Refused(errno)) => json!({ "outcome": "refused", "errno": errno }),
        Outcome::TimedOut => json!({ "outcome": "timed-out" }),
    }
}

/// Returns the fields for an attempt that says nothing about the program.
fn unknown(error: &Error, seen: &Seen) -> Value {
    let outcome = if seen.started { "lost" } else { "not-started" };
    json!({ "outcome": outcome, "remedy": hint(error) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(result: &Result<Conclusion>, seen: &Seen) -> Value {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report");
        std::fs::write(&path, "the report of an earlier run, which is longer").unwrap();
        let report = Report::begin(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
        report.end(result, seen).unwrap();
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap()
    }

    #[test]
    fn each_outcome_can_be_told_from_the_others() {
        let ended = |end| Ok(Conclusion::of(Outcome::Ended(end), None, "no image", 60));
        let host = || Err(Failure::host("boot the machine", "run it again").into());
        let (before, mut after) = (Seen::default(), Seen { started: true, ..Seen::default() });
        after.add(b"a\xffb");
        let table: [(Result<Conclusion>, &Seen, Value); 9] = [
            (ended(End::Exit(132)), &after, json!({ "outcome": "exited", "code": 132, "exit_code": 132 })),
            (ended(End::Exit(69)), &after, json!({ "outcome": "exited", "code": 69, "exit_code": 69 })),
            (
                ended(End::Signal(4)),
                &after,
                json!({ "outcome": "signal", "signal": "SIGILL", "number": 4, "exit_code": 132 }),
            ),
            (
                ended(End::Signal(40)),
                &after,
                json!({ "outcome": "signal", "signal": null, "number": 40, "exit_code": 168 }),
            ),
            (ended(End::Starved), &after, json!({ "outcome": "out-of-memory", "exit_code": 137 })),
            (ended(End::Refused(8)), &after, json!({ "outcome": "refused", "errno": 8, "exit_code": 126 })),
            (
                Ok(Conclusion::of(Outcome::TimedOut, None, "no image", 60)),
                &after,
                json!({ "outcome": "timed-out", "exit_code": 124 }),
            ),
            (host(), &before, json!({ "outcome": "not-started", "exit_code": 69, "remedy": "run it again" })),
            (host(), &after, json!({ "outcome": "lost", "exit_code": 69, "remedy": "run it again" })),
        ];
        for (result, seen, expected) in table {
            let mut found = written(&result, seen);
            let fields = found.as_object_mut().unwrap();
            assert_eq!(fields.remove("schema"), Some(1.into()));
            let stderr = if seen.started { "a\u{fffd}b" } else { "" };
            assert_eq!(fields.remove("stderr"), Some(stderr.into()));
            let sentence = fields.remove("sentence").unwrap();
            assert_eq!(sentence.is_null(), expected["outcome"] == "exited", "{sentence}");
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn the_end_of_the_standard_error_is_kept() {
        let mut seen = Seen::default();
        for number in 0..2000 {
            seen.add(format!("{number:04}\n").as_bytes());
        }
        assert_eq!(seen.stderr.len(), KEPT);
        assert!(seen.stderr.ends_with(b"1998\n1999\n"));
    }

    #[test]
    fn a_report_that_cannot_be_written_is_a_usage_error() {
        let error = Report::begin(Path::new("/nonexistent/report")).map(drop).unwrap_err();
        assert_eq!(code(&error), 2);
        assert!(error.to_string().contains("--report /nonexistent/report: No such file"), "{error}");
    }
}
