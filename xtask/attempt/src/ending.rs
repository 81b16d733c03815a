//! The end of the program: the exit code of the command, and the sentence about it.

use crate::root::missing;
use crate::subject::Runner;
use crate::wire::End;

/// The exit codes of a shell for a program that is not executed, and for one whose interpreter is missing (POSIX, Shell
/// Command Language, 2.8.2).
pub(crate) const NOT_EXECUTED: u8 = 126;
pub(crate) const NOT_FOUND: u8 = 127;
/// The exit code of timeout(1).
pub(crate) const TIMED_OUT: u8 = 124;
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

/// ENOENT and ENOEXEC (errno(3)).
const NO_SUCH_FILE: i32 = 2;
const WRONG_FORMAT: i32 = 8;

/// Returns the exit code for the program's end, and a sentence unless the program ended itself.
pub(crate) fn explain(end: End, runner: Option<&Runner>, place: &str) -> (u8, Option<String>) {
    match end {
        End::Exit(code) => (code, None),
        End::Signal(number) => (SIGNALLED.saturating_add(number), Some(signal(number))),
        End::Refused(NO_SUCH_FILE) => {
            let sentence = match runner {
                Some(Runner { file, what }) => missing(file, what, place),
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
            (End::Refused(2), 127, Some("the dynamic loader /lib/ld.so, and debian-12 does not have it")),
            (End::Refused(8), 126, Some("format")),
            (End::Refused(13), 126, Some("Permission denied")),
        ];
        for (end, code, words) in table {
            let (found, sentence) = explain(end, Some(&runner), "debian-12");
            assert_eq!((found, sentence.is_some()), (code, words.is_some()), "{end:?}");
            assert!(sentence.unwrap_or_default().contains(words.unwrap_or_default()), "{end:?}");
        }
    }
}
