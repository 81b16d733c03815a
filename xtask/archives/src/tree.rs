//! Writes entries into the directory. This is the only module that writes there, so the safety rules are here: no entry
//! leaves the directory, nothing is written through a link of the archive that leads outside, and no device, FIFO, owner
//! or setuid bit is made.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io::{self, Read, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use fs_err::os::unix::fs::OpenOptionsExt as _;

use anyhow::{Context, Error, Result, bail};
use xtask_core::error::Failure;

use crate::meter::{Meter, shown};
use crate::stream::BUFFER;
use crate::walk::{Found, Scope, follow, parse};

/// Is called with the bytes of the archive that were read and the bytes that there are to read. A compressed archive of
/// a container image is read twice, so the first number can start again at zero. An error ends the unpacking.
pub type Progress<'a> = dyn FnMut(u64, u64) -> Result<()> + 'a;

/// An entry that is not in the directory, because only root could make it or because it would block its readers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// The entry's path, relative to the directory.
    pub path: PathBuf,
    /// `device`, `FIFO`, `socket`, or `link to a device or FIFO`.
    pub what: &'static str,
}

/// The content of an entry.
pub(crate) enum Node<'r> {
    Directory,
    File(File<'r>),
    Symlink(&'r [u8]),
    /// A hard link to an earlier entry.
    Link(&'r [u8]),
    LeftOut(&'static str),
}

/// A file. Of its permissions, only those to execute are kept.
pub(crate) struct File<'r> {
    pub(crate) mode: u32,
    /// The bytes of the content. Content that ends earlier is an error.
    pub(crate) size: u64,
    pub(crate) content: &'r mut dyn Read,
}

/// The directory under construction.
pub(crate) struct Tree<'m> {
    pub(crate) root: PathBuf,
    pub(crate) scope: Scope,
    pub(crate) meter: &'m Meter,
    /// Directories by the path under which entries name them, and their paths without links.
    directories: HashMap<PathBuf, PathBuf>,
    /// The paths that the current layer made, and their parents. A whiteout removes only what lower layers made.
    pub(crate) own: HashSet<PathBuf>,
    /// The files and links of the current layer, in the order of the layer.
    pub(crate) files: Vec<PathBuf>,
    pub(crate) left_out: Vec<LeftOut>,
    progress: &'m mut Progress<'m>,
    buffer: Vec<u8>,
}

impl<'m> Tree<'m> {
    /// Makes the directory, which may exist if it is empty.
    ///
    /// # Errors
    /// Returns an error if the directory contains files: an old file must not be taken for one of the archive.
    pub(crate) fn new(
        root: &Path,
        scope: Scope,
        meter: &'m Meter,
        progress: &'m mut Progress<'m>,
    ) -> Result<Self> {
        fs_err::create_dir_all(root)?;
        if fs_err::read_dir(root)?.next().is_some() {
            let message =
                format!("unpack {} into {}: the directory is not empty", meter.archive(), root.display());
            return Err(Failure::usage(message).into());
        }
        Ok(Self {
            root: root.to_owned(),
            scope,
            meter,
            directories: HashMap::new(),
            own: HashSet::new(),
            files: Vec::new(),
            left_out: Vec::new(),
            progress,
            buffer: vec![0; BUFFER],
        })
    }

    /// Adds an entry. An earlier entry with the same path is replaced.
    ///
    /// # Errors
    /// Returns an error that names the archive and the entry if the entry is refused, if it cannot be read, or if this
    /// host cannot write it.
    pub(crate) fn add(&mut self, name: &[u8], node: Node<'_>) -> Result<()> {
        self.meter.entry(name)?;
        self.show()?;
        let path = self.place(name).with_context(|| self.refused(name))?;
        if path.as_os_str().is_empty() {
            return match node {
                Node::Directory => Ok(()),
                _ => Err(Error::msg("only a directory can be the root").context(self.refused(name))),
            };
        }
        if !matches!(node, Node::Directory | Node::LeftOut(_)) {
            self.files.push(path.clone());
        }
        self.note(&path);
        let made = match node {
            Node::Directory => self.directory(&path),
            Node::Symlink(target) => {
                self.make(&path, |full| fs_err::os::unix::fs::symlink(OsStr::from_bytes(target), full))
            }
            Node::Link(target) => return self.link(&path, target).with_context(|| self.refused(name)),
            Node::File(file) => return self.write(name, &path, file),
            Node::LeftOut(what) => {
                let removed = self.remove(&path);
                self.left_out.push(LeftOut { path, what });
                removed
            }
        };
        made.map_err(|error| self.cannot_write(name, error))
    }

    /// Shows the progress if it is due.
    pub(crate) fn show(&mut self) -> Result<()> {
        self.meter.due().map_or(Ok(()), |(read, total)| (self.progress)(read, total))
    }

    pub(crate) fn refused(&self, name: &[u8]) -> Failure {
        let message = format!("unpack {}: refuse the entry {}", self.meter.archive(), shown(name));
        Failure::guest(message, "make the archive again without this entry")
    }

    /// Returns the path at which an entry is made, relative to the root and without links, and makes its parents.
    fn place(&mut self, name: &[u8]) -> Result<PathBuf> {
        let path = parse(Path::new(OsStr::from_bytes(name)), self.scope)?;
        let (Some(parent), Some(last)) = (path.parent(), path.file_name()) else { return Ok(path) };
        if let Some(real) = self.directories.get(parent) {
            return Ok(real.join(last));
        }
        match follow(&self.root, parent, self.scope, true)? {
            Found::Path(real) | Found::Missing(real) => {
                let place = real.join(last);
                self.directories.insert(parent.to_owned(), real);
                Ok(place)
            }
        }
    }

    /// Records that the current layer made this path.
    fn note(&mut self, path: &Path) {
        for path in path.ancestors() {
            if !self.own.insert(path.to_owned()) {
                break;
            }
        }
    }

    fn directory(&mut self, path: &Path) -> io::Result<()> {
        let full = self.root.join(path);
        match fs_err::create_dir(&full) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if fs_err::symlink_metadata(&full)?.is_dir() {
                    return Ok(());
                }
                self.remove(path)?;
                fs_err::create_dir(&full)
            }
            made => made,
        }
    }

    /// Makes a file or a link. Whatever has this path is removed, never written to: it can be a link that leads
    /// outside, or a hard link to another file of the archive.
    fn make<T>(&mut self, path: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<T> {
        let full = self.root.join(path);
        match make(&full) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.remove(path)?;
                make(&full)
            }
            made => made,
        }
    }

    /// Removes the file, the link, or the whole directory that has this path, if there is one.
    pub(crate) fn remove(&mut self, path: &Path) -> io::Result<()> {
        let full = self.root.join(path);
        let found = match fs_err::symlink_metadata(&full) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found?,
        };
        if !found.is_file() {
            // Paths may lead elsewhere now.
            self.directories.clear();
        }
        if found.is_dir() { fs_err::remove_dir_all(&full) } else { fs_err::remove_file(&full) }
    }

    fn link(&mut self, path: &Path, target: &[u8]) -> Result<()> {
        let named =
            parse(Path::new(OsStr::from_bytes(target)), self.scope).context("the target of a hard link")?;
        let (Some(parent), Some(last)) = (named.parent(), named.file_name()) else {
            bail!("it is a hard link to the root directory")
        };
        let missing = || format!("it is a hard link to {}, which is no earlier file", shown(target));
        let Found::Path(parent) = follow(&self.root, parent, self.scope, false)? else { bail!(missing()) };
        let target = parent.join(last);
        if self.left_out.iter().any(|left_out| left_out.path == target) {
            self.remove(path)?;
            self.left_out.push(LeftOut { path: path.to_owned(), what: "link to a device or FIFO" });
            return Ok(());
        }
        let full = self.root.join(&target);
        let is_file = std::fs::symlink_metadata(&full).is_ok_and(|found| !found.is_dir());
        if !is_file || target.starts_with(path) {
            bail!(missing());
        }
        self.make(path, |place| fs_err::hard_link(&full, place)).map_err(Error::from)
    }

    fn write(&mut self, name: &[u8], path: &Path, file: File<'_>) -> Result<()> {
        let File { mode, size: mut left, content } = file;
        let mode = 0o644 | (mode & 0o111);
        let open =
            |full: &Path| fs_err::OpenOptions::new().write(true).create_new(true).mode(mode).open(full);
        let mut written = self.make(path, open).map_err(|error| self.cannot_write(name, error))?;
        while left > 0 {
            let wanted = usize::try_from(left).map_or(BUFFER, |left| left.min(BUFFER));
            let count = match content.read(&mut self.buffer[..wanted]) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read,
            };
            let count = count.map_err(|error| self.meter.broken(Some(name), error))?;
            self.meter.write(name, count as u64)?;
            self.show()?;
            written.write_all(&self.buffer[..count]).map_err(|error| self.cannot_write(name, error))?;
            left -= count as u64;
        }
        Ok(())
    }

    /// Returns the error for an entry that this host does not write. The archive is at fault only if the name is.
    fn cannot_write(&self, name: &[u8], error: io::Error) -> Error {
        if matches!(
            error.kind(),
            io::ErrorKind::InvalidFilename | io::ErrorKind::InvalidInput | io::ErrorKind::NotADirectory
        ) {
            return Error::new(error).context(self.refused(name));
        }
        let message = format!("unpack {}: write the entry {}", self.meter.archive(), shown(name));
        let remedy = format!("free disk space, and check the permissions of {}", self.root.display());
        Error::new(error).context(Failure::host(message, remedy))
    }
}
