//! Downloads the images of deployments in the background, from an archive on the device or from the registry.
//! A slow download does not delay other deployments.
//!
//! Podman does not sync the images that it unpacks. A marker file on disk therefore covers each download
//! until the image is synced. If a marker is left after a power cut, the agent deletes the image and
//! downloads it again.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::config::{Config, archive_name};
use crate::files;
use crate::podman::Podman;
use crate::store::Store;

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Availability {
    Available,
    /// A download runs in the background and wakes the reconciler when it ends.
    Downloading,
}

pub(crate) struct Images {
    source: Source,
    markers: PathBuf,
    wake: Arc<Notify>,
    downloads: HashMap<String, JoinHandle<Result<()>>>,
}

/// The sources of a download, and the store that syncs the downloaded image to disk.
#[derive(Clone)]
struct Source {
    podman: Podman,
    store: Store,
    archives: PathBuf,
}

impl Images {
    pub(crate) fn new(config: &Config, podman: Podman, store: Store, wake: Arc<Notify>) -> Self {
        let markers = config.agent.state_directory.join("fetching");
        let archives = config.podman.image_archives.clone();
        Self { source: Source { podman, store, archives }, markers, wake, downloads: HashMap::new() }
    }

    /// Looks for the image and starts a download if it is missing.
    ///
    /// # Errors
    /// Returns an error if the last download failed, if podman cannot be asked, or if the image is built for
    /// another architecture.
    pub(crate) async fn ensure(&mut self, reference: &str) -> Result<Availability> {
        let ended = match self.downloads.get(reference) {
            Some(task) if !task.is_finished() => return Ok(Availability::Downloading),
            _ => self.downloads.remove(reference),
        };
        if let Some(task) = ended {
            task.await??;
        }
        let marker = self.markers.join(archive_name(reference));
        if marker.exists() {
            self.source.podman.remove_image(reference).await?;
        } else if let Some(image) = self.source.podman.image(reference).await? {
            let own = go_architecture();
            if !image.architecture.is_empty() && image.architecture != own {
                bail!("the image {reference} is made for {}, this device is {own}", image.architecture);
            }
            return Ok(Availability::Available);
        }
        let download = self.source.clone().download(reference.to_owned(), marker);
        let wake = Arc::clone(&self.wake);
        let task = tokio::spawn(async move {
            let downloaded = download.await;
            wake.notify_one();
            downloaded
        });
        self.downloads.insert(reference.to_owned(), task);
        Ok(Availability::Downloading)
    }
}

impl Source {
    async fn download(self, reference: String, marker: PathBuf) -> Result<()> {
        create_durably(&marker).with_context(|| format!("create the marker file {}", marker.display()))?;
        let downloaded = self.load_or_pull(&reference).await;
        if downloaded.is_ok() {
            tokio::task::spawn_blocking(move || self.store.sync_file_system()).await??;
        }
        // After a failure, podman has deleted the partial image itself.
        fs::remove_file(&marker).with_context(|| format!("delete the marker file {}", marker.display()))?;
        downloaded
    }

    async fn load_or_pull(&self, reference: &str) -> Result<()> {
        let archive = self.archives.join(archive_name(reference));
        if !archive.exists() {
            return self.podman.pull(reference).await;
        }
        self.podman.load(&archive).await?;
        if self.podman.image(reference).await?.is_none() {
            bail!("the image archive {} does not contain {reference}", archive.display());
        }
        Ok(())
    }
}

/// Creates an empty file and its directory; both are on disk when this returns.
fn create_durably(path: &Path) -> std::io::Result<()> {
    let Some(directory) = path.parent() else { return Ok(()) };
    fs::create_dir_all(directory)?;
    File::create(path)?.sync_all()?;
    files::sync_parent(path)?;
    files::sync_parent(directory)
}

/// Returns the name of this architecture in images (OCI image specification, `architecture`: Go's GOARCH).
fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        "x86_64" => "amd64",
        other => other,
    }
}
