//! The layers of a container image: which files a layer adds, and which files of lower layers its whiteouts remove
//! (OCI image-spec, layer.md).

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::tree::{Node, Tree};
use crate::walk::{Found, follow, parse};

/// The beginning of a whiteout's name.
const WHITEOUT: &[u8] = b".wh.";
/// The beginning of reserved names, which are no files.
const RESERVED: &[u8] = b".wh..wh.";
/// The whiteout that removes all that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

impl Tree<'_> {
    /// Ends a layer, and returns its files and links in the order of the layer.
    pub(crate) fn end_layer(&mut self) -> Vec<PathBuf> {
        self.own.clear();
        std::mem::take(&mut self.files)
    }

    /// Adds an entry of a layer, which may be a whiteout.
    pub(crate) fn add_to_layer(&mut self, name: &[u8], node: Node<'_>) -> Result<()> {
        let last = Path::new(OsStr::from_bytes(name)).file_name().map_or(&[][..], OsStrExt::as_bytes);
        let hidden = match last.strip_prefix(WHITEOUT) {
            _ if last == OPAQUE => None,
            // AUFS keeps its metadata in files with the other reserved names.
            Some(_) if last.starts_with(RESERVED) => return Ok(()),
            Some(hidden) => Some(hidden),
            None => return self.add(name, node),
        };
        self.meter.entry(name)?;
        self.show()?;
        self.white_out(name, hidden).with_context(|| self.refused(name))
    }

    /// Removes what lower layers have at `hidden` beside the whiteout, or all that they have in its directory. The order
    /// of the entries in the layer does not matter.
    fn white_out(&mut self, name: &[u8], hidden: Option<&[u8]>) -> Result<()> {
        let path = parse(Path::new(OsStr::from_bytes(name)), self.scope)?;
        let parent = path.parent().unwrap_or(Path::new(""));
        let Found::Path(parent) = follow(&self.root, parent, self.scope, false)? else { return Ok(()) };
        match hidden {
            None => self.remove_lower_content(&parent)?,
            Some(hidden) => {
                let is_name = !matches!(hidden, b"" | b"." | b"..");
                ensure!(is_name, "it is a whiteout of a directory that contains it");
                self.remove_lower(&parent.join(OsStr::from_bytes(hidden)))?;
            }
        }
        Ok(())
    }

    /// Removes what lower layers made at a path, and keeps what this layer made.
    fn remove_lower(&mut self, path: &Path) -> io::Result<()> {
        if !self.own.contains(path) {
            return self.remove(path);
        }
        let is_directory = fs_err::symlink_metadata(self.root.join(path)).is_ok_and(|found| found.is_dir());
        if is_directory { self.remove_lower_content(path) } else { Ok(()) }
    }

    fn remove_lower_content(&mut self, directory: &Path) -> io::Result<()> {
        let full = self.root.join(directory);
        if !fs_err::symlink_metadata(&full)?.is_dir() {
            return Ok(());
        }
        let names: Vec<_> = fs_err::read_dir(full)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<_>>()?;
        names.into_iter().try_for_each(|name| self.remove_lower(&directory.join(name)))
    }
}
