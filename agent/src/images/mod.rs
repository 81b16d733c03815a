//! The images of deployments: [`download`] fetches them in the background, from an archive on the device or from the
//! registry, so that a slow download does not delay other deployments. [`records`] knows which images the agent has
//! fetched, and images that nothing names any more are deleted. If a document follows a tag, the registry is asked
//! again at intervals.

mod download;
mod records;
mod retry;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::config::Config;
use crate::podman::Podman;
use crate::store::Store;
use crate::tags::NamedImages;
use download::Source;
use records::Records;
pub use records::{Fetched, complete_images};
use retry::{Failure, LoginsVersion, jittered};

/// The image that a document needs.
#[derive(Debug, Clone)]
pub(crate) struct NeededImage {
    pub(crate) deployment: String,
    pub(crate) revision: u64,
    pub(crate) reference: String,
    /// The id, if the document follows a tag and has had an image before.
    pub(crate) id: Option<String>,
    /// True if the deployment may use any image that the tag names.
    pub(crate) follows_tag: bool,
}

#[derive(Debug)]
pub(crate) enum Availability {
    /// Podman has the image with this id. If the registry could not be asked although the document follows a tag, the
    /// second field is the reason.
    Available(String, Option<anyhow::Error>),
    /// A download runs in the background and wakes the reconciler when it ends. It has so many bytes.
    Downloading(u64),
}

/// The state of a tag that a document follows.
#[derive(Debug)]
pub(crate) struct FollowedTag {
    /// The image that the tag had when the registry was asked last.
    pub(crate) id: Option<String>,
    /// The bytes of a download that runs.
    pub(crate) bytes: Option<u64>,
    /// The time until the registry is asked again.
    pub(crate) pause: Duration,
}

pub(crate) struct Images {
    source: Source,
    wake: Arc<Notify>,
    downloads: HashMap<String, Download>,
    failures: HashMap<String, Failure>,
    /// The images that tags had when the registry was asked last, by reference.
    tags: HashMap<String, String>,
    /// The revision of each deployment for which the registry has been asked, and the time of the next question.
    asked: HashMap<String, (u64, Instant)>,
    interval: Duration,
    /// The images that podman could not delete when they were last tried.
    undeletable: HashSet<String>,
    /// The incomplete images that nothing names any more, with the times at which they were deleted.
    given_up: HashMap<String, Instant>,
    /// True if [`Source::delete_all_incomplete`] has run.
    has_deleted_incomplete: bool,
}

struct Download {
    task: JoinHandle<Result<String>>,
    bytes: Arc<AtomicU64>,
    logins: LoginsVersion,
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
            tags: HashMap::new(),
            asked: HashMap::new(),
            interval: Duration::from_secs(config.podman.tag_check_seconds),
            undeletable: HashSet::new(),
            given_up: HashMap::new(),
            has_deleted_incomplete: false,
        }
    }

    /// Looks for the image and starts a download if it is missing. If the document follows a tag and has had no image
    /// yet, the registry is asked first. If it cannot be asked, the image that the device has is used.
    ///
    /// # Errors
    /// Returns an error if the last download failed and its pause has not passed, if podman cannot be asked, if the
    /// disk is too full, or if the image is built for another architecture.
    pub(crate) async fn ensure(&mut self, image: &NeededImage) -> Result<Availability> {
        self.delete_incomplete().await?;
        let reference = &image.reference;
        if let Some(id) = &image.id
            && let Some(id) = self.source.has(id).await?
        {
            return Ok(Availability::Available(id, None));
        }
        if let Some(bytes) = self.running(reference) {
            return Ok(Availability::Downloading(bytes));
        }
        let ended = self.take_ended(reference).await?;
        if image.id.is_none()
            && !image.follows_tag
            && let Some(id) = self.has(reference).await?
        {
            return Ok(Availability::Available(id, None));
        }
        let error = match ended {
            Some(Ok(id)) if image.follows_tag || image.id.is_none() => {
                let id = self.source.has(&id).await?.unwrap_or(id);
                return Ok(Availability::Available(id, None));
            }
            Some(Ok(_)) => {
                // The container of an earlier document is made again.
                let error = anyhow!("the image of this revision is gone, and {reference} is another one now");
                self.fail(reference, &error, self.source.logins_version());
                error
            }
            Some(Err(error)) => error,
            None => match self.failures.get(reference) {
                Some(failure) if failure.pauses_until(self.source.logins_version()).is_some() => {
                    anyhow!("{}", failure.error)
                }
                _ => {
                    self.start(image);
                    return Ok(Availability::Downloading(0));
                }
            },
        };
        match self.has(reference).await? {
            Some(id) if image.follows_tag => Ok(Availability::Available(id, Some(error))),
            _ => Err(error),
        }
    }

    /// Asks the registry in the background which image the tag of a document names, if it is time to do so.
    ///
    /// # Errors
    /// Returns an error if the last question has just failed.
    pub(crate) async fn follow(&mut self, image: &NeededImage) -> Result<FollowedTag> {
        self.delete_incomplete().await?;
        let reference = &image.reference;
        let now = Instant::now();
        if let Some(bytes) = self.running(reference) {
            return Ok(FollowedTag { id: None, bytes: Some(bytes), pause: self.interval });
        }
        self.take_ended(reference).await?.transpose()?;
        let due = match (self.failures.get(reference), self.asked.get(&image.deployment)) {
            (Some(failure), _) => failure.pauses_until(self.source.logins_version()),
            (None, Some((revision, due))) if *revision == image.revision => Some(*due),
            _ => None,
        };
        let Some(due) = due.filter(|due| now < *due) else {
            self.start(image);
            return Ok(FollowedTag { id: None, bytes: Some(0), pause: self.interval });
        };
        Ok(FollowedTag { id: self.tags.get(reference).cloned(), bytes: None, pause: due - now })
    }

    /// Deletes the images of the downloads that an earlier process has not ended.
    async fn delete_incomplete(&mut self) -> Result<()> {
        if !self.has_deleted_incomplete {
            self.source.delete_all_incomplete().await?;
            self.has_deleted_incomplete = true;
        }
        Ok(())
    }

    /// Returns the id of an image if podman has it completely.
    async fn has(&self, reference: &str) -> Result<Option<String>> {
        if self.failures.contains_key(reference) {
            self.source.adopt(reference).await?;
        }
        self.source.has(reference).await
    }

    /// Ends all downloads.
    pub(crate) fn abort(&mut self) {
        self.downloads.drain().for_each(|(_, download)| download.task.abort());
    }

    /// Returns the bytes of a download that runs.
    fn running(&self, reference: &str) -> Option<u64> {
        let download = self.downloads.get(reference).filter(|download| !download.task.is_finished())?;
        Some(download.bytes.load(Ordering::Relaxed))
    }

    /// Returns the result of a download that has ended since the last call: the id of the image.
    async fn take_ended(&mut self, reference: &str) -> Result<Option<Result<String>>> {
        let Some(download) = self.downloads.remove(reference) else { return Ok(None) };
        let ended = download.task.await?;
        match &ended {
            Ok(id) => {
                self.failures.remove(reference);
                self.tags.insert(reference.to_owned(), id.clone());
            }
            Err(error) => self.fail(reference, error, download.logins),
        }
        Ok(Some(ended))
    }

    fn fail(&mut self, reference: &str, error: &anyhow::Error, logins: LoginsVersion) {
        let failure = Failure::after(self.failures.get(reference), format!("{error:#}"), logins);
        self.failures.insert(reference.to_owned(), failure);
    }

    fn start(&mut self, image: &NeededImage) {
        let NeededImage { deployment, revision, reference, follows_tag, .. } = image;
        if *follows_tag {
            let now = Instant::now();
            self.asked.retain(|_, (_, due)| now < *due);
            self.asked.insert(deployment.clone(), (*revision, now + jittered(self.interval)));
            self.tags.remove(reference);
        }
        let bytes = Arc::new(AtomicU64::new(0));
        let download = self.source.clone().download(reference.clone(), Arc::clone(&bytes), *follows_tag);
        let (wake, logins) = (Arc::clone(&self.wake), self.source.logins_version());
        let task = tokio::spawn(async move {
            let downloaded = download.await;
            wake.notify_one();
            downloaded
        });
        self.downloads.insert(reference.clone(), Download { task, bytes, logins });
    }

    /// Ends the downloads of images that no deployment names any more, and deletes the images that the agent has
    /// fetched and that nothing names or uses. Returns the references of the deleted images with their ids.
    ///
    /// # Errors
    /// Returns an error if podman cannot be asked, or if a record cannot be deleted.
    pub(crate) async fn collect(&mut self, named: &NamedImages) -> Result<Vec<String>> {
        let is_named = |reference: &String| named.references.contains(reference);
        self.failures.retain(|reference, _| is_named(reference));
        self.tags.retain(|reference, _| is_named(reference));
        self.downloads.retain(|reference, download| {
            if !is_named(reference) {
                download.task.abort();
            }
            is_named(reference)
        });
        self.given_up.retain(|reference, _| !is_named(reference));
        self.source.collect(named, &mut self.undeletable, &mut self.given_up).await
    }
}
