//! Processes that go on after the command that has started them, as long as a machine runs.

use std::os::fd::RawFd;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

/// Starts a command of this program in the background. A signal of the terminal does not reach it.
pub(crate) fn start(command: &mut Command) -> Result<()> {
    command.arg0("xtask-vm").stderr(Stdio::null()).process_group(0);
    command.spawn().map(drop).context("start a process in the background")
}

/// Lets go of what this process has inherited, except for its standard streams: open files, such as a lock or the pipe
/// of a caller that waits for its end, and the working directory, whose file system could not be unmounted.
///
/// # Errors
/// Returns an error if a directory cannot be used.
pub(crate) fn detach() -> Result<()> {
    std::env::set_current_dir("/").context("leave the working directory")?;
    let open = std::fs::read_dir("/proc/self/fd").context("list the open files")?;
    let open: Vec<_> = open.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for descriptor in open.into_iter().filter(|descriptor: &RawFd| *descriptor > libc::STDERR_FILENO) {
        // SAFETY: this is the first action of the process, so that no value owns the descriptor. The directory above is
        // closed already, and its descriptor is refused (EBADF).
        unsafe { libc::close(descriptor) };
    }
    Ok(())
}
