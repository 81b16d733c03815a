//! Recognises archives by their content, never by their names.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use anyhow::Result;
use tar::{Archive, EntryType, Header};

use crate::meter::{Decoded, Limits, Meter};
use crate::slice::Slice;
use crate::store::plain_name;
use crate::stream::{Compression, decoder, limited};
use crate::tarball::BLOCK;
use crate::{deb, docker, oci, zipped};

/// The kinds of archives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A tar archive, plain or compressed with gzip, zstd, xz or bzip2.
    Tar,
    /// A zip archive, such as an Android package.
    Zip,
    /// A package of Python.
    Wheel,
    /// A package of Debian.
    Deb,
    /// A package of Alpine Linux.
    Apk,
    /// A container image in the format of `docker save`: `manifest.json` in a tar archive.
    DockerArchive,
    /// A container image in the format of the Open Container Initiative, in a tar archive. `docker save` of docker 25
    /// and later writes this format too.
    OciArchive,
    /// A directory with a container image in the format of the Open Container Initiative.
    OciLayout,
    /// A file system of squashfs, as in snaps and AppImages. It is recognised but cannot be unpacked.
    Squashfs,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tar => "tar archive",
            Self::Zip => "zip archive",
            Self::Wheel => "wheel",
            Self::Deb => "Debian package",
            Self::Apk => "Alpine package",
            Self::DockerArchive => "docker image archive",
            Self::OciArchive => "OCI image archive",
            Self::OciLayout => "OCI image layout",
            Self::Squashfs => "squashfs file system",
        })
    }
}

impl Kind {
    /// Returns the kind of the archive at a path. Returns `None` if the path has no archive of a known kind. A
    /// directory counts only if it is an OCI layout, and a compressed file only if it contains a tar archive.
    ///
    /// # Errors
    /// Returns an error that names the path if it cannot be read, or if it begins like an archive but is damaged.
    pub fn of(path: &Path) -> Result<Option<Self>> {
        if fs_err::metadata(path)?.is_dir() {
            let is_layout = path.join(oci::LAYOUT).is_file() && path.join(oci::INDEX).is_file();
            return Ok(is_layout.then_some(Self::OciLayout));
        }
        let slice = Slice::open(path)?;
        let meter = Meter::new(path, slice.len(), Limits::default());
        let broken = |error| meter.broken(None, error);
        let magic = slice.beginning(8).map_err(broken)?;
        Ok(match magic.as_slice() {
            deb::MAGIC => deb::is_package(&slice).map_err(broken)?.then_some(Self::Deb),
            [b'h', b's', b'q', b's', ..] => Some(Self::Squashfs),
            // An empty zip archive has only the record of its end (PK 5 6).
            [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => {
                Some(if zipped::is_wheel(&slice).map_err(broken)? { Self::Wheel } else { Self::Zip })
            }
            _ if !is_tar(&slice).map_err(broken)? => None,
            _ => Some(kind_of_tar(&slice, &meter)?),
        })
    }

    /// Returns whether an archive of this kind is a container image.
    pub fn is_image(self) -> bool {
        matches!(self, Self::DockerArchive | Self::OciArchive | Self::OciLayout)
    }
}

/// The bytes of a record, in which tar writes an archive by default.
const RECORD: u64 = 20 * BLOCK;

/// Returns whether the decompressed content begins with a header of tar, by its check sum. Old archives have no magic
/// number.
fn is_tar(slice: &Slice) -> io::Result<bool> {
    let mut block = Vec::new();
    decoder(slice, slice.clone())?.take(BLOCK).read_to_end(&mut block)?;
    if block.len() as u64 != BLOCK {
        return Ok(false);
    }
    if block.iter().all(|byte| *byte == 0) {
        return is_empty_tar(slice);
    }
    let recorded = Header::from_byte_slice(&block).cksum();
    // The field of the sum counts as eight spaces.
    let sum: u32 = block
        .iter()
        .enumerate()
        .map(|(at, byte)| u32::from(if (148..156).contains(&at) { b' ' } else { *byte }))
        .sum();
    Ok(recorded.is_ok_and(|recorded| recorded == sum))
}

/// Returns whether the decompressed content has only the zeros that end a tar archive: the two blocks, or a record with
/// them (pax(1)).
fn is_empty_tar(slice: &Slice) -> io::Result<bool> {
    let mut content = Vec::new();
    decoder(slice, slice.clone())?.take(RECORD + 1).read_to_end(&mut content)?;
    Ok([2 * BLOCK, RECORD].contains(&(content.len() as u64)) && content.iter().all(|byte| *byte == 0))
}

/// Returns the kind of a tar archive by the names of its entries.
fn kind_of_tar(slice: &Slice, meter: &Meter) -> Result<Kind> {
    let compression = Compression::of(slice)?;
    if compression == Compression::None {
        let mut archive = Archive::new(Decoded { inner: slice.clone(), meter });
        return scan(archive.entries_with_seek()?, compression, meter);
    }
    let stream = limited(slice, meter).map_err(|error| meter.broken(None, error))?;
    scan(Archive::new(stream).entries()?, compression, meter)
}

/// Reads the headers, up to the entry that shows the kind. A compressed archive is decompressed no further than to the
/// first entry that no image contains.
fn scan<R: Read>(entries: tar::Entries<'_, R>, compression: Compression, meter: &Meter) -> Result<Kind> {
    let (mut has_layout, mut has_index, mut has_manifest) = (false, false, false);
    let mut last: Option<String> = None;
    meter.only_headers(true);
    for entry in entries {
        meter.only_headers(false);
        let broken = |error| meter.broken(last.as_deref().map(str::as_bytes), error);
        let mut entry = entry.map_err(broken)?;
        let name = plain_name(&entry.path_bytes());
        let is_package = name == ".PKGINFO" || name.starts_with(".SIGN.");
        if last.is_none() && compression == Compression::Gzip && is_package {
            return Ok(Kind::Apk);
        }
        let is_file = entry.header().entry_type() == EntryType::Regular;
        has_layout |= is_file && name == oci::LAYOUT;
        has_index |= is_file && name == oci::INDEX;
        has_manifest |= is_file && name == docker::MANIFEST && docker::is_manifest(&mut entry);
        if has_layout && has_index {
            return Ok(Kind::OciArchive);
        }
        if compression != Compression::None {
            if !entry.header().entry_type().is_dir() && !may_be_of_image(&name) {
                return Ok(Kind::Tar);
            }
            io::copy(&mut entry, &mut io::sink()).map_err(broken)?;
        }
        last = Some(name);
        meter.only_headers(true);
    }
    Ok(if has_manifest { Kind::DockerArchive } else { Kind::Tar })
}

/// Returns whether an archive of an image may contain this file. Most tools name layers and configurations by digests:
/// `DIGEST.json`, `DIGEST.tar.gz`, `DIGEST/layer.tar`, `sha256:DIGEST`. Other files are recognised by the ends of their
/// names, or by the names that old versions of docker gave.
fn may_be_of_image(name: &str) -> bool {
    let known = [oci::LAYOUT, oci::INDEX, docker::MANIFEST, "", "repositories"];
    let digest = name.strip_prefix("sha256:").unwrap_or(name);
    let digits = digest.bytes().take_while(u8::is_ascii_hexdigit).count();
    let last = name.rsplit('/').next().unwrap_or_default();
    let ends = [".tar", ".tar.gz", ".tar.zst", ".tgz", ".json"];
    known.contains(&name)
        || name.starts_with("blobs/")
        || digits >= 64
        || ["VERSION", "json"].contains(&last)
        || ends.iter().any(|end| last.ends_with(end))
}
