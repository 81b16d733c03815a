//! Images that deployments wait for, fetched in the background: an archive of the device's own, else the registry. One slow
//! line must not hold up the other deployments.
//!
//! Podman does not sync what it unpacks. So a fetch leaves a mark on disk until all of it is there, and an image with such a mark
//! after a power cut is deleted and fetched again, whatever podman says of it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::config::{Config, archive_name};
use crate::podman::Podman;
use crate::store::Store;

/// Whether an image can be used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Availability {
    /// It is here.
    Available,
    /// It is being fetched; the wake-up comes when that has ended.
    Fetching,
}

/// What is being fetched.
pub(crate) struct Images {
    podman: Podman,
    store: Store,
    archives: PathBuf,
    marks: PathBuf,
    wake: Arc<Notify>,
    fetching: HashMap<String, JoinHandle<Result<()>>>,
}

impl Images {
    pub(crate) fn new(config: &Config, podman: Podman, store: Store, wake: Arc<Notify>) -> Self {
        let marks = config.state_directory.join("fetching");
        Self { podman, store, archives: config.image_archives.clone(), marks, wake, fetching: HashMap::new() }
    }

    /// Looks for the image; where it is not here, begins to fetch it.
    ///
    /// # Errors
    /// Why the last fetch failed; for an image that is made for another machine.
    pub(crate) async fn ensure(&mut self, reference: &str) -> Result<Availability> {
        let ended = match self.fetching.get(reference) {
            Some(task) if !task.is_finished() => return Ok(Availability::Fetching),
            _ => self.fetching.remove(reference),
        };
        if let Some(task) = ended {
            task.await??;
        }
        let mark = self.marks.join(archive_name(reference));
        if mark.exists() {
            self.podman.remove_image(reference).await?;
        } else if let Some(image) = self.podman.image(reference).await? {
            let own = go_architecture();
            if !image.architecture.is_empty() && image.architecture != own {
                bail!("the image {reference} is made for {}, this device is {own}", image.architecture);
            }
            return Ok(Availability::Available);
        }
        let fetch = Fetch {
            podman: self.podman.clone(),
            store: self.store.clone(),
            archive: self.archives.join(archive_name(reference)),
            mark,
            reference: reference.to_owned(),
        };
        let wake = Arc::clone(&self.wake);
        let task = tokio::spawn(async move {
            let fetched = fetch.run().await;
            wake.notify_one();
            fetched
        });
        self.fetching.insert(reference.to_owned(), task);
        Ok(Availability::Fetching)
    }
}

struct Fetch {
    podman: Podman,
    store: Store,
    archive: PathBuf,
    mark: PathBuf,
    reference: String,
}

impl Fetch {
    async fn run(self) -> Result<()> {
        let mark = &self.mark;
        set(mark).with_context(|| format!("mark the fetch of {} in {}", self.reference, mark.display()))?;
        let brought = self.bring().await;
        if brought.is_ok() {
            let store = self.store.clone();
            tokio::task::spawn_blocking(move || store.sync_file_system()).await??;
        }
        // What podman could not bring it has thrown away itself.
        fs::remove_file(mark).with_context(|| format!("delete {}", mark.display()))?;
        brought
    }

    async fn bring(&self) -> Result<()> {
        let Self { podman, archive, reference, .. } = self;
        if !archive.exists() {
            return podman.pull(reference).await;
        }
        podman.load(archive).await?;
        if podman.image(reference).await?.is_none() {
            bail!("the image archive {} does not hold {reference}", archive.display());
        }
        Ok(())
    }
}

/// On disk when this returns.
fn set(mark: &Path) -> std::io::Result<()> {
    let Some(directory) = mark.parent() else { return Ok(()) };
    fs::create_dir_all(directory)?;
    File::create(mark)?.sync_all()?;
    File::open(directory)?.sync_all()?;
    directory.parent().map_or(Ok(()), |state| File::open(state)?.sync_all())
}

/// As images name machines (OCI image specification, `architecture`: Go's GOARCH).
fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        "x86_64" => "amd64",
        other => other,
    }
}
