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
    /// The images in the order of the file. Each image is in the list once for each of its architectures.
    pub images: Vec<Image>,
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
    /// The kernel's packages; `None` for Debian's cloud kernel, which every architecture has.
    kernel: Option<KernelTable>,
    pub download: Option<DownloadTable>,
    packages: Option<Recipe>,
}

/// The kernel's package for each architecture. The image exists only for the architectures with an entry.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KernelTable {
    x86_64: Option<String>,
    aarch64: Option<String>,
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
        if let Some(entry) =
            file.image.iter().find(|entry| entry.kernel.as_ref().is_some_and(|kernel| !kernel.is_of(entry)))
        {
            return Err(format!(
                "{}: kernel needs [image.packages], and a package for at least one architecture",
                entry.name
            ));
        }
        let pairs = file.image.iter().flat_map(|entry| VmArchitecture::ALL.map(|arch| (entry, arch)));
        let images = pairs.filter(|(entry, arch)| entry.exists(*arch)).map(|(entry, arch)| entry.image(arch));
        Ok(Self { images: images.collect::<Result<_, _>>()?, default: file.default, fallback: file.fallback })
    }

    /// Returns the names of all images, in the order of the catalogue.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        // The architectures of an image are neighbours.
        self.images.chunk_by(|one, other| one.name == other.name).map(|images| images[0].name.as_str())
    }

    /// Returns the image `name` for `arch`.
    ///
    /// # Errors
    /// Returns a usage error that lists the existing names, or the architectures of the image if it does not exist for
    /// `arch`.
    pub fn find(&self, name: &str, arch: VmArchitecture) -> Result<Image, Failure> {
        let image = self.images.iter().find(|image| image.name == name && image.arch == arch);
        image.cloned().ok_or_else(|| {
            let others: Vec<_> = self.images.iter().filter(|image| image.name == name).collect();
            if let [other] = others.as_slice() {
                return Failure::usage(format!(
                    "--image {name}: this image exists only for {}; use --arch {} or another image",
                    other.arch, other.arch
                ));
            }
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
    /// Returns whether the image exists for `arch`.
    fn exists(&self, arch: VmArchitecture) -> bool {
        self.kernel.as_ref().is_none_or(|kernel| kernel.of(arch).is_some())
    }

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
            (None, Some(packages)) => {
                let kernel = self.kernel.as_ref().and_then(|kernel| kernel.of(arch));
                Source::Packages(packages.for_arch(arch, kernel))
            }
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

impl KernelTable {
    /// Returns whether the entry can have this kernel.
    fn is_of(&self, entry: &ImageEntry) -> bool {
        entry.packages.is_some() && VmArchitecture::ALL.iter().any(|arch| self.of(*arch).is_some())
    }

    fn of(&self, arch: VmArchitecture) -> Option<&str> {
        arch.pick(&self.x86_64, &self.aarch64).as_deref()
    }
}

impl DownloadTable {
    /// Returns the file that is pinned for `arch`.
    pub fn pin(&self, arch: VmArchitecture) -> Option<&CataloguePin> {
        arch.pick(&self.x86_64, &self.aarch64).as_ref()
    }
}

impl Recipe {
    /// Returns the recipe with the additional packages whose names contain the architecture: the kernel, which is the
    /// cloud kernel if `kernel` is `None`, and GRUB if the layout has it.
    fn for_arch(&self, arch: VmArchitecture, kernel: Option<&str>) -> Self {
        let debian_arch = arch.profile().debian_arch;
        let mut recipe = self.clone();
        recipe
            .packages
            .push(kernel.map_or_else(|| format!("linux-image-cloud-{debian_arch}"), str::to_owned));
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
        for arch in VmArchitecture::ALL {
            let fallback = catalogue.find(&catalogue.fallback, arch).unwrap();
            assert!(matches!(fallback.source, Source::Packages(_)), "the fallback needs no host of its own");
            catalogue.find(&catalogue.default, arch).unwrap();
        }
        let names: std::collections::BTreeSet<_> = catalogue.names().collect();
        let of_each_arch = VmArchitecture::ALL
            .map(|arch| names.iter().filter(|name| catalogue.find(name, arch).is_ok()).count());
        assert_eq!(of_each_arch.iter().sum::<usize>(), catalogue.images.len(), "a name occurs twice");
    }

    #[test]
    fn an_image_with_a_kernel_of_one_architecture_exists_only_for_it() {
        let catalogue = Catalogue::built_in();
        let image = catalogue.find("debian-13-16k", VmArchitecture::Aarch64).unwrap();
        let Source::Packages(recipe) = image.source else { panic!("it is built from packages") };
        let kernels: Vec<_> = recipe.packages.iter().filter(|name| name.starts_with("linux-image")).collect();
        assert_eq!(kernels, ["linux-image-arm64-16k"]);
        let error = catalogue.find("debian-13-16k", VmArchitecture::X86_64).unwrap_err().to_string();
        assert_eq!(
            error,
            "--image debian-13-16k: this image exists only for aarch64; use --arch aarch64 or another image"
        );
        assert_eq!(catalogue.names().filter(|name| name.starts_with("debian-13")).count(), 2);
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = Catalogue::built_in().find("ubuntu-95", VmArchitecture::X86_64).unwrap_err().to_string();
        assert!(error.starts_with("--image ubuntu-95: no such image; there are: ubuntu-24.04, "), "{error}");
    }

    #[test]
    fn a_kernel_for_no_architecture_or_of_a_download_is_an_error() {
        let kernel = "kernel = { aarch64 = \"linux-image-arm64-16k\" }";
        for text in [
            TEXT.replace(kernel, "kernel = {}"),
            TEXT.replacen("glibc = ", &format!("{kernel}\nglibc = "), 1),
        ] {
            assert!(Catalogue::parse(&text).unwrap_err().contains("kernel needs"));
        }
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
