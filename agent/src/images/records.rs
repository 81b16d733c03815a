//! The records of images on disk. Podman does not sync the images that it unpacks. A record in the directory `fetching`
//! therefore covers each download until the image is synced, and moves to the directory `fetched` afterwards. If a
//! record is left in `fetching` after a power cut, the agent deletes the image and downloads it again.
//!
//! The name of a record is the digest of the image's reference, which may be too long for a file's name. Its content is
//! the reference.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::{digest, files};

#[derive(Debug, Clone)]
pub(super) struct Records {
    fetching: PathBuf,
    fetched: PathBuf,
}

impl Records {
    pub(super) fn new(directory: &Path) -> Self {
        Self { fetching: directory.join("fetching"), fetched: directory.join("fetched") }
    }

    /// Returns whether a download of the image has not ended.
    pub(super) fn is_incomplete(&self, reference: &str) -> bool {
        self.fetching.join(name_of(reference)).exists()
    }

    /// Records that a download begins. The record is on disk when this returns.
    pub(super) fn begin(&self, reference: &str) -> io::Result<()> {
        let path = self.fetching.join(name_of(reference));
        fs::create_dir_all(&self.fetching)?;
        let mut file = File::create(&path)?;
        file.write_all(reference.as_bytes())?;
        file.sync_all()?;
        files::sync_parent(&path)?;
        files::sync_parent(&self.fetching)
    }

    /// Records that an image is complete and synced.
    pub(super) fn finish(&self, reference: &str) -> io::Result<()> {
        let name = name_of(reference);
        fs::create_dir_all(&self.fetched)?;
        fs::rename(self.fetching.join(&name), self.fetched.join(&name))?;
        files::sync_parent(&self.fetched.join(&name))?;
        files::sync_parent(&self.fetching.join(&name))
    }

    /// Returns the references of the recorded images that are not in `named`: complete ones and incomplete ones.
    pub(super) fn surplus(&self, named: &BTreeSet<String>) -> io::Result<Vec<String>> {
        let mut surplus = Vec::new();
        for directory in [&self.fetching, &self.fetched] {
            let entries = match fs::read_dir(directory) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for entry in entries {
                let path = entry?.path();
                // A power cut may leave a record without its content, which names no image.
                let reference = fs::read_to_string(&path).unwrap_or_default();
                if path.file_name().is_none_or(|name| name != name_of(&reference).as_str()) {
                    fs::remove_file(&path)?;
                } else if !named.contains(&reference) {
                    surplus.push(reference);
                }
            }
        }
        Ok(surplus)
    }

    /// Deletes the records of an image.
    pub(super) fn forget(&self, reference: &str) -> io::Result<()> {
        for directory in [&self.fetching, &self.fetched] {
            match fs::remove_file(directory.join(name_of(reference))) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

fn name_of(reference: &str) -> String {
    digest::of_bytes(reference.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_incomplete_until_it_is_synced_and_surplus_when_nothing_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::new(directory.path());
        let (first, second) = (format!("r.example/{}:1", "a".repeat(300)), "r.example/a/b:1".to_owned());
        assert_eq!(records.surplus(&BTreeSet::new()).unwrap(), Vec::<String>::new());
        records.begin(&first).unwrap();
        records.begin(&second).unwrap();
        assert!(records.is_incomplete(&first) && !records.is_incomplete("r.example/a_b:1"));
        records.finish(&first).unwrap();
        assert!(!records.is_incomplete(&first) && records.is_incomplete(&second));
        let named = BTreeSet::from([first.clone()]);
        assert_eq!(records.surplus(&named).unwrap(), std::slice::from_ref(&second));
        records.forget(&second).unwrap();
        assert_eq!(records.surplus(&BTreeSet::new()).unwrap(), std::slice::from_ref(&first));
        // A power cut may lose the content of a record.
        fs::write(directory.path().join("fetched").join(name_of(&first)), "").unwrap();
        assert_eq!(records.surplus(&BTreeSet::new()).unwrap(), Vec::<String>::new());
    }
}
