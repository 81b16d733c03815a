//! The images of deployments: [`download`] fetches them in the background, from an archive on the device or from the
//! registry, so that a slow download does not delay other deployments. [`records`] knows which images the agent has
//! fetched, and images that nothing names any more are deleted.

mod download;
mod records;
mod retry;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, bail};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::config::Config;
use crate::podman::Podman;
use crate::store::Store;
use download::Source;
use records::Records;
use retry::Failure;

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Availability {
    Available,
    /// A download runs in the background and wakes the reconciler when it ends. It has so many bytes.
    Downloading(u64),
}

pub(crate) struct Images {
    source: Source,
    wake: Arc<Notify>,
    downloads: HashMap<String, Download>,
    failures: HashMap<String, Failure>,
    /// The images that podman could not delete when they were last tried.
    undeletable: HashSet<String>,
}

struct Download {
    task: JoinHandle<Result<()>>,
    bytes: Arc<AtomicU64>,
}

impl Images {
    pub(crate) fn new(config: &Config, podman: Podman, store: Store, wake: Arc<Notify>) -> Self {
        let records = Records::new(&config.agent.state_directory);
        let source = Source { podman, store, records, settings: config.podman.clone() };
        Self {
            source,
            wake,
            downloads: HashMap::new(),
            failures: HashMap::new(),
            undeletable: HashSet::new(),
        }
    }

    /// Looks for the image and starts a download if it is missing.
    ///
    /// # Errors
    /// Returns an error if the last download failed and its pause has not passed, if podman cannot be asked, if the disk
    /// is too full, or if the image is built for another architecture.
    pub(crate) async fn ensure(&mut self, reference: &str) -> Result<Availability> {
        if let Some(download) = self.downloads.get(reference).filter(|download| !download.task.is_finished())
        {
            return Ok(Availability::Downloading(download.bytes.load(Ordering::Relaxed)));
        }
        if let Some(download) = self.downloads.remove(reference)
            && let Err(error) = download.task.await?
        {
            let failure = Failure::after(self.failures.get(reference), format!("{error:#}"));
            self.failures.insert(reference.to_owned(), failure);
            return Err(error);
        }
        if self.source.has(reference).await? {
            self.failures.remove(reference);
            return Ok(Availability::Available);
        }
        if let Some(failure) = self.failures.get(reference).filter(|failure| Instant::now() < failure.until) {
            bail!("{}", failure.error);
        }
        let bytes = Arc::new(AtomicU64::new(0));
        let download = self.source.clone().download(reference.to_owned(), Arc::clone(&bytes));
        let wake = Arc::clone(&self.wake);
        let task = tokio::spawn(async move {
            let downloaded = download.await;
            wake.notify_one();
            downloaded
        });
        self.downloads.insert(reference.to_owned(), Download { task, bytes });
        Ok(Availability::Downloading(0))
    }

    /// Ends the downloads of images that no deployment names any more, and deletes the images that the agent has fetched
    /// and that nothing names or uses. Returns the references of the deleted images.
    ///
    /// # Errors
    /// Returns an error if podman cannot be asked, or if a record cannot be deleted.
    pub(crate) async fn collect(&mut self, named: &BTreeSet<String>) -> Result<Vec<String>> {
        self.failures.retain(|reference, _| named.contains(reference));
        self.downloads.retain(|reference, download| {
            let is_wanted = named.contains(reference);
            if !is_wanted {
                download.task.abort();
            }
            is_wanted
        });
        self.source.collect(named, &mut self.undeletable).await
    }
}
