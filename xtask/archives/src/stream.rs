//! Decompresses by the first bytes of a stream, never by a file's name.

use std::io::{self, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

use crate::meter::{Decoded, Meter, Source};
use crate::slice::Slice;

/// The bytes of each buffer: large enough that system calls cost little.
pub(crate) const BUFFER: usize = 256 << 10;

/// The memory that a dictionary of xz may take, in KiB. `xz -9` needs 64 MiB.
const XZ_MEMORY: u32 = 512 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
    Xz,
    Bzip2,
}

impl Compression {
    pub(crate) fn of(slice: &Slice) -> io::Result<Self> {
        let magic = slice.beginning(6)?;
        Ok(match magic.as_slice() {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // Also the magic numbers of a skippable frame, with which zstd:chunked layers may begin.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0] => Self::Xz,
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Self::Bzip2,
            _ => Self::None,
        })
    }
}

/// A stream that is decompressed.
pub(crate) type Stream<'m> = Box<dyn Read + 'm>;

/// Returns the decompressed content of a slice.
pub(crate) fn decoder<'m>(slice: &Slice, source: impl Read + 'm) -> io::Result<Stream<'m>> {
    let source = BufReader::with_capacity(BUFFER, source);
    Ok(match Compression::of(slice)? {
        Compression::None => Box::new(source),
        Compression::Gzip => Box::new(MultiGzDecoder::new(source)),
        Compression::Zstd => Box::new(zstd::Decoder::with_buffer(source)?),
        Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(source, true, XZ_MEMORY)),
        Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(source)),
    })
}

/// Returns the decompressed content of a slice, limited by the meter.
pub(crate) fn limited<'m>(slice: &Slice, meter: &'m Meter) -> io::Result<Decoded<'m, Stream<'m>>> {
    let source = Source { inner: slice.clone(), meter };
    Ok(Decoded { inner: decoder(slice, source)?, meter })
}
