//! Zip archives, among them wheels and Android packages.

use std::io::{self, BufReader, Read, Seek};

use anyhow::{Error, Result};
use zip::result::ZipError;
use zip::{ZipArchive, read::ZipFile};

use crate::meter::{Decoded, Source};
use crate::slice::Slice;
use crate::tree::{File, Node, Tree};

/// The longest target of a symbolic link, in bytes (PATH_MAX).
const MAX_TARGET: u64 = 4096;

/// Returns whether a zip archive is a wheel, which has a file `NAME-VERSION.dist-info/WHEEL` (PEP 427).
///
/// # Errors
/// Returns an error if the archive has no list of its files at the end, because it is incomplete.
pub(crate) fn is_wheel(slice: &Slice) -> io::Result<bool> {
    let archive = ZipArchive::new(BufReader::new(slice.clone())).map_err(io::Error::from)?;
    let is_info = |name: &str| {
        let folder = name.strip_suffix("/WHEEL");
        folder.is_some_and(|folder| folder.ends_with(".dist-info") && !folder.contains('/'))
    };
    Ok(archive.file_names().any(is_info))
}

pub(crate) fn unpack(slice: &Slice, tree: &mut Tree<'_>) -> Result<()> {
    let meter = tree.meter;
    let source = BufReader::new(Source { inner: slice.clone(), meter });
    let mut archive = ZipArchive::new(source).map_err(|error| meter.broken(None, error.into()))?;
    for index in 0..archive.len() {
        let shown = archive.name_for_index(index).unwrap_or_default().as_bytes().to_vec();
        let mut file = match archive.by_index(index) {
            Ok(file) => file,
            Err(error) if is_unsupported(&error) => {
                return Err(Error::new(error).context(tree.refused(&shown)));
            }
            Err(error) => return Err(meter.broken(Some(&shown), error.into())),
        };
        let name = file.name_raw().to_vec();
        add(&mut file, &name, tree)?;
    }
    Ok(())
}

/// Returns whether an entry is encrypted or compressed in a way that this crate does not read.
fn is_unsupported(error: &ZipError) -> bool {
    use ZipError::{CompressionMethodNotSupported, InvalidPassword, UnsupportedArchive};
    matches!(error, CompressionMethodNotSupported(_) | InvalidPassword | UnsupportedArchive(_))
}

fn add<R: Read + Seek>(file: &mut ZipFile<'_, R>, name: &[u8], tree: &mut Tree<'_>) -> Result<()> {
    let meter = tree.meter;
    let mode = file.unix_mode().unwrap_or(0o644);
    let size = file.size();
    let is_directory = file.is_dir();
    let mut content = Decoded { inner: file, meter };
    // The types of inode(7).
    let node = match mode & 0o17_0000 {
        _ if is_directory => Node::Directory,
        0o12_0000 => {
            let mut target = Vec::new();
            let read = content.by_ref().take(MAX_TARGET + 1).read_to_end(&mut target);
            read.map_err(|error| meter.broken(Some(name), error))?;
            return tree.add(name, Node::Symlink(&target));
        }
        0o2_0000 | 0o6_0000 => Node::LeftOut("device"),
        0o1_0000 => Node::LeftOut("FIFO"),
        0o14_0000 => Node::LeftOut("socket"),
        _ => {
            tree.add(name, Node::File(File { mode, size, content: &mut content }))?;
            // The end of the content verifies its check sum.
            return io::copy(&mut content, &mut io::sink())
                .map(drop)
                .map_err(|error| meter.broken(Some(name), error));
        }
    };
    tree.add(name, node)
}
