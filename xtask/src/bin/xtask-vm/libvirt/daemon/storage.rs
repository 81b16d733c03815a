//! Makes volumes in a storage pool of a daemon, and uploads files into them.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use rustix::fs::SeekFrom;
use virt::error::Error;
use virt::storage_vol::StorageVol;
use virt::stream::Stream;
use xtask_core::error::{Failure, host_fault};
use xtask_core::format::human_bytes;
use xtask_core::machine::volume::NewVolume;
use xtask_jobs::Ui;

use super::Daemon;

/// The number of bytes that are sent at a time. libvirt's messages have at most 256 KiB of a stream.
const CHUNK: usize = 256 << 10;

impl Daemon {
    /// Makes a volume. libvirt refuses a name that already exists.
    pub(super) fn make_volume(&self, new: NewVolume<'_>) -> Result<StorageVol> {
        let NewVolume { pool, name, .. } = new;
        StorageVol::create_xml(&self.pool(pool)?, &new.xml(), 0)
            .map_err(|error| self.of_pool(error.into(), pool, &format!("make the volume {name}")))
    }

    /// Uploads a file into a volume. Holes in the file become holes in the volume.
    pub(super) fn upload(&self, volume: &StorageVol, pool: &str, file: &Path, ui: &Ui) -> Result<()> {
        let attempted = format!("upload {} to {}", file.display(), self.uri());
        self.send(volume, file, ui).map_err(|error| self.of_pool(error, pool, &attempted))
    }

    fn send(&self, volume: &StorageVol, path: &Path, ui: &Ui) -> Result<()> {
        let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        let bytes = file.metadata()?.len();
        let stream = Stream::new(&self.connect, 0).context("open a stream")?;
        volume.upload(&stream, 0, bytes, virt::sys::VIR_STORAGE_VOL_UPLOAD_SPARSE_STREAM)?;
        let sent = send_all(&stream, &mut file, bytes, |sent| {
            ui.tick(&format!("uploading {}: {} of {}", name(path), human_bytes(sent), human_bytes(bytes)))
        });
        match sent {
            // The daemon reports an error of its disk, such as a full one, only here.
            Ok(()) => Ok(stream.finish().context("complete the upload")?),
            Err(error) => {
                // The first error is the cause. The stream is closed in any case.
                let _ = stream.abort();
                Err(error)
            }
        }
    }

    /// Attributes an error to the host. The remedy depends on whether the pool is full.
    fn of_pool(&self, error: anyhow::Error, pool: &str, attempted: &str) -> anyhow::Error {
        let words = format!("{error:#}");
        if xtask_core::error::failure(&error).is_some() {
            return error;
        }
        if is_full(&words) {
            let list = self.uri().virsh(&format!("vol-list {pool} --details"));
            return error.context(Failure::host(
                format!("{attempted}: the storage pool {pool} is full"),
                format!("free some space ({list}), or choose another pool with --pool NAME"),
            ));
        }
        host_fault(error, attempted.to_owned(), "see the cause; nothing is known about the agent")
    }
}

/// Returns whether an error of libvirt says that the file system of a pool is full (ENOSPC, EDQUOT).
fn is_full(words: &str) -> bool {
    ["No space left on device", "Disk quota exceeded"].iter().any(|sign| words.contains(sign))
}

/// Sends `bytes` bytes of a file, data and holes. Calls `progress` with the number of bytes after each part.
fn send_all(
    stream: &Stream,
    file: &mut File,
    bytes: u64,
    mut progress: impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < bytes {
        progress(at)?;
        // ENXIO says that only a hole follows (lseek(2)).
        let data = match rustix::fs::seek(&*file, SeekFrom::Data(at)) {
            Err(rustix::io::Errno::NXIO) => bytes,
            data => data.context("find the data of a sparse file")?,
        };
        if data > at {
            send_hole(stream, data - at)?;
            at = data;
            continue;
        }
        let hole = rustix::fs::seek(&*file, SeekFrom::Hole(at)).context("find the holes of a sparse file")?;
        rustix::fs::seek(&*file, SeekFrom::Start(at)).context("read the file")?;
        let wanted = usize::try_from(hole.min(bytes) - at).unwrap_or(CHUNK).min(CHUNK);
        let read = file.read(&mut buffer[..wanted])?;
        if read == 0 {
            return Err(anyhow!("the file became shorter while it was read"));
        }
        send_part(stream, &buffer[..read])?;
        at += read as u64;
    }
    Ok(())
}

fn send_part(stream: &Stream, mut data: &[u8]) -> Result<()> {
    while !data.is_empty() {
        let sent = stream.send(data).context("send data")?;
        data = &data[usize::try_from(sent).context("send data")?..];
    }
    Ok(())
}

/// Sends a hole (virStreamSendHole), which the crate virt 0.5 does not wrap.
fn send_hole(stream: &Stream, bytes: u64) -> Result<()> {
    let length = i64::try_from(bytes).context("a hole is too large")?;
    // SAFETY: the stream lives as long as `stream`.
    let sent = unsafe { virt::sys::virStreamSendHole(stream.as_ptr(), length, 0) };
    if sent < 0 { Err(Error::last_error()).context("send a hole") } else { Ok(()) }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_pool_is_told_from_another_error() {
        for (words, expected) in [
            ("cannot fill file '/pool/x': No space left on device", true),
            ("cannot write to stream: Disk quota exceeded", true),
            ("cannot open file '/pool/x': Permission denied", false),
        ] {
            assert_eq!(is_full(words), expected, "{words}");
        }
    }
}
