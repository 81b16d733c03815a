//! The download of one image, and the deletion of images.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::task::spawn_blocking;
use tracing::warn;

use super::records::Records;
use crate::config::{PodmanConfig, archive_name};
use crate::podman::Podman;
use crate::store::Store;

/// The sources of a download, and the store that syncs the downloaded image to disk.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) podman: Podman,
    pub(super) store: Store,
    pub(super) records: Records,
    pub(super) settings: PodmanConfig,
}

impl Source {
    /// Returns whether podman has the complete image. Deletes an image that is incomplete or broken.
    ///
    /// # Errors
    /// Returns an error if podman cannot be asked, or if the image is built for another architecture.
    pub(super) async fn has(&self, reference: &str) -> Result<bool> {
        if self.records.is_incomplete(reference) {
            self.podman.remove_image(reference).await?;
            return Ok(false);
        }
        let image = match self.podman.image(reference).await {
            Ok(image) => image,
            // A power cut may leave an image that podman cannot read (podman#5986).
            Err(error) if is_broken(&error) => {
                warn!("deleting the image {reference}, which podman cannot read: {error:#}");
                if !self.podman.remove_unused_image(reference).await? {
                    return Err(error);
                }
                None
            }
            Err(error) => return Err(error),
        };
        let Some(image) = image else { return Ok(false) };
        let own = go_architecture();
        ensure!(
            image.architecture.is_empty() || image.architecture == own,
            "the image {reference} is made for {}, this device is {own}",
            image.architecture
        );
        Ok(true)
    }

    pub(super) async fn download(self, reference: String, bytes: Arc<AtomicU64>) -> Result<()> {
        self.check_space(&reference)?;
        // A slow card must not delay the bus and the watchdog.
        let (records, name) = (self.records.clone(), reference.clone());
        spawn_blocking(move || records.begin(&name))
            .await?
            .with_context(|| format!("record that the image {reference} is downloaded"))?;
        let downloaded = self.load_or_pull(&reference, &bytes).await;
        let (store, records, name) = (self.store, self.records, reference.clone());
        let is_complete = downloaded.is_ok();
        spawn_blocking(move || {
            if is_complete {
                store.sync_file_system()?;
                records.finish(&name)?;
            } else {
                // After a failure, podman has deleted the partial image itself.
                records.forget(&name)?;
            }
            anyhow::Ok(())
        })
        .await?
        .with_context(|| format!("record that the image {reference} was downloaded"))?;
        downloaded
    }

    /// Loads the image from its archive if there is one, or else pulls it. An archive that is torn, or that contains
    /// another image, does not keep the device from its registry.
    async fn load_or_pull(&self, reference: &str, bytes: &AtomicU64) -> Result<()> {
        let archive = self.settings.image_archives.join(archive_name(reference));
        if !archive.exists() {
            return self.pull(reference, bytes).await;
        }
        let Err(of_archive) = self.load(reference, &archive).await else { return Ok(()) };
        self.pull(reference, bytes)
            .await
            .map_err(|error| of_archive.context(format!("{error:#}; and before that")))
    }

    async fn load(&self, reference: &str, archive: &Path) -> Result<()> {
        self.podman.load(archive).await?;
        if self.podman.image(reference).await?.is_none() {
            bail!("the image archive {} does not contain {reference}", archive.display());
        }
        Ok(())
    }

    async fn pull(&self, reference: &str, bytes: &AtomicU64) -> Result<()> {
        let silence = Duration::from_secs(self.settings.pull_silence_seconds);
        self.podman
            .pull(reference, silence, |count| {
                bytes.store(count, Ordering::Relaxed);
                self.check_space(reference)
            })
            .await
    }

    /// Returns an error if less space is free than the configuration demands. A full disk would keep podman and the
    /// agent from writing their state.
    fn check_space(&self, reference: &str) -> Result<()> {
        let (floor, free) = (self.settings.min_free_mib, self.store.free_mib()?);
        ensure!(
            free >= floor,
            "the image {reference} is not downloaded: {free} MiB are free on the disk, and [podman] min_free_mib is {floor}"
        );
        Ok(())
    }

    /// Deletes the recorded images that nothing names or uses, and returns their references. An image that cannot be
    /// deleted does not keep the others; it is added to `undeletable`, and a warning says why the first time.
    pub(super) async fn collect(
        &self,
        named: &BTreeSet<String>,
        undeletable: &mut HashSet<String>,
    ) -> Result<Vec<String>> {
        let (records, wanted) = (self.records.clone(), named.clone());
        let surplus = spawn_blocking(move || records.surplus(&wanted))
            .await?
            .context("read the records of the images")?;
        let mut deleted = Vec::new();
        for reference in surplus {
            match self.podman.remove_unused_image(&reference).await {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    if undeletable.insert(reference) {
                        warn!("{error:#}");
                    }
                    continue;
                }
            }
            undeletable.remove(&reference);
            let (records, name) = (self.records.clone(), reference.clone());
            spawn_blocking(move || records.forget(&name))
                .await?
                .with_context(|| format!("delete the record of the image {reference}"))?;
            deleted.push(reference);
        }
        Ok(deleted)
    }
}

/// Returns whether podman says that an image or one of its layers is broken.
fn is_broken(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    ["layer not known", "locating item named", "storage/overlay", "unexpected end of JSON"]
        .iter()
        .any(|words| text.contains(words))
}

/// Returns the name of this architecture in images (OCI image specification, `architecture`: Go's GOARCH).
fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        "x86_64" => "amd64",
        other => other,
    }
}
