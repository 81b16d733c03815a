//! Functions that find other programs and run short commands.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use anyhow::{Context, Result, bail};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::fs::entries;
use crate::limits;

/// Directories that are searched in addition to PATH. Debian has `mkfs.vfat`, `sfdisk` and `nats-server` there, and
/// these directories are not on an ordinary user's PATH.
const SYSTEM_DIRECTORIES: &[&str] = &["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Returns the path of a program on PATH or in the system directories.
pub fn find(name: &str) -> Option<PathBuf> {
    directories().map(|directory| directory.join(name)).find(|candidate| is_executable(candidate))
}

fn directories() -> impl Iterator<Item = PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own: Vec<_> = std::env::split_paths(&path).collect();
    own.into_iter().chain(SYSTEM_DIRECTORIES.iter().map(PathBuf::from))
}

/// Returns the sorted names of all programs whose names begin with `start`.
pub fn find_all(start: &str) -> Vec<String> {
    let programs = directories().flat_map(|directory| entries(&directory).collect::<Vec<_>>());
    let names = programs.filter(|path| is_executable(path)).filter_map(|path| {
        let name = path.file_name()?.to_str()?;
        name.starts_with(start).then(|| name.to_owned())
    });
    names.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Returns the path of a program, as [`find`] does.
///
/// # Errors
/// Returns an error with a remedy if the program is missing.
pub fn require(name: &str) -> Result<PathBuf> {
    find(name).with_context(|| format!("find {name} on PATH: run `cargo xtask preflight --fix`"))
}

pub(super) fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Returns the output of a short command, which runs in the C locale.
///
/// # Errors
/// If the command fails, returns an error with the command and its error output.
pub fn read(program: &Path, arguments: &[&str]) -> Result<String> {
    ask(program, arguments, b"")
}

/// Returns the output of a short command that runs with these environment variables.
///
/// # Errors
/// Returns the errors of [`read`].
pub fn read_with(program: &Path, arguments: &[&str], variables: &[(&str, OsString)]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).envs(variables.iter().map(|(name, value)| (name, value)));
    text(command, b"")
}

/// Returns the output of a short command that reads `question` on its standard input.
///
/// # Errors
/// Returns the errors of [`read`].
pub fn ask(program: &Path, arguments: &[&str], question: &[u8]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    text(command, question)
}

/// Returns the exit code of a short command; `None` if a signal ended it.
///
/// # Errors
/// Returns an error if the command cannot be run or does not end.
pub fn exit_code(program: &Path, arguments: &[&str]) -> Result<Option<i32>> {
    Ok(answer(Command::new(program).args(arguments), Vec::new())?.status.code())
}

fn text(mut command: Command, question: &[u8]) -> Result<String> {
    let output = answer(command.env("LC_ALL", "C"), question.into())?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
        bail!("{}: {}: {}", words.join(" "), output.status, message.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The maximum number of bytes that are read from each output of a program.
const MAX_BYTES: u64 = 64 << 20;

/// Runs a short command with `question` on its standard input, and returns its output.
///
/// Standard output is a file in memory. QEMU writes to a pipe without blocking, and discards what it has not written
/// when it ends (seen with QEMU 7.2 and 10.0).
///
/// # Errors
/// Returns an error if the command cannot be run. If the command has not ended within [`limits::PROBE`], kills it and
/// returns an error.
fn answer(command: &mut Command, question: Vec<u8>) -> Result<Output> {
    let program = command.get_program().display().to_string();
    let read = || format!("read the output of {program}");
    let mut stdout = File::from(memfd_create("stdout", MemfdFlags::CLOEXEC).with_context(read)?);
    command.stdin(Stdio::piped()).stdout(stdout.try_clone().with_context(read)?).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("run {program}"))?;
    let (mut stdin, stderr) = (child.stdin.take(), child.stderr.take());
    // These threads are not joined. They end when their pipes are closed, and descendants of the program may keep the
    // pipes open.
    thread::spawn(move || stdin.as_mut().map(|pipe| pipe.write_all(&question)));
    let text = stderr.map(|pipe| read_aside(pipe).recv_timeout(limits::PROBE)).transpose();
    let Ok(text) = text else {
        child.kill().and_then(|()| child.wait()).with_context(|| format!("end {program}"))?;
        bail!("{program} has not answered within {} s", limits::PROBE.as_secs());
    };
    let stderr = text.transpose().with_context(read)?.unwrap_or_default();
    let status = child.wait().with_context(|| format!("wait for {program}"))?;
    let mut text = Vec::new();
    stdout.rewind().and_then(|()| stdout.take(MAX_BYTES).read_to_end(&mut text)).with_context(read)?;
    Ok(Output { status, stdout: text, stderr })
}

fn read_aside(pipe: impl Read + Send + 'static) -> Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut text = Vec::new();
        sender.send(pipe.take(MAX_BYTES).read_to_end(&mut text).map(|_bytes| text))
    });
    receiver
}

/// Returns the first version number (`9.0.0`, `2.9.10`) in a program's output.
pub fn version_in(text: &str) -> Option<String> {
    text.split(|c: char| c.is_whitespace() || matches!(c, '(' | ')' | ',' | ':'))
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))
        .map(str::to_owned)
}

/// Returns the first two numbers of a version. A part that is not a number counts as 0.
pub fn release(version: &str) -> (u32, u32) {
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_tools_say() {
        for (message, version) in [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)", Some("7.2.22")),
            ("nats-server: v2.9.10\n", Some("2.9.10")),
            ("9.0.0\n", Some("9.0.0")),
            ("no idea", None),
        ] {
            assert_eq!(version_in(message).as_deref(), version, "{message:?}");
        }
    }

    #[test]
    fn a_failed_command_says_its_words() {
        let shell = find("sh").unwrap();
        let error = read(&shell, &["-c", "echo broken >&2; exit 3"]).unwrap_err().to_string();
        assert!(error.contains("broken") && error.contains("exit status: 3"), "{error}");
        assert!(find("no-such-program-anywhere").is_none());
    }

    /// Through a pipe, `dd` fails as soon as the pipe is full.
    #[test]
    fn the_output_of_a_program_that_does_not_block_is_whole() {
        let dd = find("dd").unwrap();
        let output = read(&dd, &["if=/dev/zero", "bs=1M", "count=1", "oflag=nonblock"]).unwrap();
        assert_eq!(output.len(), 1 << 20);
    }
}
