//! Images that deployments wait for, fetched in the background: an archive of the device's own, else the registry. One slow
//! line must not hold up the other deployments.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::config::archive_name;
use crate::podman::Podman;

/// Whether an image can be used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Availability {
    /// It is here.
    Here,
    /// It is being fetched; the wake-up comes when that has ended.
    Fetching,
}

/// What is being fetched.
pub(crate) struct Images {
    podman: Podman,
    archives: PathBuf,
    wake: Arc<Notify>,
    fetching: HashMap<String, JoinHandle<Result<()>>>,
}

impl Images {
    pub(crate) fn new(podman: Podman, archives: PathBuf, wake: Arc<Notify>) -> Self {
        Self { podman, archives, wake, fetching: HashMap::new() }
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
        if let Some(image) = self.podman.image(reference).await? {
            let own = go_architecture();
            if !image.architecture.is_empty() && image.architecture != own {
                bail!("the image {reference} is made for {}, this device is {own}", image.architecture);
            }
            return Ok(Availability::Here);
        }
        let (podman, wake) = (self.podman.clone(), Arc::clone(&self.wake));
        let archive = self.archives.join(archive_name(reference));
        let wanted = reference.to_owned();
        let task = tokio::spawn(async move {
            let fetched = fetch(&podman, archive, &wanted).await;
            wake.notify_one();
            fetched
        });
        self.fetching.insert(reference.to_owned(), task);
        Ok(Availability::Fetching)
    }
}

async fn fetch(podman: &Podman, archive: PathBuf, reference: &str) -> Result<()> {
    if !archive.exists() {
        return podman.pull(reference).await;
    }
    podman.load(&archive).await?;
    if podman.image(reference).await?.is_none() {
        bail!("the image archive {} does not hold {reference}", archive.display());
    }
    Ok(())
}

/// As images name machines (OCI image specification, `architecture`: Go's GOARCH).
fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        "x86_64" => "amd64",
        other => other,
    }
}
