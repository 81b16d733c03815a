//! Debian packages: an archive of `ar` with a tar archive of the files (deb(5)).

use std::io;

use anyhow::{Error, Result};

use crate::slice::Slice;
use crate::stream::limited;
use crate::tarball::{self, Content};
use crate::tree::Tree;

/// The first bytes of each archive of `ar`.
pub(crate) const MAGIC: &[u8] = b"!<arch>\n";
/// The bytes of a member's header: name, times and owners, size, and two bytes that end it.
const HEADER: u64 = 60;
/// The first member of each package.
const FIRST: &str = "debian-binary";

/// Returns whether an archive of `ar` is a package. The other archives are static libraries.
pub(crate) fn is_package(slice: &Slice) -> io::Result<bool> {
    Ok(member(slice, MAGIC.len() as u64)?.is_some_and(|(name, _, _)| name == FIRST))
}

/// Returns the name and content of the member whose header is at `offset`, and the offset of the next header. Returns
/// `None` at the end.
fn member(slice: &Slice, offset: u64) -> io::Result<Option<(String, Slice, u64)>> {
    if offset >= slice.len() {
        return Ok(None);
    }
    let incomplete =
        || io::Error::new(io::ErrorKind::UnexpectedEof, format!("the member at byte {offset} is incomplete"));
    let header = slice.part(offset, HEADER).ok_or_else(incomplete)?.beginning(HEADER as usize)?;
    let text = String::from_utf8_lossy(&header);
    let field = |from, to| text.get(from..to).unwrap_or_default().trim_end();
    let size: Option<u64> = field(48, 58).parse().ok().filter(|_| header.ends_with(b"`\n"));
    let size = size.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("the header at byte {offset} is not one of ar"))
    })?;
    let start = offset + HEADER;
    let content = slice.part(start, size).ok_or_else(incomplete)?;
    let name = field(0, 16).trim_end_matches('/').to_owned();
    Ok(Some((name, content, start + size + size % 2)))
}

pub(crate) fn unpack(slice: &Slice, tree: &mut Tree<'_>) -> Result<()> {
    let meter = tree.meter;
    let mut offset = MAGIC.len() as u64;
    while let Some((name, content, next)) =
        member(slice, offset).map_err(|error| meter.broken(None, error))?
    {
        if name == "data.tar.lzma" {
            let cause = Error::msg("packages have not been compressed with lzma since 2014; use xz");
            return Err(cause.context(tree.refused(name.as_bytes())));
        }
        if name.starts_with("data.tar") {
            let stream = limited(&content, tree.meter).map_err(|error| meter.broken(None, error))?;
            return tarball::unpack(stream, tree, Content::Files);
        }
        offset = next;
    }
    let cause = io::Error::new(io::ErrorKind::UnexpectedEof, "the member data.tar is missing");
    Err(meter.broken(None, cause))
}
