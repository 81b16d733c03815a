//! The end of the program: the exit code of the command, and the sentence about it.

use crate::machine::MEMORY_MIB;
use crate::subject::Runner;
use crate::wire::End;

/// The exit codes of a shell for a program that is not executed, and for one whose interpreter is missing (POSIX, Shell
/// Command Language, 2.8.2).
const NOT_EXECUTED: u8 = 126;
const NOT_FOUND: u8 = 127;
/// The exit code of timeout(1).
const TIMED_OUT: u8 = 124;
/// The number that a shell adds to the number of a signal.
const SIGNALLED: u8 = 128;

/// Linux's signals (signal(7)) that end programs, with their meanings. The numbers are those of x86 and Arm.
const SIGNALS: &[(u8, &str, &str)] = &[
    (1, "SIGHUP", "hangup"),
    (2, "SIGINT", "interrupt"),
    (3, "SIGQUIT", "quit"),
    (4, "SIGILL", "illegal instruction"),
    (5, "SIGTRAP", "trap"),
    (6, "SIGABRT", "abort"),
    (7, "SIGBUS", "bus error"),
    (8, "SIGFPE", "arithmetic error"),
    (9, "SIGKILL", "kill"),
    (10, "SIGUSR1", "user signal 1"),
    (11, "SIGSEGV", "invalid memory access"),
    (12, "SIGUSR2", "user signal 2"),
    (13, "SIGPIPE", "write to a closed pipe"),
    (14, "SIGALRM", "timer"),
    (15, "SIGTERM", "termination"),
    (24, "SIGXCPU", "limit of processor time"),
    (25, "SIGXFSZ", "limit of a file's size"),
    (31, "SIGSYS", "invalid system call"),
];

const SIGKILL: u8 = 9;

/// ENOENT and ENOEXEC (errno(3)).
const NO_SUCH_FILE: i32 = 2;
const WRONG_FORMAT: i32 = 8;

/// What is known about the program after an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Ended(End),
    /// The program ran longer than it may.
    TimedOut,
}

/// An outcome with the exit code of the command, and a sentence unless the program ended itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Conclusion {
    pub(crate) outcome: Outcome,
    pub(crate) code: u8,
    pub(crate) sentence: Option<String>,
}

impl Conclusion {
    /// Returns the conclusion for a program whose dynamic loader or interpreter is known to be missing. The kernel
    /// would refuse such a program in the same way.
    pub(crate) fn missing(sentence: String) -> Self {
        let outcome = Outcome::Ended(End::Refused(NO_SUCH_FILE));
        Self { outcome, code: NOT_FOUND, sentence: Some(sentence) }
    }

    /// Explains an outcome. `limit` is the time that the program had, in seconds.
    pub(crate) fn of(outcome: Outcome, runner: Option<&Runner>, place: &str, limit: u64) -> Self {
        let (code, sentence) = match outcome {
            Outcome::Ended(end) => explain(end, runner, place),
            Outcome::TimedOut => {
                (TIMED_OUT, Some(format!("the program was still running after {limit} s (--timeout)")))
            }
        };
        Self { outcome, code, sentence }
    }
}

/// Returns the name of a signal, such as `SIGILL`; `None` for signals that programs use among themselves.
pub(crate) fn signal_name(number: u8) -> Option<&'static str> {
    SIGNALS.iter().find(|(known, ..)| *known == number).map(|(_, name, _)| *name)
}

fn explain(end: End, runner: Option<&Runner>, place: &str) -> (u8, Option<String>) {
    match end {
        End::Exit(code) => (code, None),
        End::Signal(number) => (SIGNALLED.saturating_add(number), Some(signal(number))),
        End::Starved => (
            SIGNALLED + SIGKILL,
            Some(format!(
                "signal {SIGKILL} (SIGKILL) ended the program, because the machine's memory of {MEMORY_MIB} MiB was full"
            )),
        ),
        End::Refused(NO_SUCH_FILE) => {
            let sentence = match runner {
                Some(Runner { file, what }) => {
                    format!("{place} lacks {what} {file}, or a file that executes it")
                }
                None => "the kernel does not find the program".to_owned(),
            };
            (NOT_FOUND, Some(sentence))
        }
        End::Refused(WRONG_FORMAT) => (
            NOT_EXECUTED,
            Some("the kernel does not execute the program: it does not know the format".to_owned()),
        ),
        End::Refused(number) => {
            let reason = std::io::Error::from_raw_os_error(number);
            (NOT_EXECUTED, Some(format!("the kernel does not execute the program: {reason}")))
        }
    }
}

fn signal(number: u8) -> String {
    match SIGNALS.iter().find(|(known, ..)| *known == number) {
        Some((_, name, meaning)) => format!("signal {number} ({name}, {meaning}) ended the program"),
        None => format!("signal {number} ended the program"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_has_its_code_and_its_sentence() {
        let runner = Runner { file: "/lib/ld.so".to_owned(), what: "the dynamic loader" };
        let table = [
            (End::Exit(0), 0, None),
            (End::Exit(132), 132, None),
            (End::Signal(4), 132, Some("SIGILL, illegal instruction")),
            (End::Signal(64), 192, Some("signal 64 ended")),
            (End::Starved, 137, Some("SIGKILL) ended the program, because the machine's memory of 2048 MiB")),
            (End::Refused(2), 127, Some("debian-12 lacks the dynamic loader /lib/ld.so")),
            (End::Refused(8), 126, Some("format")),
            (End::Refused(13), 126, Some("Permission denied")),
        ];
        for (end, code, words) in table {
            let found = Conclusion::of(Outcome::Ended(end), Some(&runner), "debian-12", 60);
            let sentence = found.sentence;
            assert_eq!((found.code, sentence.is_some()), (code, words.is_some()), "{end:?}");
            assert!(sentence.unwrap_or_default().contains(words.unwrap_or_default()), "{end:?}");
        }
    }
}
