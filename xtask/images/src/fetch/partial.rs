//! The files of an incomplete download: `<name>.partial`, which has the bytes that have arrived, and
//! `<name>.partial.json`, which names their source. After a kill at any moment, the next run resumes the download or
//! starts over.

use std::fs::Permissions;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use fs_err::os::unix::fs::OpenOptionsExt as _;
use fs_err::{self as fs, File, OpenOptions};
use serde::{Deserialize, Serialize};
use xtask_core::digest::{Algorithm, Digest, Hasher};
use xtask_core::fs::{remove_file, write_private};

use super::answer::PartRequest;
use crate::store::flush;

/// Bytes that are read at once from a file on disk.
const BLOCK: usize = 1 << 20;

/// The content of `<name>.partial.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// The URL without its credentials.
    pub(super) url: String,
    /// The digest that the whole file must have.
    pub(super) digest: Option<Digest>,
    /// The value that distinguishes this version of the file from others. Without it, the download starts over.
    pub(super) validator: Option<String>,
    /// The size of the whole file, as the server reported it.
    pub(super) total: Option<u64>,
}

/// The hashes of all bytes that were written to the partial file.
#[derive(Debug, Clone)]
pub(super) struct Sums {
    sha256: Hasher,
    wanted: Option<Hasher>,
}

impl Sums {
    /// Starts the hashes: SHA-256, and the algorithm of `wanted` if it is not SHA-256.
    pub(super) fn new(wanted: Option<&Digest>) -> Self {
        let other = wanted.map(Digest::algorithm).filter(|algorithm| *algorithm != Algorithm::Sha256);
        Self { sha256: Algorithm::Sha256.hasher(), wanted: other.map(Algorithm::hasher) }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        if let Some(hash) = &mut self.wanted {
            hash.update(bytes);
        }
    }

    /// Returns the SHA-256 digest, and the digest to compare with the wanted one.
    pub(super) fn finish(self) -> (Digest, Digest) {
        let sha256 = self.sha256.finish();
        let compared = self.wanted.map_or_else(|| sha256.clone(), Hasher::finish);
        (sha256, compared)
    }
}

/// A download that has begun.
#[derive(Debug)]
pub(super) struct Begun {
    file: File,
    pub(super) length: u64,
    pub(super) sums: Sums,
    pub(super) note: Note,
}

impl Begun {
    /// Returns the part to request. Returns `None` if there are no bytes yet, or if the server sent no value that
    /// distinguishes the versions of the file.
    pub(super) fn rest(&self) -> Option<PartRequest> {
        let validator = self.note.validator.clone().filter(|_| self.length > 0)?;
        Some(PartRequest { from: self.length, total: self.note.total, validator })
    }

    /// Appends bytes to the file and to the hashes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        self.sums.update(bytes);
        Ok(())
    }

    /// Returns another handle of the file, for flushing it while bytes arrive.
    pub(super) fn handle(&self) -> io::Result<File> {
        self.file.try_clone()
    }
}

/// The paths of the files of one download.
#[derive(Debug, Clone)]
pub(super) struct DownloadPaths {
    target: PathBuf,
    pub(super) partial: PathBuf,
    note: PathBuf,
}

impl DownloadPaths {
    pub(super) fn new(target: &Path) -> Self {
        let beside = |ending: &str| PathBuf::from([target.as_os_str(), ending.as_ref()].join("".as_ref()));
        Self { target: target.to_owned(), partial: beside(".partial"), note: beside(".partial.json") }
    }

    /// Returns the directory that contains all of these files.
    pub(super) fn directory(&self) -> &Path {
        self.target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// Deletes earlier files, then creates an empty private file, and then its note. In this order, the bytes of one
    /// download are never beside the note of another.
    pub(super) fn begin(&self, note: Note) -> Result<Begun> {
        self.discard()?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.partial)?;
        write_private(&self.note, serde_json::to_vec_pretty(&note)?)?;
        let sums = Sums::new(note.digest.as_ref());
        Ok(Begun { file, length: 0, sums, note })
    }

    /// Opens the partial file that an earlier run of the same download left, and hashes it again. `seen` is called
    /// with the number of bytes so far. If it returns an error, the hashing ends.
    pub(super) fn find(
        &self,
        url: &str,
        digest: Option<&Digest>,
        seen: impl FnMut(u64) -> Result<()>,
    ) -> Result<Option<Begun>> {
        let note = fs::read(&self.note).ok().and_then(|text| serde_json::from_slice::<Note>(&text).ok());
        let fits = |note: &Note| note.url == url && note.digest.as_ref() == digest;
        let Some(note) = note.filter(fits) else { return Ok(None) };
        let opened = OpenOptions::new().read(true).append(true).open(&self.partial);
        let mut file = match opened {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let (length, sums) = hash(&mut file, digest, seen)?;
        Ok(Some(Begun { file, length, sums, note }))
    }

    /// Deletes the partial file and its note.
    pub(super) fn discard(&self) -> Result<()> {
        remove_file(&self.partial)?;
        remove_file(&self.note)
    }

    /// Deletes the files of a download if no bytes have arrived.
    pub(super) fn discard_empty(&self) -> Result<()> {
        match self.partial.metadata() {
            Ok(meta) if meta.len() > 0 => Ok(()),
            _ => self.discard(),
        }
    }

    /// Syncs the file, makes it read-only, and gives it its final name.
    pub(super) fn finish(&self, begun: &Begun) -> Result<()> {
        begun.file.sync_all()?;
        begun.file.set_permissions(Permissions::from_mode(0o400))?;
        fs::rename(&self.partial, &self.target)?;
        remove_file(&self.note)?;
        flush(&[self.directory()])
    }

    /// Hashes the file that already has the final name, if there is one.
    pub(super) fn finished(
        &self,
        digest: Option<&Digest>,
        seen: impl FnMut(u64) -> Result<()>,
    ) -> Result<Option<(u64, Sums)>> {
        let mut file = match File::open(&self.target) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        Ok(Some(hash(&mut file, digest, seen)?))
    }
}

/// Returns the length of a file, and the digests that `wanted` needs.
fn hash(
    file: &mut File,
    wanted: Option<&Digest>,
    mut seen: impl FnMut(u64) -> Result<()>,
) -> Result<(u64, Sums)> {
    let (mut length, mut sums) = (0, Sums::new(wanted));
    let mut block = vec![0; BLOCK];
    loop {
        seen(length)?;
        let count = file.read(&mut block)?;
        if count == 0 {
            return Ok((length, sums));
        }
        sums.update(&block[..count]);
        length += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(url: &str) -> Note {
        Note { url: url.to_owned(), digest: None, validator: Some("\"a\"".to_owned()), total: Some(6) }
    }

    #[test]
    fn the_length_is_the_truth_and_another_downloads_bytes_are_not_taken() {
        let directory = tempfile::tempdir().unwrap();
        let place = DownloadPaths::new(&directory.path().join("file"));
        let find = |url| place.find(url, None, |_| Ok(())).unwrap();
        assert!(find("u").is_none());
        let mut begun = place.begin(note("u")).unwrap();
        assert_eq!(begun.rest(), None, "nothing is there");
        begun.write(b"abc").unwrap();
        drop(begun);
        assert!(find("other").is_none());
        let mut found = find("u").unwrap();
        assert_eq!(found.rest().unwrap().from, 3);
        found.write(b"def").unwrap();
        place.finish(&found).unwrap();
        let (length, sums) = place.finished(None, |_| Ok(())).unwrap().unwrap();
        let mut expected = Sums::new(None);
        expected.update(b"abcdef");
        assert_eq!((length, sums.finish()), (6, expected.finish()));
        let mode = directory.path().join("file").metadata().unwrap().permissions().mode();
        assert_eq!((mode & 0o777, fs::read_dir(directory.path()).unwrap().count()), (0o400, 1));
    }

    #[test]
    fn a_note_that_was_cut_off_is_no_note_and_a_beginning_without_bytes_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let place = DownloadPaths::new(&directory.path().join("file"));
        drop(place.begin(note("u")).unwrap());
        fs::write(&place.note, "{\"url\":").unwrap();
        assert!(place.find("u", None, |_| Ok(())).unwrap().is_none());
        place.discard_empty().unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
