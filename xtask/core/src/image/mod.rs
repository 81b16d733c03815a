//! What can be booted: an image is a name, an architecture, a source and what is expected of it. [`catalogue`] has those
//! with a name; a file or an address may be given instead. The crate `xtask-images` makes or fetches what is named here.

pub mod catalogue;
pub mod choice;
pub mod manifest;

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::arch::VmArchitecture;
use crate::digest::{Algorithm, Digest};
use crate::os_release::OsReleaseReport;

/// Raised when the way an image is made changes, so that images made the old way are not taken for new ones.
const FORMAT: u32 = 2;

/// One image, for one architecture.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Image {
    /// Its name on the command line.
    pub name: String,
    pub arch: VmArchitecture,
    /// Where it comes from.
    pub source: Source,
    /// The disk's format.
    pub format: Format,
    /// Whom ssh enters as.
    pub login_user: String,
    /// What it must be; `None` where nobody said.
    pub expected: Option<ExpectedImage>,
}

/// What a catalogue entry promises.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpectedImage {
    /// os-release(5); the guest's own word is checked against it.
    pub os_release: OsReleaseReport,
    /// The version of glibc; a built image's is checked against it.
    pub glibc: String,
    /// The kernel's page size in bytes; a built image's is checked against it.
    pub page_size: u64,
}

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Built on this host from a distribution's packages. Its digest is taken when it is built, and kept beside it.
    Packages(Recipe),
    /// Fetched, and kept in the cache.
    Download(DownloadSource),
    /// A file of the user's, booted where it is; never written to.
    File(LocalFile),
}

/// A disk file's format; its names are QEMU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Nothing but the guest's bytes. The alias is in the records of machines kept by earlier versions, as below.
    #[serde(alias = "Raw")]
    Raw,
    /// QEMU's own.
    #[serde(alias = "Qcow2")]
    Qcow2,
}

/// An address, and what must come from it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DownloadSource {
    /// http or https.
    pub url: String,
    /// `None`: `--unverified`.
    pub digest: Option<Digest>,
    /// The file's size, where it is known.
    pub bytes: Option<u64>,
}

/// A file, and what it must be.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LocalFile {
    /// Where it is.
    pub path: PathBuf,
    /// `None`: `--unverified`.
    pub digest: Option<Digest>,
}

/// A distribution to be built from its packages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The suite: `bookworm`.
    pub suite: String,
    /// How the disk is laid out and boots.
    pub layout: Layout,
    /// The packages beyond the essential ones.
    #[serde(rename(deserialize = "include"))]
    pub packages: Vec<String>,
    /// The disk's size, in MiB; the file is sparse.
    pub disk_mib: u64,
}

/// How a disk is laid out and boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Kernel and systemd-boot on the ESP, one root partition.
    SystemdBoot,
    /// GRUB on the ESP, `/boot` on a partition of its own, as Ubuntu's cloud images have it.
    Grub,
}

/// A text for messages and reports: each address in it without credentials, and without a query or a fragment, which may hold a
/// token.
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
    /// Whether somebody vouches for its content.
    pub fn is_verified(&self) -> bool {
        match &self.source {
            Source::Packages(_) => true,
            Source::Download(download) => download.digest.is_some(),
            Source::File(file) => file.digest.is_some(),
        }
    }

    /// The name of its directory in the cache: a digest over everything that decides what it contains, among that
    /// `scripts`, the texts that a build runs.
    pub fn key(&self, scripts: &[&str]) -> String {
        let mut parts = vec![FORMAT.to_string()];
        match &self.source {
            // Whatever else the catalogue says about it, the digest is the content.
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
