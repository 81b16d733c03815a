//! Finding and asking other programs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

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

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// What a quick command prints, in the C locale.
///
/// # Errors
/// Names the command, and what it said where it failed.
pub fn read(program: &Path, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(std::process::Stdio::null())
        .output()
        .with_context(|| format!("run {}", program.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} {}: {}: {}", program.display(), arguments.join(" "), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
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
        for (said, version) in [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)", Some("7.2.22")),
            ("nats-server: v2.9.10\n", Some("2.9.10")),
            ("9.0.0\n", Some("9.0.0")),
            ("no idea", None),
        ] {
            assert_eq!(version_in(said).as_deref(), version, "{said:?}");
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
