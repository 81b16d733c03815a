//! The manifest beside an image in the cache. It describes the file, its source and, for a built image, its contents.
//! [`Contents`] is read from the file tree before the tree is packed into the image. Therefore the versions of the
//! packages are known without a boot.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{ExpectedImage, Format, Image};
use crate::arch::VmArchitecture;
use crate::digest::Digest;
use crate::os_release::{OsRelease, OsReleaseReport};

/// The contents of `manifest.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// The name of the image in the catalogue, or else the name of the user's file.
    pub name: String,
    pub arch: VmArchitecture,
    /// The format of the disk, as QEMU detected it.
    pub format: Format,
    /// The size of the guest's disk in bytes.
    pub virtual_bytes: u64,
    /// The SHA-256 digest of the file.
    pub digest: Digest,
    /// The origin of the image, for messages.
    pub source: String,
    /// True if the content was checked against a pinned or given digest. Earlier versions of this program also set this
    /// field for built images.
    pub verified: bool,
    /// The time at which the image was made, in RFC 3339, UTC.
    pub made_at: String,
    /// The metadata of the file when it was hashed. If the metadata is unchanged, the file is not hashed again.
    pub stamp: Stamp,
    /// The contents, if the image was built on this host.
    pub contents: Option<Contents>,
}

impl Manifest {
    /// Returns whether this host built the image from packages.
    pub fn is_built(&self) -> bool {
        self.contents.is_some()
    }

    /// Returns whether the content was checked against a pinned or given digest. A built image has no such digest, even
    /// if an earlier version of this program has recorded it as verified.
    pub fn is_verified(&self) -> bool {
        self.verified && !self.is_built()
    }
}

/// The metadata of a file. If the content changes, the metadata changes too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    pub bytes: u64,
    pub inode: u64,
    pub modified_seconds: i64,
    pub modified_nanoseconds: i64,
    /// The seconds and nanoseconds of the inode's last change (inode(7), ctime). No program can set this time back. The
    /// field is `None` in a stamp that an earlier version of this program has made; the file is then hashed again.
    #[serde(default)]
    pub changed: Option<(i64, i64)>,
}

impl Stamp {
    /// Returns the stamp of a file.
    ///
    /// # Errors
    /// Returns an error that names the file if it cannot be read.
    pub fn of(path: &Path) -> Result<Self> {
        let meta = fs_err::metadata(path)?;
        Ok(Self {
            bytes: meta.len(),
            inode: meta.ino(),
            modified_seconds: meta.mtime(),
            modified_nanoseconds: meta.mtime_nsec(),
            changed: Some((meta.ctime(), meta.ctime_nsec())),
        })
    }
}

/// The contents of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// The properties that the catalogue states, too.
    #[serde(flatten)]
    pub promised: ExpectedImage,
    /// The package of the kernel, with its version.
    pub kernel: String,
    /// The suites from which the image was built, with the dates of their package indexes.
    pub mirror: Vec<String>,
    /// The packages as `name version architecture`, sorted.
    pub packages: Vec<String>,
}

impl Contents {
    /// Reads the contents from the files that `assemble.sh` has written into `directory`.
    ///
    /// # Errors
    /// Returns an error that names the file or the missing value.
    pub fn read(directory: &Path) -> Result<Self> {
        let text = |name: &str| fs_err::read_to_string(directory.join(name));
        let packages = packages(&text("status")?);
        let glibc = packages.iter().find_map(|line| line.strip_prefix("libc6 "));
        let glibc = glibc.context("the tree has no package libc6")?;
        let begins_with_digit = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit());
        let is_kernel = |line: &&String| line.strip_prefix("linux-image-").is_some_and(begins_with_digit);
        let kernel = packages.iter().find(is_kernel);
        let OsRelease { id, version_id, .. } = OsRelease::parse(&text("os-release")?);
        ensure!(!id.is_empty(), "os-release has no ID");
        ensure!(!version_id.is_empty(), "os-release has no VERSION_ID");
        Ok(Self {
            promised: ExpectedImage {
                os_release: OsReleaseReport { id, version_id },
                glibc: glibc.split(['-', '+', ' ']).next().unwrap_or_default().to_owned(),
                page_size: page_size(&text("kernel-config")?)
                    .context("the kernel's configuration has no page size")?,
            },
            kernel: kernel.context("the tree has no kernel's package")?.clone(),
            mirror: mirror(&text("mirror")?),
            packages,
        })
    }

    /// Checks that the contents have the properties that the catalogue states.
    ///
    /// # Errors
    /// If they differ, returns an error with the found and the expected properties.
    pub fn check(&self, image: &Image) -> Result<()> {
        let Some(expected) = &image.expected else { return Ok(()) };
        let found = &self.promised;
        ensure!(
            found == expected,
            "the built image {} has {found:?}, but the catalogue says {expected:?}; correct xtask/core/images.toml",
            image.name
        );
        Ok(())
    }
}

/// Returns the installed packages from the text of dpkg's status file (dpkg(1)).
fn packages(status: &str) -> Vec<String> {
    let mut found: Vec<_> = status
        .split("\n\n")
        .filter(|paragraph| paragraph.lines().any(|line| line == "Status: install ok installed"))
        .filter_map(|paragraph| {
            let of =
                |name: &str| paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            Some(format!("{} {} {}", of("Package")?, of("Version")?, of("Architecture")?))
        })
        .collect();
    found.sort();
    found
}

/// Returns the page size from the kernel's configuration. Kernels before Linux 6.9 have no `CONFIG_PAGE_SHIFT`; for
/// these, the options of the architecture decide. The pages of x86-64 always have 4 KiB.
fn page_size(config: &str) -> Option<u64> {
    let set = |name: &str| config.lines().any(|line| line.strip_prefix(name) == Some("=y"));
    let shift = config.lines().find_map(|line| line.strip_prefix("CONFIG_PAGE_SHIFT=")?.parse::<u32>().ok());
    shift.map(|shift| 1 << shift).or_else(|| {
        let known = [
            ("CONFIG_X86_64", 4096),
            ("CONFIG_ARM64_4K_PAGES", 4096),
            ("CONFIG_ARM64_16K_PAGES", 16384),
            ("CONFIG_ARM64_64K_PAGES", 65536),
        ];
        known.into_iter().find(|(name, _)| set(name)).map(|(_, bytes)| bytes)
    })
}

/// Returns the codename and the date of each Release file (the signed index of a suite). `text` has the lines `Suite`,
/// `Codename` and `Date` of each of these files.
fn mirror(text: &str) -> Vec<String> {
    let of = |name: &'static str| text.lines().filter_map(move |line| line.strip_prefix(name));
    of("Codename: ").zip(of("Date: ")).map(|(codename, date)| format!("{codename}, {date}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        put(
            "status",
            "Package: libc6\nStatus: install ok installed\nArchitecture: arm64\nVersion: 2.36-9+deb12u14\n\n\
             Package: gone\nStatus: deinstall ok config-files\nArchitecture: arm64\nVersion: 1\n\n\
             Package: linux-image-cloud-arm64\nStatus: install ok installed\nArchitecture: arm64\nVersion: 6.1.1\n\n\
             Package: linux-image-6.1.0-56-cloud-arm64\nStatus: install ok installed\nArchitecture: arm64\nVersion: 6.1.192-2\n",
        );
        put("os-release", "PRETTY_NAME=\"Debian\"\nVERSION_ID=\"12\"\nID=debian\n");
        put("kernel-config", "# CONFIG_ARM64_64K_PAGES is not set\nCONFIG_ARM64_4K_PAGES=y\n");
        put("mirror", "Suite: oldstable\nCodename: bookworm\nDate: Sat, 11 Jul 2026 09:00:00 UTC\n");
        directory
    }

    #[test]
    fn the_contents_are_read_out_of_the_tree() {
        let contents = Contents::read(tree().path()).unwrap();
        assert_eq!(contents.promised.glibc, "2.36");
        assert_eq!(contents.promised.page_size, 4096);
        assert_eq!(contents.kernel, "linux-image-6.1.0-56-cloud-arm64 6.1.192-2 arm64");
        assert_eq!(contents.packages.len(), 3);
        assert_eq!(contents.mirror, ["bookworm, Sat, 11 Jul 2026 09:00:00 UTC"]);
        assert_eq!(page_size("CONFIG_PAGE_SHIFT=14\n"), Some(16384));
        assert_eq!(page_size("CONFIG_RISCV=y\n"), None);
    }

    #[test]
    fn an_image_that_is_not_what_the_catalogue_says_is_refused() {
        let catalogue = super::super::catalogue::Catalogue::built_in();
        let mut contents = Contents::read(tree().path()).unwrap();
        let image = catalogue.find("debian-12", VmArchitecture::Aarch64).unwrap();
        contents.check(&image).unwrap();
        contents.promised.page_size = 65536;
        let error = contents.check(&image).unwrap_err().to_string();
        assert!(error.contains("65536") && error.contains("images.toml"), "{error}");
    }
}
