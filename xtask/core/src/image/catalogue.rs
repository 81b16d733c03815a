//! The catalogue of images that have a name. It is read from `images.toml`, which documents its schema.

use std::path::PathBuf;

use serde::Deserialize;

use super::{DownloadSource, ExpectedImage, Format, Image, Layout, Recipe, Source};
use crate::arch::VmArchitecture;
use crate::digest::Digest;
use crate::error::Failure;
use crate::os_release::OsReleaseReport;

/// The text of the catalogue when this program was compiled.
const TEXT: &str = include_str!("../../images.toml");

/// The schema number that this code can read.
const SCHEMA: u32 = 1;

/// The named images.
#[derive(Debug)]
pub struct Catalogue {
    /// The image of a run without `--image`.
    pub default: String,
    /// The image that is tested if the host of the default image cannot be reached.
    pub fallback: String,
    /// The images in the order of the file. Each image is in the list once for each architecture.
    images: Vec<Image>,
}

/// The contents of `images.toml`. `image bump` reads the file of the workspace, which may differ from the built-in
/// text.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogueFile {
    schema: u32,
    default: String,
    fallback: String,
    pub image: Vec<ImageEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageEntry {
    pub name: String,
    login_user: String,
    os_release: OsReleaseReport,
    glibc: String,
    page_size: u64,
    pub download: Option<DownloadTable>,
    packages: Option<Recipe>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DownloadTable {
    format: Format,
    /// The address of the page that lists the dated releases.
    pub index: String,
    /// The name of a release's directory on that page, with one placeholder `{date}`.
    pub release: String,
    /// The name of the file with the digests, in the release's directory.
    pub sums: String,
    /// The name of the file with the detached signature of the digests; `None` if the publisher does not sign them.
    pub signature: Option<String>,
    /// The file with the publisher's public keys. A relative path starts at the catalogue's directory.
    pub keyring: Option<PathBuf>,
    x86_64: Option<CataloguePin>,
    aarch64: Option<CataloguePin>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CataloguePin {
    pub url: String,
    pub digest: Digest,
    pub bytes: Option<u64>,
}

impl Catalogue {
    /// Returns the catalogue that was compiled into this program.
    pub fn built_in() -> Self {
        Self::parse(TEXT).expect("a test parses the catalogue that is built in")
    }

    fn parse(text: &str) -> Result<Self, String> {
        let file = CatalogueFile::parse(text)?;
        let images = file.image.iter().flat_map(|entry| VmArchitecture::ALL.map(|arch| entry.image(arch)));
        Ok(Self { images: images.collect::<Result<_, _>>()?, default: file.default, fallback: file.fallback })
    }

    /// Returns the names of all images, in the order of the catalogue.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let once = self.images.iter().step_by(VmArchitecture::ALL.len());
        once.map(|image| image.name.as_str())
    }

    /// Returns the image `name` for `arch`.
    ///
    /// # Errors
    /// Returns a usage error that lists the existing names.
    pub fn find(&self, name: &str, arch: VmArchitecture) -> Result<Image, Failure> {
        let image = self.images.iter().find(|image| image.name == name && image.arch == arch);
        image.cloned().ok_or_else(|| {
            let names: Vec<_> = self.names().collect();
            Failure::usage(format!("--image {name}: no such image; there are: {}", names.join(", ")))
        })
    }
}

impl CatalogueFile {
    /// Parses the text of a catalogue file.
    ///
    /// # Errors
    /// Returns a message that names the place at which the text violates the schema.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        if file.schema != SCHEMA {
            return Err(format!("unknown schema {}, expected {SCHEMA}", file.schema));
        }
        Ok(file)
    }
}

impl ImageEntry {
    fn image(&self, arch: VmArchitecture) -> Result<Image, String> {
        let source = match (&self.download, &self.packages) {
            (Some(download), None) => {
                let pin =
                    download.pin(arch).ok_or_else(|| format!("{} has no file for {arch}", self.name))?;
                Source::Download(DownloadSource {
                    url: pin.url.clone(),
                    digest: Some(pin.digest.clone()),
                    bytes: pin.bytes,
                })
            }
            (None, Some(packages)) => Source::Packages(packages.for_arch(arch)),
            _ => return Err(format!("{} needs either download or packages", self.name)),
        };
        Ok(Image {
            name: self.name.clone(),
            arch,
            format: self.download.as_ref().map_or(Format::Qcow2, |download| download.format),
            source,
            login_user: self.login_user.clone(),
            expected: Some(ExpectedImage {
                os_release: self.os_release.clone(),
                glibc: self.glibc.clone(),
                page_size: self.page_size,
            }),
        })
    }
}

impl DownloadTable {
    /// Returns the file that is pinned for `arch`.
    pub fn pin(&self, arch: VmArchitecture) -> Option<&CataloguePin> {
        arch.pick(&self.x86_64, &self.aarch64).as_ref()
    }
}

impl Recipe {
    /// Returns the recipe with the additional packages whose names contain the architecture: the kernel, and GRUB if
    /// the layout has it.
    fn for_arch(&self, arch: VmArchitecture) -> Self {
        let debian_arch = arch.profile().debian_arch;
        let mut recipe = self.clone();
        recipe.packages.push(format!("linux-image-cloud-{debian_arch}"));
        if recipe.layout == Layout::Grub {
            recipe.packages.push(format!("grub-efi-{debian_arch}-signed"));
        }
        recipe
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_that_is_built_in_is_sound() {
        let catalogue = Catalogue::parse(TEXT).unwrap();
        for image in &catalogue.images {
            let arch = image.arch;
            if let Source::Download(download) = &image.source {
                assert!(download.url.starts_with("https://"), "{}", download.url);
                assert!(download.url.contains(arch.profile().debian_arch), "{}", download.url);
                assert!(
                    download.url.contains("/release-20") || download.url.contains("/20"),
                    "a dated directory"
                );
                assert!(download.digest.is_some());
            }
        }
        let fallback = catalogue.find(&catalogue.fallback, VmArchitecture::Aarch64).unwrap();
        assert!(matches!(fallback.source, Source::Packages(_)), "the fallback needs no host of its own");
        catalogue.find(&catalogue.default, VmArchitecture::Aarch64).unwrap();
        let names: std::collections::BTreeSet<_> = catalogue.names().collect();
        assert_eq!(names.len() * 2, catalogue.images.len(), "a name occurs twice");
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = Catalogue::built_in().find("ubuntu-95", VmArchitecture::X86_64).unwrap_err().to_string();
        assert!(error.starts_with("--image ubuntu-95: no such image; there are: ubuntu-24.04, "), "{error}");
    }

    #[test]
    fn a_misspelt_key_or_a_wrong_digest_is_an_error() {
        for (wrong, right) in
            [("glib = ", "glibc = "), ("sha256:zz", "sha256:ff"), ("schema = 2", "schema = 1")]
        {
            assert!(Catalogue::parse(&TEXT.replacen(right, wrong, 1)).is_err(), "{wrong}");
        }
    }
}
