//! Archives of `docker save`: `manifest.json` names the configuration and the layers of each image
//! (docker image-spec v1.2). The configuration has the digests of the layers.

use std::io::Read;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use xtask_core::error::Failure;

use crate::config::Document;
use crate::image::{Candidate, Hashed, LayerSource};
use crate::meter::AGAIN;
use crate::store::Store;

pub(crate) const MANIFEST: &str = "manifest.json";

/// The bytes of a manifest that are read to recognise it.
const MAX_MANIFEST: u64 = 4 << 20;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Returns whether a `manifest.json` is that of an archive of images. Other software has files with this name, too.
pub(crate) fn is_manifest(file: &mut impl Read) -> bool {
    let images: Result<Vec<Image>, _> = serde_json::from_reader(file.take(MAX_MANIFEST));
    images.is_ok_and(|images| !images.is_empty())
}

/// Returns the images of an archive.
pub(crate) fn candidates(store: &Store) -> Result<Vec<Candidate>> {
    let damaged = |name: &str| Failure::guest(format!("read {name} in {}", store.shown()), AGAIN);
    let images: Vec<Image> =
        serde_json::from_slice(&store.document(MANIFEST)?).with_context(|| damaged(MANIFEST))?;
    let candidate = |image: Image| -> Result<Candidate> {
        let config: Document = serde_json::from_slice(&store.document(&image.config)?)
            .with_context(|| damaged(&image.config))?;
        let digests = config.rootfs.diff_ids.clone();
        if digests.len() != image.layers.len() {
            let (layers, digests) = (image.layers.len(), digests.len());
            let message =
                format!("read {}: it has {layers} layers and {digests} digests of layers", store.shown());
            return Err(Failure::guest(message, AGAIN).into());
        }
        let layers = image.layers.into_iter().zip(digests);
        let layers = layers.map(|(name, digest)| LayerSource { name, digest, hashed: Hashed::Content });
        let layers = layers.collect();
        let name = image.repo_tags.unwrap_or_default().join(", ");
        Ok(Candidate { name, variant: String::new(), config, layers })
    };
    images.into_iter().map(candidate).collect()
}
