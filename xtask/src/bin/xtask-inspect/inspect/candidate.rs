//! A file that may be judged.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use inspect::elf::{Ident, is_detached};
use xtask_core::error::Failure;

/// The bytes that are read before the rest of a file: the ELF header, and the signatures of other formats.
const START: u64 = 64;
/// The types of ELF files that no process maps: relocatable files and core dumps (gABI, `e_type`).
const OBJECTS: [u16; 2] = [1, 4];

/// A regular file, of which only the start was read.
#[derive(Debug)]
pub(super) struct Candidate {
    /// The path without links.
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    pub(super) start: Vec<u8>,
}

impl Candidate {
    /// Reads the start of a file.
    ///
    /// # Errors
    /// Returns a usage error that names the path if it cannot be read or is no regular file. A FIFO or a device is refused
    /// before anything is read, because such a read may never end.
    pub(super) fn at(path: &Path) -> Result<Self, Failure> {
        let failed = |error| Failure::usage(format!("inspect {}: {error}", path.display()));
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if !metadata.is_file() {
            return Err(Failure::usage(format!("inspect {}: it is no regular file", path.display())));
        }
        let mut start = Vec::new();
        File::open(path).map_err(failed)?.take(START).read_to_end(&mut start).map_err(failed)?;
        let path = path.canonicalize().map_err(failed)?;
        Ok(Self { path, bytes: metadata.len(), start })
    }

    /// Reads the whole file.
    ///
    /// # Errors
    /// Returns a usage error that names the path if the file can no longer be read.
    pub(super) fn read(&self) -> Result<Vec<u8>, Failure> {
        std::fs::read(&self.path)
            .map_err(|error| Failure::usage(format!("inspect {}: {error}", self.path.display())))
    }

    pub(super) fn is_elf(&self) -> bool {
        self.start.starts_with(b"\x7fELF")
    }

    pub(super) fn is_script(&self) -> bool {
        self.start.starts_with(b"#!")
    }

    /// Returns whether the file is an ELF file that no process maps: a relocatable file, a core dump, or the separate debug
    /// information of another file.
    pub(super) fn is_object(&self) -> bool {
        Ident::read(&self.start).is_ok_and(|ident| OBJECTS.contains(&ident.kind))
            || is_detached(&self.start, |offset, length| {
                let mut bytes = vec![0; length];
                File::open(&self.path).ok()?.read_exact_at(&mut bytes, offset).ok()?;
                Some(bytes)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_is_opened() {
        for (path, words) in
            [("/dev/zero", "no regular file"), ("/", "no regular"), ("/proc/nonexistent", "No such")]
        {
            let error = Candidate::at(Path::new(path)).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn object_files_are_told_apart_by_their_type() {
        let mut start = vec![0; 64];
        start[..6].copy_from_slice(b"\x7fELF\x02\x01");
        for (kind, is_object) in [(1, true), (2, false), (3, false), (4, true)] {
            start[16] = kind;
            let candidate = Candidate { path: PathBuf::new(), bytes: 64, start: start.clone() };
            assert_eq!((candidate.is_elf(), candidate.is_object()), (true, is_object));
        }
    }

    /// The section headers of a file with debug information say that the code is not in the file.
    #[test]
    fn separate_debug_information_is_no_program() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for (kind, is_object) in [(1_u8, false), (8, true)] {
            let mut bytes = vec![0; 64 + 2 * 64];
            bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
            // An executable with two section headers at byte 64.
            (bytes[16], bytes[40], bytes[58], bytes[60]) = (2, 64, 64, 2);
            (bytes[128 + 4], bytes[128 + 8]) = (kind, 6);
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(Candidate::at(&path).unwrap().is_object(), is_object);
        }
    }
}
