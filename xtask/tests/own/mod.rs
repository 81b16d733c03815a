//! A cache of a test's own, but for the images: no other test's run is in it.

use std::path::PathBuf;

use xtask_core::cache::Cache;

/// The cache; it goes with the value.
pub(crate) struct Own {
    _directory: tempfile::TempDir,
    pub(crate) root: PathBuf,
}

impl Own {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("c");
        std::fs::create_dir(&root).unwrap();
        let images = Cache::from_env().unwrap().images();
        std::os::unix::fs::symlink(images, root.join("images")).unwrap();
        Self { _directory: directory, root }
    }
}
