//! Finding and asking other programs.

use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::limits;

/// Where an ordinary user's PATH does not look, and Debian keeps `mkfs.vfat`, `sfdisk` and `nats-server`.
const SYSTEM_DIRECTORIES: &[&str] = &["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// The program's path, on PATH or in the system directories.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SYSTEM_DIRECTORIES.iter().map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| is_executable(candidate))
}

/// The names of all programs that begin with `start`, sorted.
pub fn find_all(start: &str) -> Vec<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(SYSTEM_DIRECTORIES.iter().map(PathBuf::from));
    let entries = directories.filter_map(|directory| directory.read_dir().ok()).flatten().flatten();
    let programs = entries.filter(|entry| is_executable(&entry.path()));
    let mut names: Vec<_> = programs.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| name.starts_with(start));
    names.sort();
    names.dedup();
    names
}

/// [`find`], with an error that says what to do.
///
/// # Errors
/// Where it is not there.
pub fn require(name: &str) -> Result<PathBuf> {
    find(name).with_context(|| format!("find {name} on PATH: run `cargo xtask preflight --fix`"))
}

pub(super) fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// What a quick command prints, in the C locale.
///
/// # Errors
/// Names the command, and what it said where it failed.
pub fn read(program: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C");
    let output = answer(&mut command, Vec::new())?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        bail!("{} {}: {}: {}", program.display(), arguments.join(" "), output.status, message.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// So much of what a program says is kept.
const MOST_BYTES: u64 = 1 << 20;

/// What a quick command says to `question`.
///
/// # Errors
/// Where it cannot be run, and where it has not ended within [`limits::PROBE`]: it is killed then.
pub fn answer(command: &mut Command, question: Vec<u8>) -> Result<Output> {
    let program = command.get_program().display().to_string();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {program}"))?;
    let (mut stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    // Threads of their own, which end with the pipes: what the program leaves behind may hold those open.
    std::thread::spawn(move || stdin.as_mut().map(|pipe| pipe.write_all(&question)));
    let (sender, message) = mpsc::channel();
    for (first, pipe) in [
        (true, stdout.map(|pipe| Box::new(pipe) as Box<dyn Read + Send>)),
        (false, stderr.map(|pipe| Box::new(pipe) as Box<dyn Read + Send>)),
    ] {
        let sender = sender.clone();
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let read = pipe.map_or(Ok(0), |pipe| pipe.take(MOST_BYTES).read_to_end(&mut text));
            sender.send((first, read.map(|_bytes| text)))
        });
    }
    drop(sender);
    let deadline = Instant::now() + limits::PROBE;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    for _pipe in 0..2 {
        match message.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((true, text)) => stdout = text.with_context(|| format!("read what {program} prints"))?,
            Ok((false, text)) => stderr = text.with_context(|| format!("read what {program} prints"))?,
            Err(_late) => {
                child.kill().and_then(|()| child.wait()).with_context(|| format!("end {program}"))?;
                bail!("{program} has not answered within {} s", limits::PROBE.as_secs());
            }
        }
    }
    let status = child.wait().with_context(|| format!("wait for {program}"))?;
    Ok(Output { status, stdout, stderr })
}

/// The first version number (`9.0.0`, `2.9.10`) in what a program says.
pub fn version_in(text: &str) -> Option<String> {
    text.split(|c: char| c.is_whitespace() || matches!(c, '(' | ')' | ',' | ':'))
        .map(|word| word.trim_start_matches('v'))
        .find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))
        .map(str::to_owned)
}

/// The first two numbers of a version; what is no number counts as none.
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
}
