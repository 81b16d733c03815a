//! The output of a command: results on stdout, messages on stderr. `println!` and `eprintln!` panic if the stream
//! is closed or its disk is full, so `xtask/tests/tidy.rs` forbids them.

use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use anyhow::{Error, Result};

use crate::error::{self, Failure};

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

/// Prints a message and the end of its line on stderr; the syntax is that of `eprintln!`. Errors are ignored, because a
/// closed terminal must not end a run before its teardown.
#[macro_export]
macro_rules! message {
    ($($words:tt)*) => { $crate::output::write_message(&(format!($($words)*) + "\n")) };
}

/// Writes a text to stderr like [`message!`], but does not end its line.
pub fn write_message(text: &str) {
    drop(std::io::stderr().write_all(text.as_bytes()));
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
