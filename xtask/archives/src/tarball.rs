//! Reads the entries of a tar archive into a tree.

use std::io::{self, Read};

use anyhow::{Error, Result};
use tar::{Archive, Entry, EntryType};

use crate::meter::Decoded;
use crate::tree::{File, Node, Tree};

/// The bytes of a header, and of each of the two blocks of zeros at the end of an archive (pax(1)).
pub(crate) const BLOCK: u64 = 512;

/// The tar archives that differ in their rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// An archive whose end must be there, because nothing else shows that it is complete.
    Files,
    /// An apk of Alpine Linux: as `Files`, but the package's own files at the root are not part of the tree.
    Package,
    /// A layer of a container image. Its digest shows that it is complete, so an archive without an end is accepted.
    Layer,
}

/// Adds all entries of a tar archive to the tree.
///
/// # Errors
/// Returns an error that names the archive and the entry if an entry is refused, if the archive is damaged or
/// incomplete, or if it exceeds a limit.
pub(crate) fn unpack<R: Read>(stream: Decoded<'_, R>, tree: &mut Tree<'_>, content: Content) -> Result<()> {
    let meter = tree.meter;
    let mut archive = Archive::new(stream);
    let mut last: Option<Vec<u8>> = None;
    let broken = |last: &Option<Vec<u8>>, error| meter.broken(last.as_deref(), error);
    let mut entries = archive.entries().map_err(|error| broken(&last, error))?;
    loop {
        meter.only_headers(true);
        let next = entries.next();
        meter.only_headers(false);
        let Some(next) = next else { break };
        let mut entry = next.map_err(|error| broken(&last, error))?;
        let name = entry.path_bytes().into_owned();
        add(&mut entry, &name, tree, content)?;
        // The next call of the iterator must read only headers.
        io::copy(&mut entry, &mut io::sink()).map_err(|error| meter.broken(Some(&name), error))?;
        last = Some(name);
    }
    finish(archive.into_inner(), content).map_err(|error| broken(&last, error))
}

/// Reads a stream to its end, which verifies the check sum of its compression.
fn finish(mut stream: impl Read, content: Content) -> io::Result<()> {
    let ended = check_end(&mut stream);
    if content != Content::Layer {
        ended?;
    }
    io::copy(&mut stream, &mut io::sink()).map(drop)
}

/// Checks that an archive has its second block of zeros. The crate `tar` stops after the first block, or where the
/// stream ends.
pub(crate) fn check_end(stream: &mut impl Read) -> io::Result<()> {
    let mut second = Vec::new();
    stream.take(BLOCK).read_to_end(&mut second)?;
    if second.len() as u64 == BLOCK && second.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the end of the tar archive is missing"))
}

fn add<R: Read>(entry: &mut Entry<'_, R>, name: &[u8], tree: &mut Tree<'_>, content: Content) -> Result<()> {
    let kind = entry.header().entry_type();
    if kind == EntryType::XGlobalHeader || (content == Content::Package && is_metadata(name)) {
        return Ok(());
    }
    let target = entry.link_name_bytes().map(|target| target.into_owned()).unwrap_or_default();
    let node = match kind {
        EntryType::Directory => Node::Directory,
        // In the first format of tar, only the slash distinguishes a directory from a file.
        EntryType::Regular if name.ends_with(b"/") => Node::Directory,
        EntryType::Symlink => Node::Symlink(&target),
        EntryType::Link => Node::Link(&target),
        EntryType::Char | EntryType::Block => Node::LeftOut("device"),
        EntryType::Fifo => Node::LeftOut("FIFO"),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let damaged = |error| tree.meter.broken(Some(name), error);
            if is_pax_sparse(entry).map_err(damaged)? {
                let cause = "it is a sparse file in the format of pax; make the archive without --sparse";
                return Err(Error::msg(cause).context(tree.refused(name)));
            }
            let mode = entry.header().mode().map_err(damaged)?;
            Node::File(File { mode, size: entry.size(), content: entry })
        }
        other => {
            let cause = format!("its type {:?} is unknown", char::from(other.as_byte()));
            return Err(Error::msg(cause).context(tree.refused(name)));
        }
    };
    match content {
        Content::Layer => tree.add_to_layer(name, node),
        Content::Files | Content::Package => tree.add(name, node),
    }
}

/// Returns whether an entry belongs to the package manager: `.PKGINFO`, the signature and the scripts (apk(5)).
fn is_metadata(name: &[u8]) -> bool {
    name.starts_with(b".") && !name.contains(&b'/')
}

/// GNU tar stores such a file as a list of its parts and their content. The crate `tar` knows only the older format.
fn is_pax_sparse<R: Read>(entry: &mut Entry<'_, R>) -> io::Result<bool> {
    let Some(extensions) = entry.pax_extensions()? else { return Ok(false) };
    for extension in extensions {
        if extension?.key_bytes().starts_with(b"GNU.sparse.") {
            return Ok(true);
        }
    }
    Ok(false)
}
