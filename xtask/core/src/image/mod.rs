//! Describes the images that can be booted: the name, the architecture, the source and the expected properties. An
//! image is one of the [`catalogue`], or a file or an address that the user names. The crate `xtask-images` builds or
//! fetches images.

pub mod catalogue;
pub mod choice;
pub mod manifest;
pub mod scripts;

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::arch::VmArchitecture;
use crate::cache::Cache;
use crate::digest::{Algorithm, Digest};
use crate::os_release::OsReleaseReport;

/// The version of the method by which images are built. Raise it when the method changes, so that images of the old
/// method are not used.
const FORMAT: u32 = 2;

/// An image for one architecture.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Image {
    /// The name on the command line.
    pub name: String,
    pub arch: VmArchitecture,
    pub source: Source,
    pub format: Format,
    /// The user that ssh logs in as.
    pub login_user: String,
    /// The expected properties; `None` if the image is not in the catalogue.
    pub expected: Option<ExpectedImage>,
}

/// The properties that a catalogue entry states.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpectedImage {
    /// The expected os-release(5) values. They are compared with the values that the guest reports.
    pub os_release: OsReleaseReport,
    /// The expected version of glibc. It is compared with the version in a built image.
    pub glibc: String,
    /// The expected page size of the kernel, in bytes. It is compared with the configuration of a built image's kernel,
    /// and with the page size that the workload reports.
    pub page_size: u64,
}

/// The source of an image.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The image is built on this host from a distribution's packages. The digest is calculated after the build and
    /// stored in the manifest.
    Packages(Recipe),
    /// The image is downloaded into the cache.
    Download(DownloadSource),
    /// The image is a file of the user. It is used in place and never written to.
    File(LocalFile),
}

/// The format of a disk file, by QEMU's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the guest's disk without metadata. The aliases of both formats are for instances that an earlier
    /// version of this program has made: it wrote the names with a capital letter.
    #[serde(alias = "Raw")]
    Raw,
    /// QEMU's own format.
    #[serde(alias = "Qcow2")]
    Qcow2,
}

/// The address and the expected file of a download.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DownloadSource {
    /// An http or https address.
    pub url: String,
    /// The digest of the file; `None` with `--unverified`.
    pub digest: Option<Digest>,
    /// The size of the file in bytes, if it is known.
    pub bytes: Option<u64>,
}

/// A file and its expected digest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LocalFile {
    pub path: PathBuf,
    /// The digest of the file; `None` with `--unverified`.
    pub digest: Option<Digest>,
}

/// The recipe of an image that is built from a distribution's packages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The suite, such as `bookworm`.
    pub suite: String,
    pub layout: Layout,
    /// The packages to install in addition to the essential ones.
    #[serde(rename(deserialize = "include"))]
    pub packages: Vec<String>,
    /// The size of the disk in MiB; the file is sparse.
    pub disk_mib: u64,
}

/// The layout and the boot loader of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// The kernel and systemd-boot are on the ESP, and there is one root partition.
    SystemdBoot,
    /// GRUB is on the ESP, and `/boot` is a separate partition, as on Ubuntu's cloud images.
    Grub,
}

/// Removes secrets from a text for messages and reports. In each address in the text, the credentials, the query and
/// the fragment are removed, because a query may contain a token.
pub fn shown(text: &str) -> String {
    let Some((before, after)) = text.split_once("://") else { return text.to_owned() };
    let ends = |c: char| c.is_whitespace() || "\"'".contains(c);
    let (address, behind) = after.split_at(after.find(ends).unwrap_or(after.len()));
    let (place, query) = address.split_at(address.find(['?', '#']).unwrap_or(address.len()));
    let (host, path) = place.split_at(place.find('/').unwrap_or(place.len()));
    let host = host.rsplit('@').next().unwrap_or_default();
    let query = if query.starts_with('?') { "?…" } else { "" };
    format!("{before}://{host}{}{query}{}", shown(path), shown(behind))
}

impl Image {
    /// Returns whether the content is checked against a pinned or given digest. A built image has no such digest: its
    /// packages are signed, but its disk is made on this host.
    pub fn is_verified(&self) -> bool {
        self.pin().is_some()
    }

    /// Returns the digest that the catalogue pins or the user gives.
    pub fn pin(&self) -> Option<&Digest> {
        match &self.source {
            Source::Packages(_) => None,
            Source::Download(download) => download.digest.as_ref(),
            Source::File(file) => file.digest.as_ref(),
        }
    }

    /// Returns whether the image is built on this host from packages.
    pub fn is_built(&self) -> bool {
        matches!(self.source, Source::Packages(_))
    }

    /// Returns whether the image is in the cache. The disk is not read.
    pub fn is_cached(&self, cache: &Cache) -> bool {
        cache.images().join(self.key(scripts::SCRIPTS)).exists()
    }

    /// Returns the key of the image, which is the name of its directory in the cache. The key consists of the image's
    /// name, the architecture and a digest of everything that determines the content. For a built image, this includes
    /// `scripts`, the texts of the scripts that the build runs.
    pub fn key(&self, scripts: &[&str]) -> String {
        let mut parts = vec![FORMAT.to_string()];
        match &self.source {
            // The digest alone determines the content, whatever else the catalogue states.
            Source::Download(DownloadSource { digest: Some(digest), .. }) => parts.push(digest.to_string()),
            Source::Download(download) => parts.push(download.url.clone()),
            Source::File(file) => parts.push(file.path.display().to_string()),
            Source::Packages(recipe) => {
                parts.push(serde_json::to_string(recipe).expect("a recipe is plain data"));
                parts.push(self.login_user.clone());
                parts.extend(scripts.iter().map(|script| (*script).to_owned()));
            }
        }
        let mut hash = Algorithm::Sha256.hasher();
        for part in &parts {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        let plain: String =
            self.name.chars().filter(|c| c.is_ascii_alphanumeric() || "-._".contains(*c)).collect();
        format!("{}-{}-{}", plain.trim_start_matches('.'), self.arch, &hash.finish().hex()[..16])
    }
}
