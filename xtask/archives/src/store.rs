//! The files in the archive or the layout of a container image, by their names. A plain archive is read in place; a
//! compressed one is first decompressed into a temporary file.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result};
use tar::EntryType;
use xtask_core::error::Failure;
use xtask_core::format::human_bytes;

use crate::meter::{AGAIN, Decoded};
use crate::slice::Slice;
use crate::stream::{BUFFER, Compression, limited};
use crate::tarball::check_end;
use crate::tree::Tree;

/// The largest document, in bytes. Registries accept manifests of up to 4 MiB (OCI distribution-spec).
const MAX_DOCUMENT: u64 = 16 << 20;

/// The links between members that are followed.
const MAX_LINKS: usize = 8;

/// The source of the documents and layers of an image.
#[derive(Debug)]
pub(crate) struct Store {
    path: PathBuf,
    /// The members of an archive; `None` for a directory.
    members: Option<HashMap<String, Member>>,
}

#[derive(Debug)]
enum Member {
    Content(Slice),
    /// Old versions of docker and podman link equal layers.
    Link(String),
}

/// Returns the name of a member without `.`, `..` and slashes at its ends.
pub(crate) fn plain_name(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    let mut path = PathBuf::new();
    for component in Path::new(&*name).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::ParentDir => drop(path.pop()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    path.to_string_lossy().into_owned()
}

impl Store {
    pub(crate) fn directory(path: &Path) -> Self {
        Self { path: path.to_owned(), members: None }
    }

    /// Reads the headers of the archive of an image. A compressed archive is first decompressed into a temporary file
    /// without a name, in the directory of the tree.
    pub(crate) fn archive(path: &Path, tree: &mut Tree<'_>) -> Result<Self> {
        let meter = tree.meter;
        let mut slice = Slice::open(path)?;
        if Compression::of(&slice)? != Compression::None {
            slice = decompress(&slice, tree)?;
        }
        let mut members = HashMap::new();
        let mut archive = tar::Archive::new(Decoded { inner: slice.clone(), meter });
        let mut last: Option<Vec<u8>> = None;
        meter.only_headers(true);
        for entry in archive.entries_with_seek()? {
            let entry = entry.map_err(|error| meter.broken(last.as_deref(), error))?;
            meter.only_headers(true);
            let name = entry.path_bytes().into_owned();
            meter.entry(&name)?;
            let target =
                || String::from_utf8_lossy(&entry.link_name_bytes().unwrap_or_default()).into_owned();
            let member = match entry.header().entry_type() {
                EntryType::Regular | EntryType::Continuous => {
                    let content = slice.part(entry.raw_file_position(), entry.size());
                    let incomplete = || meter.broken(Some(&name), io::ErrorKind::UnexpectedEof.into());
                    Some(Member::Content(content.ok_or_else(incomplete)?))
                }
                EntryType::Link => Some(Member::Link(plain_name(target().as_bytes()))),
                EntryType::Symlink => {
                    let beside = format!("{}/../{}", plain_name(&name), target());
                    Some(Member::Link(plain_name(beside.as_bytes())))
                }
                _ => None,
            };
            if let Some(member) = member {
                members.insert(plain_name(&name), member);
            }
            last = Some(name);
        }
        meter.only_headers(false);
        let end = check_end(&mut archive.into_inner());
        end.map_err(|error| meter.broken(last.as_deref(), error))?;
        Ok(Self { path: path.to_owned(), members: Some(members) })
    }

    /// Returns the path of the archive or directory, for messages.
    pub(crate) fn shown(&self) -> std::path::Display<'_> {
        self.path.display()
    }

    /// Returns a file, or `None` if there is no file with this name.
    pub(crate) fn open(&self, name: &str) -> Result<Option<Slice>> {
        let mut name = plain_name(name.as_bytes());
        let Some(members) = &self.members else {
            let path = self.path.join(name);
            return if path.is_file() { Slice::open(&path).map(Some) } else { Ok(None) };
        };
        for _ in 0..MAX_LINKS {
            match members.get(&name) {
                Some(Member::Content(slice)) => return Ok(Some(slice.clone())),
                Some(Member::Link(target)) => name.clone_from(target),
                None => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Returns a file that another document names.
    ///
    /// # Errors
    /// Returns an error that names the archive and the file if it is missing.
    pub(crate) fn needed(&self, name: &str) -> Result<Slice> {
        self.open(name)?.ok_or_else(|| {
            let message = format!("read {}: it does not contain {name}, which the image needs", self.shown());
            Failure::guest(message, "save the image again, with all layers of its platform").into()
        })
    }

    /// Reads a document: an index, a manifest or a configuration.
    ///
    /// # Errors
    /// Returns an error that names the archive and the document if it is missing, too large, or cannot be read.
    pub(crate) fn document(&self, name: &str) -> Result<Vec<u8>> {
        let mut slice = self.needed(name)?;
        if slice.len() > MAX_DOCUMENT {
            let message = format!(
                "read {name} in {}: it has {}, and a document may have {}",
                self.shown(),
                human_bytes(slice.len()),
                human_bytes(MAX_DOCUMENT)
            );
            return Err(Failure::guest(message, AGAIN).into());
        }
        let mut bytes = Vec::new();
        slice.read_to_end(&mut bytes).with_context(|| format!("read {name} in {}", self.shown()))?;
        Ok(bytes)
    }
}

fn decompress(slice: &Slice, tree: &mut Tree<'_>) -> Result<Slice> {
    let (meter, into) = (tree.meter, tree.root.clone());
    let cannot_write = || {
        let message = format!("decompress {} into {}", meter.archive(), into.display());
        Failure::host(message, "free disk space, and check the permissions of the directory")
    };
    let mut file = tempfile::tempfile_in(&into).with_context(cannot_write)?;
    let mut stream = limited(slice, meter).map_err(|error| meter.broken(None, error))?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = stream.read(&mut buffer).map_err(|error| meter.broken(None, error))?;
        if count == 0 {
            return Ok(Slice::whole(file)?);
        }
        tree.show()?;
        file.write_all(&buffer[..count]).with_context(cannot_write)?;
    }
}
