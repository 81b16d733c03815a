//! The output of a command: results on stdout, messages on stderr. `println!` and `eprintln!` panic if the stream
//! is closed or its disk is full, so `xtask/tests/tidy.rs` forbids them.

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use anyhow::{Error, Result};

use crate::error::{self, Failure};
use crate::job;

/// Prints a result and the end of its line on stdout. If the reader closes the pipe early, as `head` does, this is not
/// an error.
///
/// # Errors
/// Returns a failure of the host if stdout cannot be written, for example because its disk is full.
pub fn print(result: impl Display) -> Result<()> {
    write(format!("{result}\n").as_bytes()).map(drop)
}

/// Prints JSON as [`print`] does.
///
/// # Errors
/// Returns the errors of [`print`].
pub fn print_json(value: &serde_json::Value) -> Result<()> {
    print(format_args!("{value:#}"))
}

/// Writes a part of a result to stdout. Returns whether stdout still has a reader.
///
/// # Errors
/// Returns the errors of [`print`].
pub fn write(bytes: &[u8]) -> Result<bool> {
    write_to(&mut std::io::stdout(), bytes)
}

fn write_to(stream: &mut impl Write, bytes: &[u8]) -> Result<bool> {
    match stream.write_all(bytes).and_then(|()| stream.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::new(error).context(Failure::host(
            "write the result to stdout",
            "send stdout to a file on a disk with free space, or to a program that reads it",
        ))),
    }
}

/// Prints a message and the end of its line on stderr; the syntax is that of `eprintln!`. The message is cleaned by
/// [`plain`]. Errors are ignored, because a closed terminal must not end a run before its teardown.
#[macro_export]
macro_rules! message {
    ($($words:tt)*) => { $crate::output::write_message(&($crate::output::plain(&format!($($words)*)) + "\n")) };
}

/// Writes a text to stderr like [`message!`], but does not clean it or end its line.
pub fn write_message(text: &str) {
    drop(std::io::stderr().write_all(text.as_bytes()));
}

/// Returns a message without the control characters that [`clean`] removes. A message may contain texts of the guest
/// or the agent, so each line after the first one is indented. No such line can then be mistaken for a line of this
/// program.
pub fn plain(text: &str) -> String {
    let text = if job::is_in_job() { job::defused(&clean(text)) } else { clean(text) };
    let (first, rest) = text.split_once('\n').unwrap_or((&text, ""));
    let indented =
        |line: &str| if line.starts_with("  ") { format!("\n{line}") } else { format!("\n    {line}") };
    first.to_owned() + &rest.lines().map(indented).collect::<String>()
}

/// Removes escape sequences (ECMA-48, 5.3, 5.4 and 8.3) and other control characters, except the ends of lines. A tab
/// becomes a space.
pub fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        match character {
            '\x1b' => rest = after_escape(rest.as_str()).chars(),
            '\t' => clean.push(' '),
            '\n' => clean.push('\n'),
            other if other.is_control() => {}
            other => clean.push(other),
        }
    }
    clean
}

/// Returns the text after an escape sequence. `text` begins after the character ESC.
fn after_escape(text: &str) -> &str {
    match text.chars().next() {
        // A control sequence: parameters, intermediate characters, and a final character.
        Some('[') => skip_final(text[1..].trim_start_matches(|c| (' '..='?').contains(&c)), '@'),
        // A control string, which ends with ST (ESC \) or, by xterm's custom, with BEL. A string without an end would hide
        // the rest of the text, so only its beginning is removed. Another ESC ends the search, because a search to the
        // end of the text at each ESC would take quadratic time.
        Some(']' | 'P' | 'X' | '^' | '_') => match text.find(['\x07', '\x1b']) {
            Some(at) if text[at..].starts_with('\x07') => &text[at + 1..],
            Some(at) if text[at..].starts_with("\x1b\\") => &text[at + 2..],
            _ => &text[1..],
        },
        // Any other sequence: intermediate characters and a final character.
        _ => skip_final(text.trim_start_matches(|c| (' '..='/').contains(&c)), '0'),
    }
}

/// Returns the text without its first character if this character is between `least` and `~`.
fn skip_final(text: &str, least: char) -> &str {
    text.strip_prefix(|c| (least..='~').contains(&c)).unwrap_or(text)
}

/// Prints the error of a command, if there is one. Returns the exit code of the command.
pub fn conclude(outcome: &Result<()>) -> ExitCode {
    let Err(error) = outcome else { return ExitCode::SUCCESS };
    for line in error::lines(error) {
        message!("{line}");
    }
    ExitCode::from(error::code(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With quadratic time, this would take hours.
    #[test]
    fn a_text_of_megabytes_of_strings_without_an_end_is_cleaned() {
        assert_eq!(clean(&"\x1b]".repeat(4 << 20)), "");
    }

    #[test]
    fn escape_sequences_are_removed_and_nothing_else() {
        let table = [
            ("\x1b[2J[\x1b[0;32m  OK  \x1b[0m] Started", "[  OK  ] Started"),
            ("a\x1b(Bb\x1b7c\x1b[?25hd\x1b=e\x1b#8f", "abcdef"),
            ("a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\c", "abc"),
            ("a\x1bP1$r0m\x1b\\b\x1b_app\x1b\\c\x1b^pm\x1b\\d", "abcd"),
            ("a\x1b]0;a string without an end", "a0;a string without an end"),
            ("a\x1b]0;one\x1b]0;two\x07b", "a0;oneb"),
            ("a\x1b[12", "a"),
            ("a\x1b", "a"),
            ("a\x1b\u{e4}b", "a\u{e4}b"),
            ("a\r\x08\x07\u{9b}b\tc\nd", "ab c\nd"),
        ];
        for (text, cleaned) in table {
            assert_eq!(clean(text), cleaned, "{text:?}");
        }
    }

    #[test]
    fn a_text_of_the_agent_cannot_pass_for_a_verdict() {
        let text = "the agent reports: x\r\nVERIFIED  iot-agent\n  caused by: y\n\x1b[1A\x1b[2KVERIFIED";
        let shown = "the agent reports: x\n    VERIFIED  iot-agent\n  caused by: y\n    VERIFIED";
        assert_eq!(plain(text), shown);
    }

    #[test]
    fn a_closed_pipe_is_no_error_and_a_full_disk_is_the_hosts() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        assert!(write_to(&mut writer, b"result\n").unwrap());
        drop(reader);
        assert!(!write_to(&mut writer, b"result\n").unwrap(), "the pipe has no reader");
        let mut full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let error = write_to(&mut full, b"result\n").unwrap_err();
        assert_eq!(error::code(&error), 69, "{error:#}");
        assert!(format!("{error:#}").contains("No space left on device"), "{error:#}");
    }
}
