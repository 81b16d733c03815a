//! Keeps the console's log of a machine small after the command that made it has ended (`vm keep-log`). QEMU appends to
//! the log whatever the guest prints.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use xtask_core::limits;

use crate::background;

/// The size at which the log is shortened, in bytes. It is below the size at which a smoke or `vm start` refuses the
/// log.
const LARGEST: u64 = 8 << 20;
/// The part at the end of the log that is kept, in bytes.
const KEPT: u64 = 1 << 20;

/// Starts a process that keeps the log small until the machine's QEMU ends.
pub(crate) fn keep_small(qemu: Pid, log: &Path) -> Result<()> {
    let qemu = pidfd_open(qemu, PidfdFlags::empty()).context("open the machine's QEMU")?;
    let mut command = Command::new("/proc/self/exe");
    command.args(["vm", "keep-log"]).arg(log).stdin(Stdio::from(qemu)).stdout(Stdio::null());
    background::start(&mut command).context("start the process that keeps the console's log small")
}

/// Runs `vm keep-log`, the process that [`keep_small`] starts. Its standard input is the pidfd of QEMU.
pub(crate) fn run(log: &Path) -> Result<()> {
    background::detach()?;
    keep_until_end(std::io::stdin().as_fd(), log)
}

fn keep_until_end(qemu: BorrowedFd<'_>, log: &Path) -> Result<()> {
    let pause = Timespec::try_from(limits::LOG_CHECK)?;
    loop {
        let mut polled = [PollFd::from_borrowed_fd(qemu, PollFlags::IN)];
        match poll(&mut polled, Some(&pause)) {
            Ok(0) => shorten(log)?,
            Err(Errno::INTR) => {}
            // A pidfd can be read once the process has ended (pidfd_open(2)).
            Ok(_) => return Ok(()),
            Err(error) => return Err(error).context("wait for the end of QEMU"),
        }
    }
}

/// Deletes the beginning of a log that has grown too large. QEMU may append at the same time, because it opens the log
/// with O_APPEND.
pub(crate) fn shorten(path: &Path) -> Result<()> {
    let shorten = || -> std::io::Result<()> {
        let mut log: File = OpenOptions::new().read(true).append(true).open(path)?;
        if log.metadata()?.len() <= LARGEST {
            return Ok(());
        }
        log.seek(SeekFrom::End(-i64::try_from(KEPT).expect("the size is small")))?;
        let mut end = Vec::new();
        (&log).take(KEPT).read_to_end(&mut end)?;
        log.set_len(0)?;
        log.write_all(b"[cargo xtask has deleted earlier output]\n")?;
        log.write_all(&end)
    };
    shorten().with_context(|| format!("shorten the console's log {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_large_log_keeps_its_end_and_a_small_one_all() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let text = |size: u64| [vec![b'x'; usize::try_from(size).unwrap() - 4], b"end\n".to_vec()].concat();
        for size in [4, LARGEST] {
            std::fs::write(&path, text(size)).unwrap();
            shorten(&path).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), size);
        }
        let mut of_qemu = OpenOptions::new().append(true).open(&path).unwrap();
        of_qemu.write_all(b"more\n").unwrap();
        shorten(&path).unwrap();
        of_qemu.write_all(b"last\n").unwrap();
        let shortened = std::fs::read_to_string(&path).unwrap();
        assert!(shortened.starts_with("[cargo xtask has deleted earlier output]\nx"), "{}", &shortened[..60]);
        assert!(shortened.ends_with("xend\nmore\nlast\n"));
        assert!(shortened.len() as u64 <= KEPT + 60);
    }

    #[test]
    fn the_log_is_kept_small_until_qemu_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        std::fs::write(&path, vec![b'x'; usize::try_from(LARGEST).unwrap() + 1]).unwrap();
        let mut qemu = Command::new("sleep").arg("100").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&qemu), PidfdFlags::empty()).unwrap();
        std::thread::scope(|scope| {
            let keeping = scope.spawn(|| keep_until_end(pidfd.as_fd(), &path));
            let deadline = Instant::now() + 10 * limits::LOG_CHECK;
            while std::fs::metadata(&path).unwrap().len() > LARGEST && Instant::now() < deadline {
                std::thread::sleep(limits::POLL);
            }
            assert!(std::fs::metadata(&path).unwrap().len() <= LARGEST);
            qemu.kill().unwrap();
            keeping.join().unwrap().unwrap();
        });
        qemu.wait().unwrap();
    }
}
