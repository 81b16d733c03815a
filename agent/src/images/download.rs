//! The download of one image, and the deletion of images.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use tracing::warn;

use super::records::{Fetched, Records};
use super::retry::LoginsVersion;
use crate::config::{PodmanConfig, archive_names};
use crate::credentials::modified;
use crate::device_state::short_id;
use crate::podman::{Podman, is_refusal};
use crate::registry_logins::RegistryLogins;
use crate::store::Store;
use crate::tags::NamedImages;

/// The sources of a download, and the store that syncs the downloaded image to disk.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) podman: Podman,
    pub(super) store: Store,
    pub(super) records: Records,
    pub(super) settings: PodmanConfig,
}

impl Source {
    /// Returns the id of an image if podman has the complete image. Deletes an image that is incomplete or broken.
    /// `name` is a reference or an id.
    ///
    /// # Errors
    /// Returns an error if podman cannot be asked, or if the image is built for another architecture.
    pub(super) async fn has(&self, name: &str) -> Result<Option<String>> {
        self.delete_incomplete(name).await?;
        let image = match self.podman.image(name).await {
            Ok(image) => image,
            // A power cut may leave an image that podman cannot read (podman#5986).
            Err(error) if is_broken(&error) => {
                warn!("deleting the image {name}, which podman cannot read: {error:#}");
                if !self.podman.remove_unused_image(name).await? {
                    return Err(error);
                }
                None
            }
            Err(error) => return Err(error),
        };
        let Some(image) = image else { return Ok(None) };
        let own = go_architecture();
        ensure!(
            image.architecture.is_empty() || image.architecture == own,
            "the image {name} is made for {}, this device is {own}",
            image.architecture
        );
        Ok(Some(image.id))
    }

    /// Returns the id that the image had before a download that has not ended ([`Records::interrupted`]).
    async fn interrupted(&self, reference: &str) -> Result<Option<String>> {
        let (records, name) = (self.records.clone(), reference.to_owned());
        Ok(spawn_blocking(move || records.interrupted(&name)).await?)
    }

    /// Deletes the image that an interrupted download may have left incomplete. If the reference still names the image
    /// from before the download, that image is complete. The record stays, because podman may still complete the download.
    async fn delete_incomplete(&self, reference: &str) -> Result<()> {
        if let Some(earlier) = self.interrupted(reference).await?
            && (earlier.is_empty() || self.id_of(reference).await != Some(earlier))
        {
            self.podman.remove_unused_image(reference).await?;
        }
        Ok(())
    }

    /// Records an image as complete that podman has got after its download had failed in this process, for example
    /// because podman completed the download later, or because a user loaded the image.
    pub(super) async fn adopt(&self, reference: &str) -> Result<()> {
        let Some(earlier) = self.interrupted(reference).await? else { return Ok(()) };
        let Some(id) = self.id_of(reference).await else { return Ok(()) };
        self.finish(reference, &id, &earlier).await
    }

    /// Syncs and records an image that was downloaded. `earlier` is the id from before the download.
    async fn finish(&self, reference: &str, id: &str, earlier: &str) -> Result<()> {
        let (store, records, name) = (self.store.clone(), self.records.clone(), reference.to_owned());
        let new = Some(id.to_owned()).filter(|id| id != earlier);
        spawn_blocking(move || {
            let Some(id) = new else { return Ok(records.end(&name)?) };
            store.sync_file_system()?;
            anyhow::Ok(records.finish(&name, &id)?)
        })
        .await?
        .with_context(|| format!("record that the image {reference} was downloaded"))
    }

    /// Deletes all images that interrupted downloads may have left incomplete. The next download could have some of
    /// their layers in common. An image that podman cannot delete is tried again later.
    pub(super) async fn delete_all_incomplete(&self) -> Result<()> {
        let records = self.records.clone();
        let downloads = spawn_blocking(move || records.downloads()).await?;
        for reference in downloads.context("read the records of the images")? {
            match self.delete_incomplete(&reference).await {
                Err(error) if is_refusal(&error) => warn!("{error:#}"),
                deleted => deleted?,
            }
        }
        self.identify_all().await
    }

    /// Deletes the record of a download.
    async fn end(&self, reference: &str) -> Result<()> {
        let (records, name) = (self.records.clone(), reference.to_owned());
        spawn_blocking(move || records.end(&name))
            .await?
            .with_context(|| format!("delete the record of the download of {reference}"))
    }

    /// Adds the ids to the records of images that an earlier version of the agent has downloaded. Without an id, an
    /// image would never be deleted.
    async fn identify_all(&self) -> Result<()> {
        let records = self.records.clone();
        let references = spawn_blocking(move || records.without_id()).await?;
        for reference in references.context("read the records of the images")? {
            let image = match self.podman.image(&reference).await {
                Err(error) if is_refusal(&error) => None,
                image => image?,
            };
            let (records, id) = (self.records.clone(), image.map(|image| image.id));
            spawn_blocking(move || records.identify(&reference, id.as_deref()))
                .await?
                .context("write the record of an image")?;
        }
        Ok(())
    }

    /// Returns the id of the image, if podman has it and can read it.
    async fn id_of(&self, reference: &str) -> Option<String> {
        self.podman.image(reference).await.ok().flatten().map(|image| image.id)
    }

    /// Downloads an image and returns its id. If `registry_first` is true, the registry is asked before an archive is loaded.
    pub(super) async fn download(
        self,
        reference: String,
        bytes: Arc<AtomicU64>,
        registry_first: bool,
    ) -> Result<String> {
        self.check_space(&reference)?;
        let interrupted = self.interrupted(&reference).await?;
        self.delete_incomplete(&reference).await?;
        // Podman may have completed an interrupted download meanwhile. Its image has no record of its own yet.
        let earlier = match interrupted {
            Some(earlier) => earlier,
            None => self.id_of(&reference).await.unwrap_or_default(),
        };
        // A slow card must not delay the bus and the watchdog.
        let (records, name, id) = (self.records.clone(), reference.clone(), earlier.clone());
        spawn_blocking(move || records.begin(&name, &id))
            .await?
            .with_context(|| format!("record that the image {reference} is downloaded"))?;
        let downloaded = self.load_or_pull(&reference, &bytes, registry_first).await;
        // The record of a download that has failed stays, because podman may still complete it.
        if let Ok(id) = &downloaded {
            self.finish(&reference, id, &earlier).await?;
        }
        downloaded
    }

    /// Returns the archive of an image, if there is one. No file has a name that is too long.
    fn archive(&self, reference: &str) -> Option<PathBuf> {
        let paths = archive_names(reference).map(|name| self.settings.image_archives.join(name));
        paths.into_iter().find(|path| path.exists())
    }

    /// Loads the image from its archive if there is one, or else pulls it. An archive that is torn, or that contains
    /// another image, does not keep the device from its registry. If `registry_first` is true, an archive is loaded only if the
    /// registry has failed and the device has no image of this name.
    async fn load_or_pull(&self, reference: &str, bytes: &AtomicU64, registry_first: bool) -> Result<String> {
        let Some(archive) = self.archive(reference) else { return self.pull(reference, bytes).await };
        if registry_first {
            let pulled = self.pull(reference, bytes).await;
            let Err(of_registry) = pulled else { return pulled };
            if self.id_of(reference).await.is_some() {
                return Err(of_registry);
            }
            let loaded = self.load(reference, &archive).await;
            return loaded.map_err(|error| of_registry.context(format!("{error:#}; and before that")));
        }
        let loaded = self.load(reference, &archive).await;
        let Err(of_archive) = loaded else { return loaded };
        let pulled = self.pull(reference, bytes).await;
        pulled.map_err(|error| of_archive.context(format!("{error:#}; and before that")))
    }

    async fn load(&self, reference: &str, archive: &Path) -> Result<String> {
        self.podman.load(archive).await?;
        let image = self.podman.image(reference).await?;
        let missing = || format!("the image archive {} does not contain {reference}", archive.display());
        image.map(|image| image.id).with_context(missing)
    }

    pub(super) fn logins_version(&self) -> LoginsVersion {
        self.settings.registry_auth_file.as_deref().and_then(modified)
    }

    async fn pull(&self, reference: &str, bytes: &AtomicU64) -> Result<String> {
        let silence = Duration::from_secs(self.settings.pull_silence_seconds);
        let file = self.settings.registry_auth_file.clone();
        let logins = spawn_blocking(move || file.as_deref().map(RegistryLogins::read).transpose());
        let login = logins.await??.and_then(|logins| logins.header(reference));
        self.podman
            .pull(reference, login.as_deref(), silence, |count| {
                bytes.store(count, Ordering::Relaxed);
                self.check_space(reference)
            })
            .await?;
        let image = self.podman.image(reference).await?;
        image
            .map(|image| image.id)
            .with_context(|| format!("podman lacks the image {reference} after a pull"))
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

    /// Deletes the recorded images that nothing names or uses, and returns their references with their ids. If an image
    /// cannot be deleted, the others are deleted nevertheless. It is added to `undeletable`, and the first time, a
    /// warning has the reason. `given_up` has the times at which incomplete images were deleted ([`podman_may_complete`]).
    pub(super) async fn collect(
        &self,
        named: &NamedImages,
        undeletable: &mut HashSet<String>,
        given_up: &mut HashMap<String, Instant>,
    ) -> Result<Vec<String>> {
        let records = self.records.clone();
        let listed = spawn_blocking(move || io::Result::Ok((records.downloads()?, records.fetched()?)));
        let (downloads, fetched) = listed.await?.context("read the records of the images")?;
        for reference in downloads.iter().filter(|reference| !named.references.contains(*reference)) {
            match self.delete_incomplete(reference).await {
                Ok(()) if podman_may_complete(reference, given_up) => {}
                Ok(()) => self.end(reference).await?,
                Err(error) if undeletable.insert(reference.clone()) => warn!("{error:#}"),
                Err(_) => {}
            }
        }
        let mut deleted = Vec::new();
        for image in &fetched {
            let Some(name) = self.surplus(image, &fetched, named).await else { continue };
            match self.podman.remove_unused_image(&name).await {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    if undeletable.insert(name) {
                        warn!("{error:#}");
                    }
                    continue;
                }
            }
            undeletable.remove(&name);
            let (records, record) = (self.records.clone(), image.clone());
            spawn_blocking(move || records.forget(&record))
                .await?
                .with_context(|| format!("delete the record of the image {name}"))?;
            deleted.push(format!("{} ({})", image.reference, short_id(&image.id)));
        }
        Ok(deleted)
    }

    /// Returns the name by which podman can delete an image: the reference, or the id if the tag has moved to another
    /// image. Returns `None` if the image is still needed.
    async fn surplus(&self, image: &Fetched, all: &[Fetched], named: &NamedImages) -> Option<String> {
        let Fetched { reference, id } = image;
        if named.ids.contains(id) {
            return None;
        }
        let is_named = named.references.contains(reference);
        if is_named && all.iter().all(|other| other.reference != *reference || other == image) {
            return None;
        }
        let is_tagged = self.id_of(reference).await.as_ref() == Some(id);
        match (is_named, is_tagged) {
            (true, true) => None,
            (false, true) => Some(reference.clone()),
            (_, false) => Some(id.clone()),
        }
    }
}

/// The time in which podman may still complete a pull whose client has ended or has given up. Podman notices that
/// between two steps, of which the unpacking of a layer takes longest.
const PULL_GRACE: Duration = Duration::from_secs(60);

/// Returns whether podman may still complete the pull of an image that was deleted because nothing names it any more.
/// The record of the download must stay until then, or the image would stay forever.
fn podman_may_complete(reference: &str, given_up: &mut HashMap<String, Instant>) -> bool {
    let now = Instant::now();
    let since = *given_up.entry(reference.to_owned()).or_insert(now);
    let may_come = now - since < PULL_GRACE;
    if !may_come {
        given_up.remove(reference);
    }
    may_come
}

/// Returns whether podman says that an image or one of its layers is broken.
fn is_broken(error: &anyhow::Error) -> bool {
    let text = format!("{error:#}");
    // If a layer or the manifest is missing, podman 4.3 panics, recovers, and reports this error.
    let panic = "invalid memory address";
    ["layer not known", "locating item named", "storage/overlay", "unexpected end of JSON", panic]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_name_or_the_digest_of_its_reference() {
        let directory = tempfile::tempdir().unwrap();
        let settings =
            PodmanConfig { image_archives: directory.path().to_owned(), ..PodmanConfig::default() };
        let source = Source {
            podman: Podman::new(&directory.path().join("podman.sock")),
            store: Store::new(directory.path(), "pi-7"),
            records: Records::new(directory.path()),
            settings,
        };
        let long = format!("r.example/{}:1", "a".repeat(400));
        for reference in ["r.example/a_b:1", &long] {
            assert_eq!(source.archive(reference), None);
            let [by_digest, readable] = archive_names(reference).map(|name| directory.path().join(name));
            let written = std::fs::write(&readable, "");
            assert_eq!(source.archive(reference), written.is_ok().then_some(readable));
            std::fs::write(&by_digest, "").unwrap();
            assert_eq!(source.archive(reference), Some(by_digest));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_record_of_an_incomplete_image_stays_until_podman_cannot_complete_it() {
        let mut given_up = HashMap::new();
        assert!(podman_may_complete("a", &mut given_up));
        tokio::time::sleep(PULL_GRACE / 2).await;
        assert!(podman_may_complete("a", &mut given_up) && podman_may_complete("b", &mut given_up));
        tokio::time::sleep(PULL_GRACE / 2).await;
        assert!(!podman_may_complete("a", &mut given_up) && podman_may_complete("b", &mut given_up));
    }
}
