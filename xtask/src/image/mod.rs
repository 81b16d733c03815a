//! What can be booted: an image is a name, an architecture, a source and what is expected of it. [`catalogue`] has those
//! with a name; a file or an address may be given instead. `xtask-vm`'s `image` module makes or fetches what is named here.

pub mod catalogue;
pub mod inventory;
pub mod manifest;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::agent_build::hex;
use crate::arch::VmArchitecture;
use crate::cli::ImageArgs;
use crate::digest::Digest;
use crate::exit::Usage;
use crate::report::OsReleaseReport;
use catalogue::Catalogue;

/// Raised when the way an image is made changes, so that images made the old way are not taken for new ones.
const FORMAT: u32 = 2;

/// An image that somebody brought is entered as this user, which cloud-init makes.
const OWN_LOGIN_USER: &str = "tester";

/// One image, for one architecture.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Image {
    /// Its name on the command line.
    pub name: String,
    /// Its architecture.
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
#[derive(Debug, Clone, PartialEq, Serialize)]
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

/// A disk file's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Nothing but the guest's bytes.
    Raw,
    /// QEMU's own.
    Qcow2,
}

impl Format {
    /// As QEMU calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
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
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    /// The suite: `bookworm`.
    pub suite: String,
    /// How the disk is laid out and boots.
    pub layout: Layout,
    /// The packages beyond the essential ones.
    pub packages: Vec<String>,
    /// The disk's size, in MiB; the file is sparse.
    pub disk_mib: u64,
}

/// How a disk is laid out and boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Kernel and systemd-boot on the ESP, one root partition.
    SystemdBoot,
    /// GRUB on the ESP, `/boot` on a partition of its own, as Ubuntu's cloud images have it.
    Grub,
}

impl Layout {
    /// As the catalogue writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::SystemdBoot => "systemd-boot",
            Self::Grub => "grub",
        }
    }
}

/// The image of a run, and its fallback image.
#[derive(Debug, Clone)]
pub struct Choice {
    /// What is to be tested.
    pub image: Image,
    /// What is tested where the host of `image` cannot be reached. Never for an image that was asked for.
    pub fallback: Option<Image>,
}

impl Choice {
    /// From the command line.
    ///
    /// # Errors
    /// [`Usage`] for a name that does not exist, a file that is not there, and an image without a digest that nobody
    /// called unverified.
    pub fn from_args(args: &ImageArgs, arch: VmArchitecture) -> Result<Self, Usage> {
        let catalogue = Catalogue::built_in();
        let Some(wanted) = &args.image else {
            if args.image_digest.is_some() || args.unverified {
                return Err(Usage(
                    "--image-digest and --unverified need --image FILE or --image URL".to_owned(),
                ));
            }
            let fallback =
                (!args.strict_image).then(|| catalogue.find(&catalogue.fallback, arch)).transpose()?;
            return Ok(Self { image: catalogue.find(&catalogue.default, arch)?, fallback });
        };
        let image = match own_source(wanted, args)? {
            Some(source) => own_image(wanted, source, arch),
            None => {
                if args.image_digest.is_some() || args.unverified {
                    return Err(Usage(format!(
                        "--image {wanted}: the catalogue pins its digest; --image-digest and --unverified are about a \
                         file or an address (for a file in this directory write ./{wanted})"
                    )));
                }
                catalogue.find(wanted, arch)?
            }
        };
        Ok(Self { image, fallback: None })
    }
}

/// A file or an address; `None` for a name.
fn own_source(wanted: &str, args: &ImageArgs) -> Result<Option<Source>, Usage> {
    let is_address = wanted.contains("://");
    if !is_address && !wanted.contains('/') {
        return Ok(None);
    }
    let wanted_shown = shown(wanted);
    let digest = args.image_digest.clone();
    match (&digest, args.unverified) {
        (None, false) => {
            return Err(Usage(format!(
                "--image {wanted_shown}: give its digest with --image-digest sha256:…, or accept any content with --unverified"
            )));
        }
        (Some(_), true) => {
            return Err(Usage("--image-digest and --unverified exclude each other".to_owned()));
        }
        _ => {}
    }
    if is_address {
        let scheme = wanted.split("://").next().unwrap_or_default();
        match (scheme, &digest) {
            ("https", _) | ("http", Some(_)) => {}
            ("http", None) => {
                return Err(Usage(format!(
                    "--image {wanted_shown}: plain http does not protect it against changes: give its digest, or an \
                     https address"
                )));
            }
            _ => {
                return Err(Usage(format!(
                    "--image {wanted_shown}: an address begins with https:// or http://"
                )));
            }
        }
        return Ok(Some(Source::Download(DownloadSource { url: wanted.to_owned(), digest, bytes: None })));
    }
    let path =
        Path::new(wanted).canonicalize().map_err(|error| Usage(format!("--image {wanted}: {error}")))?;
    if !path.is_file() {
        return Err(Usage(format!("--image {wanted}: not a file")));
    }
    Ok(Some(Source::File(LocalFile { path, digest })))
}

/// What `--image` said, for messages and reports: an address without what may be a password or a token.
pub fn shown(wanted: &str) -> String {
    let Some((scheme, rest)) = wanted.split_once("://") else { return wanted.to_owned() };
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}{path}")
}

/// The format is what its name says, or qcow2; the file itself is looked at before it is booted.
fn own_image(wanted: &str, source: Source, arch: VmArchitecture) -> Image {
    let raw = wanted.ends_with(".raw");
    let plain = shown(wanted);
    let name = plain.rsplit('/').next().unwrap_or(&plain).to_owned();
    let format = if raw { Format::Raw } else { Format::Qcow2 };
    Image { name, arch, source, format, login_user: OWN_LOGIN_USER.to_owned(), expected: None }
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
        let mut hash = Sha256::new();
        for part in &parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        let plain: String =
            self.name.chars().filter(|c| c.is_ascii_alphanumeric() || "-._".contains(*c)).collect();
        format!("{}-{}-{}", plain.trim_start_matches('.'), self.arch, &hex(&hash.finalize())[..16])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    const ARM: VmArchitecture = VmArchitecture::Aarch64;

    fn choose(words: &[&str]) -> Result<Choice, Usage> {
        let line = ["xtask", "smoke"].iter().chain(words);
        let crate::cli::Command::Smoke(args) = crate::cli::Cli::parse_from(line).command else {
            panic!("smoke")
        };
        Choice::from_args(&args.machine.image, ARM)
    }

    #[test]
    fn the_key_follows_every_input() {
        let find = |arch| Catalogue::built_in().find("debian-12", arch).unwrap();
        let (arm, x86) = (find(ARM), find(VmArchitecture::X86_64));
        let key = arm.key(&["a", "b"]);
        assert_eq!(key, arm.key(&["a", "b"]));
        assert!(key.starts_with("debian-12-aarch64-"));
        for other in [arm.key(&["ab", ""]), arm.key(&["a", "c"]), x86.key(&["a", "b"])] {
            assert_ne!(key, other);
        }
    }

    #[test]
    fn only_the_default_may_be_replaced() {
        let default = choose(&[]).unwrap();
        assert_eq!(
            (default.image.name.as_str(), default.fallback.unwrap().name.as_str()),
            ("ubuntu-24.04", "debian-12")
        );
        assert!(choose(&["--strict-image"]).unwrap().fallback.is_none());
        assert!(choose(&["--image", "ubuntu-24.04"]).unwrap().fallback.is_none());
    }

    #[test]
    fn an_image_of_ones_own_needs_a_digest_or_a_word() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("d.qcow2");
        std::fs::write(&file, "").unwrap();
        let file = file.to_str().unwrap();
        assert!(choose(&["--image", file]).unwrap_err().0.contains("--unverified"));
        assert!(!choose(&["--image", file, "--unverified"]).unwrap().image.is_verified());
        let own = choose(&["--image", file, "--image-digest", &digest]).unwrap().image;
        assert!(own.is_verified() && own.name == "d.qcow2" && own.expected.is_none());
        let table: &[(&[&str], &str)] = &[
            (&["--image", "./not-there.qcow2", "--unverified"], "No such file"),
            (&["--image", "/", "--unverified"], "not a file"),
            (&["--image", "ftp://x/y", "--image-digest", &digest], "https://"),
            (&["--image", "http://x/y", "--unverified"], "plain http"),
            (&["--image", "https://x/y"], "--unverified"),
            (&["--image", "debian-12", "--unverified"], "pins its digest"),
            (&["--image", file, "--unverified", "--image-digest", &digest], "exclude"),
            (&["--unverified"], "--image FILE"),
        ];
        for (words, message) in table {
            let error = choose(words).unwrap_err().0;
            assert!(error.contains(message), "{words:?}: {error}");
        }
    }

    #[test]
    fn an_address_is_shown_without_its_secrets() {
        for (wanted, message) in [
            ("https://u:p@host/a/b.img?token=x#y", "https://host/a/b.img"),
            ("https://host", "https://host"),
            ("./a@b?c.qcow2", "./a@b?c.qcow2"),
        ] {
            assert_eq!(shown(wanted), message);
        }
        let error = choose(&["--image", "https://u:secret@host/x"]).unwrap_err().0;
        assert!(!error.contains("secret"), "{error}");
        let digest = format!("sha256:{}", "0".repeat(64));
        let image =
            choose(&["--image", "https://h/x.img?token=secret", "--image-digest", &digest]).unwrap().image;
        assert_eq!(image.name, "x.img");
    }

    #[test]
    fn the_digest_decides_where_a_download_is_kept() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let key = |url: &str| choose(&["--image", url, "--image-digest", &digest]).unwrap().image.key(&[]);
        assert_eq!(key("https://a/x.img"), key("https://b/x.img"));
        assert!(
            key("https://a/..%2f").starts_with("2f-aarch64") || key("https://a/..%2f").starts_with("%2f")
        );
    }
}
