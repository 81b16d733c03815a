//! Podman's storage: its lists, and the images that the agent takes as complete. A layer of any other image may be torn,
//! because the agent makes podman delete it.

use std::collections::{BTreeMap, BTreeSet};

use data_encoding::BASE64;
use iot_agent::storage::{LAYERS, USERS, parse_list, used_layers};
use iot_agent::{Fetched, complete_images};
use serde_json::{Map, Value};
use xtask_core::digest::Algorithm;

use super::{Case, STATE_DIRECTORY};
use crate::Rule;
use crate::files::{Checked, Kind, difference};

/// Podman's storage on the device: the default of `iot-agent prepare-storage`.
pub(crate) const STORAGE: &str = "/var/lib/iot-agent/.local/share/containers/storage";

type List = Vec<Map<String, Value>>;

impl Case<'_> {
    pub(super) fn judge_storage(&mut self) -> Checked<()> {
        let layers = self.list_of_storage(LAYERS, true)?;
        let [images, containers, volatile] = USERS;
        let images = self.list_of_storage(images, true)?;
        self.list_of_storage(containers, true)?;
        // Podman does not sync the list of the containers that it deletes when they end.
        self.list_of_storage(volatile, false)?;
        let (Some(layers), Some(images)) = (layers, images) else { return Ok(()) };
        for (reference, position) in &self.facts.images {
            let is_named = |image: &Map<String, Value>| {
                let names = image.get("names").and_then(Value::as_array);
                names.is_some_and(|names| names.iter().any(|name| name == reference))
            };
            if !images.iter().any(is_named) {
                let path = format!("{STORAGE}/{}", USERS[0]);
                let text = format!(
                    "{path} lacks the image {reference}, although the device had it at entry {position}."
                );
                self.lose(Rule::ImageAcknowledged, &path, text);
            }
        }
        let [fetching, fetched] = ["fetching", "fetched"].map(|name| self.records(name));
        for Fetched { reference, id } in complete_images(&fetching?, &fetched?) {
            let Some(image) = images.iter().find(|image| text(image, "id") == Some(&id)) else { continue };
            for (path, what) in self.faults_of_image(&reference, image, &layers)? {
                let text = format!(
                    "{path} {what}, although the agent has recorded the image {reference} as complete, and no download of it runs."
                );
                self.lose(Rule::ImageComplete, &path, text);
            }
        }
        Ok(())
    }

    /// Returns one of the storage's lists, or `None` if it is torn. If podman syncs the list, that is a loss.
    fn list_of_storage(&mut self, name: &str, is_synced: bool) -> Checked<Option<List>> {
        let path = format!("{STORAGE}/{name}");
        let content = self.files.read(&path)?;
        let is_empty = content.as_ref().is_some_and(Vec::is_empty);
        let error = match parse_list(&content.unwrap_or_default()) {
            Ok(list) if !(is_empty && is_synced) => return Ok(Some(list)),
            Ok(_) => "it is empty".to_owned(),
            Err(error) => error.to_string(),
        };
        self.judgement.is_odd = true;
        if is_synced {
            let text = format!(
                "{path} is not a list ({error}), although podman syncs the file before it renames it."
            );
            self.lose(Rule::StorageList, &path, text);
        }
        Ok(None)
    }

    /// Returns the names and contents of the records in a directory of the agent.
    fn records(&self, name: &str) -> Checked<Vec<(String, Vec<u8>)>> {
        let directory = format!("{STATE_DIRECTORY}/{name}");
        let mut records = Vec::new();
        for name in self.files.list(&directory)? {
            let content = self.files.read(&format!("{directory}/{name}"))?.unwrap_or_default();
            records.push((name, content));
        }
        Ok(records)
    }

    /// Returns the faults of an image that must be complete, each with the path of a file.
    fn faults_of_image(
        &self,
        reference: &str,
        image: &Map<String, Value>,
        layers: &List,
    ) -> Checked<Vec<(String, String)>> {
        let mut faults = self.faults_of_documents(image)?;
        let mut found = BTreeSet::new();
        // Podman makes mapped layers for containers. They are synced only with their container.
        let mut image = image.clone();
        image.remove("mapped-layers");
        let used = used_layers(layers, [&image].into_iter());
        for layer in &used {
            let Some(entry) = layers.iter().find(|entry| text(entry, "id") == Some(layer)) else {
                faults.push((format!("{STORAGE}/{LAYERS}"), format!("lacks the layer {layer}")));
                continue;
            };
            if entry.get("flags").and_then(|flags| flags.get("incomplete")) == Some(&Value::Bool(true)) {
                faults
                    .push((format!("{STORAGE}/{LAYERS}"), format!("marks the layer {layer} as incomplete")));
            }
            let directory = format!("{STORAGE}/overlay/{layer}");
            if self.files.kind(&format!("{directory}/diff"))? != Some(Kind::Directory) {
                faults.push((format!("{directory}/diff"), "is missing".to_owned()));
            }
            faults.extend(self.faults_of_links(&directory, text(entry, "parent").is_some())?);
            for (name, sha256) in self.recording.images.get(reference).into_iter().flatten() {
                let path = format!("{directory}/diff/{name}");
                let expected = self.known.blob(sha256);
                let Some(is_whole) = self.files.has(&path, expected)? else { continue };
                found.insert(name);
                if !is_whole {
                    let content = self.files.read(&path)?.unwrap_or_default();
                    faults.extend(difference(&content, expected).map(|what| (path, what)));
                }
            }
        }
        let names = self.recording.images.get(reference).into_iter().flat_map(BTreeMap::keys);
        for name in names.filter(|name| !found.contains(name)) {
            let top = text(&image, "layer").map_or("", String::as_str);
            faults.push((format!("{STORAGE}/overlay/{top}/diff/{name}"), "is in no layer".to_owned()));
        }
        Ok(faults)
    }

    /// Checks the short name of a layer, and the names of the layers below it. The driver overlay mounts the layers by
    /// these names.
    fn faults_of_links(&self, directory: &str, has_parent: bool) -> Checked<Vec<(String, String)>> {
        let mut faults = Vec::new();
        let path = format!("{directory}/link");
        let link = self.files.read(&path)?.unwrap_or_default();
        let link = String::from_utf8_lossy(&link).trim().to_owned();
        if link.is_empty() {
            faults.push((path, "is empty or missing".to_owned()));
        } else {
            let path = format!("{STORAGE}/overlay/l/{link}");
            if !matches!(self.files.kind(&path)?, Some(Kind::Link(_))) {
                faults.push((path, "is missing".to_owned()));
            }
        }
        let path = format!("{directory}/lower");
        if has_parent && self.files.read(&path)?.unwrap_or_default().is_empty() {
            faults.push((path, "is empty or missing".to_owned()));
        }
        Ok(faults)
    }

    /// Compares the manifest, the configuration and the other documents of an image with the digests that the list of
    /// the images has.
    fn faults_of_documents(&self, image: &Map<String, Value>) -> Checked<Vec<(String, String)>> {
        let mut faults = Vec::new();
        let id = text(image, "id").map_or("", String::as_str);
        let digests = image.get("big-data-digests").and_then(Value::as_object);
        for (name, digest) in digests.into_iter().flatten() {
            let path = format!("{STORAGE}/overlay-images/{id}/{}", file_of(name));
            let what = match self.files.read(&path)? {
                None => "is missing",
                Some(content) if digest == &Value::String(Algorithm::Sha256.of(&content).to_string()) => {
                    continue;
                }
                Some(content) if content.is_empty() => "is empty",
                Some(_) => "does not have the digest that the list of the images has",
            };
            faults.push((path, what.to_owned()));
        }
        Ok(faults)
    }
}

fn text<'a>(object: &'a Map<String, Value>, key: &str) -> Option<&'a String> {
    match object.get(key)? {
        Value::String(text) if !text.is_empty() => Some(text),
        _ => None,
    }
}

/// Returns the name of the file with a document of an image (containers/storage, `makeBigDataBaseName`).
fn file_of(name: &str) -> String {
    let is_plain = |byte: u8| byte == b'.' || byte.is_ascii_digit() || byte.is_ascii_lowercase();
    if name.bytes().all(is_plain) { name.to_owned() } else { format!("={}", BASE64.encode(name.as_bytes())) }
}
