//! The reset of podman's storage, which is the last resort if it is beyond repair. The agent requests it by a file,
//! because podman's API has no request for it. `prepare-storage` carries it out before podman starts. The volumes stay;
//! the images are fetched again.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::files;

/// The least time between two resets, by the device's clock. A reset that does not help must not stop all containers
/// again and again.
const MIN_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// The beginning of the reason of a request if podman has not answered.
pub(crate) const SILENCE: &str = "podman has not answered";
/// The directory in podman's storage with the volumes.
const VOLUMES: &str = "volumes";
/// The directory in podman's storage to which a reset moves everything else.
const DISCARDED: &str = "discarded";

/// A reset that was carried out.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Done {
    pub(crate) reason: String,
    /// The names of the volumes, which podman no longer knows.
    pub(crate) volumes: Vec<String>,
}

/// The files by which a reset is requested and reported, in the agent's state directory.
#[derive(Debug, Clone)]
pub(crate) struct Reset {
    directory: PathBuf,
}

impl Reset {
    pub(crate) fn new(state_directory: &Path) -> Self {
        Self { directory: state_directory.to_owned() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("storage-reset.{name}"))
    }

    /// Requests a reset.
    ///
    /// # Errors
    /// Returns an error if the last reset was less than a day ago, or if the request cannot be written.
    pub(crate) fn request(&self, reason: &str) -> Result<()> {
        let last = fs::metadata(self.path("last")).and_then(|file| file.modified()).ok();
        // If the clock was set back, the last reset is in the future.
        let is_long_ago = |last: SystemTime| last.elapsed().is_ok_and(|elapsed| elapsed >= MIN_INTERVAL);
        ensure!(last.is_none_or(is_long_ago), "podman's storage was reset less than a day ago");
        files::replace_durably(&self.path("request"), reason.as_bytes()).context("request a reset")
    }

    pub(crate) fn is_requested(&self) -> bool {
        self.path("request").exists()
    }

    /// Returns whether a reset is requested because podman has not answered.
    pub(crate) fn is_for_silence(&self) -> bool {
        fs::read_to_string(self.path("request")).is_ok_and(|reason| reason.starts_with(SILENCE))
    }

    /// Withdraws a request. For [`MIN_INTERVAL`], it counts as a reset. Returns whether there was a request.
    pub(crate) fn withdraw(&self) -> io::Result<bool> {
        match self.conclude("request") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            concluded => concluded.map(|()| true),
        }
    }

    /// Renames the file of a request or of a reset to that of the last reset, and sets its time.
    fn conclude(&self, name: &str) -> io::Result<()> {
        let last = self.path("last");
        fs::rename(self.path(name), &last)?;
        File::options().append(true).open(&last)?.set_modified(SystemTime::now())?;
        files::sync_parent(&last)
    }

    /// Returns the reset that the agent has not dealt with. If its record cannot be read, returns an empty one.
    pub(crate) fn done(&self) -> Option<Done> {
        match fs::read(self.path("done")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            bytes => Some(serde_json::from_slice(&bytes.unwrap_or_default()).unwrap_or_default()),
        }
    }

    /// Records that the agent has dealt with the reset.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.conclude("done")
    }

    /// Resets the storage if that was requested, and returns the reason. No podman may run. If a power cut interrupts
    /// this, the request stays, and the next start continues.
    pub(crate) fn carry_out(&self, storage: &Path) -> Result<Option<String>> {
        let discarded = storage.join(DISCARDED);
        let reason = match fs::read_to_string(self.path("request")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if discarded.exists() {
                    delete_tree(&discarded)?;
                }
                return Ok(None);
            }
            reason => reason.context("read the request of a reset")?,
        };
        end_containers();
        fs::create_dir_all(&discarded).with_context(|| format!("create {}", discarded.display()))?;
        for entry in fs::read_dir(storage).context("list podman's storage")? {
            let entry = entry.context("list podman's storage")?;
            let name = entry.file_name();
            if name == VOLUMES || name == DISCARDED {
                continue;
            }
            // Renaming works for files of all user ids. An earlier reset may have left a directory of the same name.
            let moved = (0..).map(|number| discarded.join(format!("{}.{number}", name.display())));
            let free = moved.into_iter().find(|path| !path.exists()).context("find a free name")?;
            fs::rename(entry.path(), free).with_context(|| format!("discard {}", entry.path().display()))?;
        }
        let done = Done { reason: reason.clone(), volumes: names(&storage.join(VOLUMES))? };
        files::replace_durably(&self.path("done"), &serde_json::to_vec(&done)?)
            .context("record the reset")?;
        fs::remove_file(self.path("request")).context("delete the request of a reset")?;
        delete_tree(&discarded)?;
        Ok(Some(reason))
    }
}

/// Ends the containers that still run, because a reset deletes their files. The user's systemd has a scope for each.
fn end_containers() {
    let mut stop = Command::new("systemctl");
    stop.args(["--user", "stop", "libpod-*.scope"]).stdout(Stdio::null()).stderr(Stdio::null());
    // In a test that runs as root, the user has no systemd instance, and the command fails.
    drop(stop.status());
}

/// Deletes a directory whose files may belong to the user ids of containers.
fn delete_tree(directory: &Path) -> Result<()> {
    let Err(error) = fs::remove_dir_all(directory) else { return Ok(()) };
    let mut remove = Command::new("podman");
    let status =
        remove.args(["unshare", "rm", "-rf"]).arg(directory).status().context("run podman unshare")?;
    ensure!(status.success(), "delete {}: {error}; podman unshare rm -rf: {status}", directory.display());
    Ok(())
}

/// Returns the names in a directory, which may be missing.
fn names(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("list {}", directory.display()))?,
    };
    let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    entries.map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_requested_reset_keeps_the_volumes_and_is_not_repeated_within_a_day() {
        let directory = tempfile::tempdir().unwrap();
        let (reset, storage) = (Reset::new(directory.path()), directory.path().join("storage"));
        for path in ["overlay/a/diff", "libpod", "volumes/iot-pi-7.web.data/_data", "discarded/overlay.0"] {
            fs::create_dir_all(storage.join(path)).unwrap();
        }
        fs::write(storage.join("storage.lock"), "").unwrap();
        assert_eq!(reset.carry_out(&storage).unwrap(), None);
        assert!(storage.join("overlay").exists() && !storage.join("discarded").exists());
        reset.request("it is torn").unwrap();
        assert!(reset.is_requested() && reset.done().is_none());
        assert_eq!(reset.carry_out(&storage).unwrap().unwrap(), "it is torn");
        assert_eq!(names(&storage).unwrap(), ["volumes"]);
        assert!(storage.join("volumes/iot-pi-7.web.data/_data").exists() && !reset.is_requested());
        let volumes = vec!["iot-pi-7.web.data".to_owned()];
        assert_eq!(reset.done(), Some(Done { reason: "it is torn".into(), volumes }));
        reset.finish().unwrap();
        assert_eq!(reset.done(), None);
        assert!(reset.request("again").unwrap_err().to_string().contains("less than a day"));
        let last = File::options().append(true).open(reset.path("last")).unwrap();
        last.set_modified(SystemTime::now() + MIN_INTERVAL).unwrap();
        assert!(reset.request("again").is_err(), "the clock was set back");
        last.set_modified(SystemTime::now() - MIN_INTERVAL).unwrap();
        reset.request("again").unwrap();
        assert!(reset.withdraw().unwrap() && !reset.withdraw().unwrap());
        assert!(reset.request("again").is_err(), "the agent has stopped its containers for this request");
    }
}
