//! What stands beside an image in the cache: which file it is, where it came from, and what is in it. [`Contents`] is read
//! out of the tree that was packed, so that whoever asks for a library's version need not boot.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{ExpectedImage, Format, Image};
use crate::arch::VmArchitecture;
use crate::digest::Digest;
use crate::os_release::{OsRelease, OsReleaseReport};

/// `manifest.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// The image's name in the catalogue, or its file's.
    pub name: String,
    pub arch: VmArchitecture,
    /// The disk's format, as QEMU found it.
    pub format: Format,
    /// The size of the guest's disk.
    pub virtual_bytes: u64,
    /// SHA-256 of the file.
    pub digest: Digest,
    /// Where it came from.
    pub source: String,
    /// Whether its content was checked against a digest that somebody vouches for.
    pub verified: bool,
    /// When it was made, RFC 3339, UTC.
    pub made_at: String,
    /// Spares hashing a file that nobody touched.
    pub stamp: Stamp,
    /// What is in it, where this host made it.
    pub contents: Option<Contents>,
}

/// What changes when a file does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    pub bytes: u64,
    pub inode: u64,
    pub modified_seconds: i64,
    pub modified_nanoseconds: i64,
}

impl Stamp {
    /// The file's.
    ///
    /// # Errors
    /// Names the file.
    pub fn of(path: &Path) -> Result<Self> {
        let meta = fs_err::metadata(path)?;
        Ok(Self {
            bytes: meta.len(),
            inode: meta.ino(),
            modified_seconds: meta.mtime(),
            modified_nanoseconds: meta.mtime_nsec(),
        })
    }
}

/// What is in an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// What the catalogue promises of an image.
    #[serde(flatten)]
    pub promised: ExpectedImage,
    /// The kernel's package and version.
    pub kernel: String,
    /// The suites that it was built from, with the dates of their indices.
    pub mirror: Vec<String>,
    /// `name version architecture` of every package, sorted.
    pub packages: Vec<String>,
}

impl Contents {
    /// Reads what `assemble.sh` left in `directory`.
    ///
    /// # Errors
    /// Names the file that does not say what it should.
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

    /// Nothing where it is what the catalogue promises.
    ///
    /// # Errors
    /// Names what differs.
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

/// dpkg's status file (dpkg(1)): every package that is installed.
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

/// From the kernel's configuration; `CONFIG_PAGE_SHIFT` is there since 6.9, x86-64 has 4 KiB alone.
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

/// `Suite`, `Codename` and `Date` of each Release file, a line each.
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
