//! Keeps what was read of libraries, because many programs load the same ones.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use inspect::inventory::{Library, Sysroot, Tree};

/// The libraries that were read, by their paths on this host. A file that is no library has no value.
pub(crate) type Kept = Mutex<HashMap<PathBuf, Option<Library>>>;

/// A directory whose libraries are read once.
pub(crate) struct KeptTree<'a> {
    pub(crate) tree: Sysroot,
    pub(crate) kept: &'a Kept,
}

impl Tree for KeptTree<'_> {
    fn list(&self, directory: &str) -> Vec<String> {
        self.tree.list(directory)
    }

    fn read(&self, path: &str) -> Option<Vec<u8>> {
        self.tree.read(path)
    }

    fn library(&self, path: &str) -> Option<Library> {
        let place = self.tree.resolve(path)?;
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(&place).cloned();
        let library = kept.unwrap_or_else(|| {
            let read = self.tree.library(path);
            self.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(place, read.clone());
            read
        });
        // A library may have been read under another name.
        Some(Library { path: path.to_owned(), ..library? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_read_once_under_all_of_its_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let own = std::env::current_exe().unwrap();
        std::fs::copy(own, path("liba.so.1")).unwrap();
        std::os::unix::fs::symlink("liba.so.1", path("liba.so")).unwrap();
        let kept = Kept::default();
        let tree = KeptTree { tree: Sysroot(directory.path().to_owned()), kept: &kept };
        let first = tree.library("/liba.so.1").unwrap();
        assert!(tree.library("/libb.so").is_none());
        std::fs::write(path("liba.so.1"), "no library").unwrap();
        let again = tree.library("/liba.so").unwrap();
        assert_eq!((again.path.as_str(), &again.needed), ("/liba.so", &first.needed));
    }
}
