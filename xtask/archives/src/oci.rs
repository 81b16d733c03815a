//! Images in the format of the Open Container Initiative (image-spec, image-layout.md): an index leads by digests to
//! manifests, and these to configurations and layers.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use xtask_core::digest::Digest;
use xtask_core::error::Failure;

use crate::image::{Candidate, Hashed, LayerSource};
use crate::meter::AGAIN;
use crate::store::Store;

pub(crate) const LAYOUT: &str = "oci-layout";
pub(crate) const INDEX: &str = "index.json";

/// The number of documents that are read to find the images. An index can name other indexes.
const MAX_DOCUMENTS: usize = 1000;

/// The annotation of an image's name.
const NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation of a document about an image, such as the record of its build. Such a document is no image.
const REFERENCE: &str = "vnd.docker.reference.type";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    platform: Option<Platform>,
}

/// The platform of a manifest in an index.
#[derive(Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    variant: Option<String>,
}

/// An index or a manifest.
#[derive(Debug, Deserialize)]
struct Linked {
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
}

impl Descriptor {
    /// Returns the blob's path in the layout.
    fn path(&self) -> String {
        format!("blobs/{}/{}", self.digest.algorithm().name(), self.digest.hex())
    }

    /// Returns whether a configuration is that of an image. Bills of materials, signatures and charts are also stored
    /// as manifests with a configuration (OCI image-spec, manifest.md).
    fn is_of_image(&self) -> bool {
        let docker = "application/vnd.docker.container.image.v1+json";
        ["", "application/vnd.oci.image.config.v1+json", docker].contains(&self.media_type.as_str())
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(name).map(String::as_str)
    }
}

fn parse<T: DeserializeOwned>(store: &Store, name: &str, bytes: &[u8]) -> Result<T> {
    let failure = || Failure::guest(format!("read {name} in {}", store.shown()), AGAIN);
    serde_json::from_slice(bytes).with_context(failure)
}

/// Reads a document, and compares it with its digest.
fn document<T: DeserializeOwned>(store: &Store, descriptor: &Descriptor) -> Result<T> {
    let name = descriptor.path();
    let bytes = store.document(&name)?;
    let found = descriptor.digest.algorithm().of(&bytes);
    if found != descriptor.digest {
        return Err(wrong_digest(store, &name, &found));
    }
    parse(store, &name, &bytes)
}

/// Returns the error for a file whose content has another digest than its name or its manifest says.
pub(crate) fn wrong_digest(store: &Store, name: &str, found: &Digest) -> anyhow::Error {
    let message = format!("read {}: the content of {name} has the digest {found}", store.shown());
    Failure::guest(message, AGAIN).into()
}

/// Returns the images of a layout. An index may name images of other platforms that the layout does not contain; they
/// are left out.
pub(crate) fn candidates(store: &Store) -> Result<Vec<Candidate>> {
    let index: Linked = parse(store, INDEX, &store.document(INDEX)?)?;
    let mut pending: Vec<_> =
        index.manifests.unwrap_or_default().into_iter().map(|one| (one, String::new())).collect();
    pending.reverse();
    let (mut seen, mut found) = (HashSet::new(), Vec::new());
    let mut missing = None;
    while let Some((descriptor, outer)) = pending.pop() {
        let is_image = descriptor.annotation(REFERENCE).is_none();
        if !is_image || !seen.insert(descriptor.digest.to_string()) {
            continue;
        }
        if seen.len() > MAX_DOCUMENTS {
            let message =
                format!("read {}: its indexes name more than {MAX_DOCUMENTS} documents", store.shown());
            return Err(Failure::guest(message, AGAIN).into());
        }
        if store.open(&descriptor.path())?.is_none() {
            missing = Some(descriptor);
            continue;
        }
        let name = descriptor.annotation(NAME).map_or(outer, str::to_owned);
        let linked: Linked = document(store, &descriptor)?;
        if let Some(inner) = linked.manifests {
            pending.extend(inner.into_iter().rev().map(|one| (one, name.clone())));
        } else if let Some(config) = linked.config
            && config.is_of_image()
        {
            if store.open(&config.path())?.is_none() {
                missing = Some(config);
                continue;
            }
            let variant = descriptor.platform.and_then(|platform| platform.variant).unwrap_or_default();
            let layers = linked.layers.unwrap_or_default();
            found.push(Candidate { variant, ..candidate(store, name, &config, layers)? });
        }
    }
    if found.is_empty()
        && let Some(descriptor) = missing
    {
        store.needed(&descriptor.path())?;
    }
    Ok(found)
}

fn candidate(store: &Store, name: String, config: &Descriptor, layers: Vec<Descriptor>) -> Result<Candidate> {
    if let Some(layer) = layers.iter().find(|layer| layer.media_type.ends_with("+encrypted")) {
        let message = format!("read {}: the layer {} is encrypted", store.shown(), layer.digest);
        return Err(Failure::guest(message, "save the image without encryption").into());
    }
    let source =
        |layer: Descriptor| LayerSource { name: layer.path(), digest: layer.digest, hashed: Hashed::Blob };
    let layers = layers.into_iter().map(source).collect();
    Ok(Candidate { name, variant: String::new(), config: document(store, config)?, layers })
}
