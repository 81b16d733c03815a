//! Ends a podman that no longer answers. If its file system was read-only for a while, podman 4.3 can wait for a lock of
//! its storage for ever, and its service does not end while a request waits.

use std::path::Path;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::Podman;

impl Podman {
    /// Sends SIGKILL to podman's service. Its socket starts another one for the next request. The monitors of the containers
    /// outlive it.
    ///
    /// # Errors
    /// Returns an error if the file with the process id of the service cannot be read, or if the signal cannot be sent.
    pub(crate) fn end_service(&self) -> Result<()> {
        end(&self.socket.with_extension("pid"))
    }
}

/// Ends the process whose id is in a file.
fn end(file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let id = text.trim().parse().ok().filter(|id| *id > 1).and_then(Pid::from_raw);
    let pid = id.with_context(|| format!("{} has no process id: {text:?}", file.display()))?;
    kill_process(pid, Signal::KILL).with_context(|| format!("end podman's process {}", pid.as_raw_nonzero()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_process_of_the_file_is_ended_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("podman.pid");
        let mut service = Command::new("sleep").arg("600").spawn().unwrap();
        for text in ["", "0\n", "1\n", "-1\n", "podman\n"] {
            std::fs::write(&file, text).unwrap();
            assert!(end(&file).unwrap_err().to_string().contains("has no process id"), "{text:?}");
        }
        assert!(service.try_wait().unwrap().is_none());
        std::fs::write(&file, format!("{}\n", service.id())).unwrap();
        Podman::new(&directory.path().join("podman.sock")).end_service().unwrap();
        assert_eq!(service.wait().unwrap().signal(), Some(9));
        std::fs::remove_file(&file).unwrap();
        assert!(end(&file).unwrap_err().to_string().contains("podman.pid"));
    }
}
