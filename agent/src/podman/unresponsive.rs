//! Ends a podman that no longer answers. If its file system was read-only for a while, podman 4.3 can wait for a lock of
//! its storage for ever, and its service does not end while a request waits.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::Podman;

impl Podman {
    /// Sends SIGKILL to the processes of podman's service. Its socket starts another one for the next request. The monitors
    /// of the containers outlive it.
    ///
    /// # Errors
    /// Returns an error if the file with the process ids of the service cannot be read, or if no process was there.
    pub(crate) fn end_service(&self) -> Result<()> {
        end(&self.socket.with_extension("pid"))
    }
}

/// Ends the processes whose ids are in a file.
fn end(file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let parsed = |id: &str| id.parse().ok().filter(|id| *id > 1).and_then(Pid::from_raw);
    let pids: Option<Vec<_>> = text.split_whitespace().map(parsed).collect();
    let pids = pids.filter(|pids| !pids.is_empty());
    let pids = pids.with_context(|| format!("{} has no process ids: {text:?}", file.display()))?;
    let ended = pids.iter().filter(|pid| kill_process(**pid, Signal::KILL).is_ok()).count();
    ensure!(ended > 0, "podman's processes are gone: {}", text.trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_processes_of_the_file_are_ended_and_no_others() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("podman.pid");
        let mut processes = [(); 2].map(|()| Command::new("sleep").arg("600").spawn().unwrap());
        let [service, child] = processes.each_ref().map(|process| process.id());
        for text in ["", "0\n", "1\n", "-1\n", &format!("{service} podman\n")] {
            std::fs::write(&file, text).unwrap();
            assert!(end(&file).unwrap_err().to_string().contains("has no process ids"), "{text:?}");
        }
        assert!(processes.iter_mut().all(|process| process.try_wait().unwrap().is_none()));
        std::fs::write(&file, format!("{service} {child}\n")).unwrap();
        Podman::new(&directory.path().join("podman.sock")).end_service().unwrap();
        assert!(processes.iter_mut().all(|process| process.wait().unwrap().signal() == Some(9)));
        assert!(end(&file).unwrap_err().to_string().contains("processes are gone"));
        std::fs::remove_file(&file).unwrap();
        assert!(end(&file).unwrap_err().to_string().contains("podman.pid"));
    }
}
