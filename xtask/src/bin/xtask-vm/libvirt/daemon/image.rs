//! The image of a guest on a daemon's host. It is uploaded once, under its digest, and stays there for later runs. The disk
//! of a snapshot, which lies over the image, is treated in the same way.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use virt::error::ErrorNumber;
use virt::storage_vol::StorageVol;
use virt::stream::Stream;
use xtask_core::bail_host;
use xtask_core::digest::Digest;
use xtask_core::image::Format;
use xtask_core::limits;
use xtask_core::machine::volume::NewVolume;
use xtask_core::runs::owner::{Life, OwnedVolume, Role, image_volume};

use super::run_domain::{RunDomain, path};
use super::{Daemon, remote};

/// The number of parts of an image that are compared, and the size of a part in bytes.
const PARTS: u64 = 32;
const PART_BYTES: u64 = 64 << 10;
/// The size in bytes up to which all parts are compared on a daemon of this host, and the size of such a part. The disk of
/// a snapshot is smaller.
const WHOLE_BYTES: u64 = 256 << 20;
const WHOLE_PART_BYTES: u64 = 4 << 20;

impl RunDomain {
    /// Returns the path of the image on the daemon's host. On this host, it is in `file`.
    pub(super) fn image(&mut self, digest: &Digest, file: &Path) -> Result<String> {
        let name = image_volume(digest.hex());
        let mut wait = UploadOfOthers::default();
        loop {
            self.ui.check()?;
            let Some(volume) = self.daemon.volume(&self.pool, &name)? else {
                if let Some(path) = self.upload_image(&name, file)? {
                    return Ok(path);
                }
                continue;
            };
            match self.uploader(&name)? {
                Some((run, life)) => wait.go_on(self, &volume, (&run, life))?,
                None => {
                    if let Some(path) = self.known_image(&name, &volume, file)? {
                        return Ok(path);
                    }
                }
            }
        }
    }

    /// Uses the image that an earlier run has uploaded. Returns `None` if its file no longer exists.
    fn known_image(&mut self, name: &str, volume: &StorageVol, file: &Path) -> Result<Option<String>> {
        self.record(name, Some(Role::Image))?;
        let bytes = fs_err::metadata(file)?.len();
        // With this flag, the allocation is the size of the file.
        let physical = virt::sys::VIR_STORAGE_VOL_GET_PHYSICAL;
        let found = remote::unless(ErrorNumber::NoStorageVolume, volume.info_flags(physical));
        let Some(found) = found.context("ask for the size of the image")? else {
            // Somebody has deleted the file, which libvirt lists until it reads the pool's directory again.
            self.record(name, None)?;
            self.daemon.pool(&self.pool)?.refresh(0).context("read the storage pool again")?;
            return Ok(None);
        };
        self.ui.tick("comparing the image with that of this host")?;
        if found.allocation != bytes || !self.daemon.resembles(volume, file, bytes)? {
            let delete = format!("vol-delete {name} --pool {}", self.pool);
            bail_host!(
                "the volume {name} in the pool {} is not the image of its name: an upload was cut off, or it was changed",
                self.pool;
                "delete it, and the next run uploads it again: {}", self.daemon.uri().virsh(&delete)
            );
        }
        Ok(Some(path(volume)?.to_string_lossy().into_owned()))
    }

    /// Uploads the image. Returns `None` if another run has made the volume in the meantime.
    fn upload_image(&mut self, name: &str, file: &Path) -> Result<Option<String>> {
        self.record(name, Some(Role::Upload))?;
        let new = NewVolume {
            pool: &self.pool,
            name,
            // To the pool, the image is a file like any other. The overlay names its format.
            format: Format::Raw,
            capacity: fs_err::metadata(file)?.len(),
            backing: None,
            mode: "0644",
        };
        let volume = match self.daemon.make_volume(new) {
            Ok(volume) => volume,
            Err(_) if self.daemon.volume(&self.pool, name)?.is_some() => {
                self.record(name, None)?;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let (file_name, uri) = (file.display(), self.daemon.uri());
        self.ui.note(&format!("uploading {file_name} to {uri}, once for all later runs"));
        self.daemon.upload(&volume, &self.pool, file, &self.ui)?;
        self.record(name, Some(Role::Image))?;
        Ok(Some(path(&volume)?.to_string_lossy().into_owned()))
    }

    /// Returns the run that uploads an image, if there is one, and whether it still exists.
    fn uploader(&self, name: &str) -> Result<Option<(String, Life)>> {
        for owner in self.daemon.owned()?.into_iter().filter_map(|(_, owner)| owner.ok()) {
            let uploads = |volume: &OwnedVolume| {
                (volume.role, volume.pool.as_str(), volume.name.as_str()) == (Role::Upload, &self.pool, name)
            };
            if owner.run != self.owner.run && owner.volumes.iter().any(uploads) {
                let life = owner.life()?;
                return Ok(Some((owner.run, life)));
            }
        }
        Ok(None)
    }
}

/// The wait for another run that uploads the same image.
#[derive(Default)]
struct UploadOfOthers {
    /// The size of the file, and the time at which it was first seen.
    grown: Option<(u64, Instant)>,
    /// The dead run that was to be collected.
    collected: Option<String>,
}

impl UploadOfOthers {
    /// Waits for a moment. Collects a run that is dead.
    ///
    /// # Errors
    /// Returns a failure of the host if the upload does not go on, or if the dead run cannot be collected.
    fn go_on(&mut self, own: &RunDomain, volume: &StorageVol, (run, life): (&str, Life)) -> Result<()> {
        let uri = own.daemon.uri();
        if life == Life::Dead {
            if self.collected.as_deref() == Some(run) {
                bail_host!(
                    "the run {run} died while it uploaded the image, and cannot be collected";
                    "see the message above, or remove it: {}", uri.virsh(&format!("undefine --nvram iot-xtask-{run}"))
                );
            }
            self.collected = Some(run.to_owned());
            for collected in own.daemon.collect()? {
                own.ui.line(&collected.to_string());
            }
            return Ok(());
        }
        let physical = virt::sys::VIR_STORAGE_VOL_GET_PHYSICAL;
        let bytes = volume.info_flags(physical).map_or(0, |info| info.allocation);
        let (known, since) = *self.grown.get_or_insert((bytes, Instant::now()));
        if known != bytes {
            self.grown = Some((bytes, Instant::now()));
        } else if since.elapsed() > limits::UPLOAD_SILENCE {
            let host = if let Life::OfOtherHost(host) = life {
                format!(" of the host {host}")
            } else {
                String::new()
            };
            bail_host!(
                "the run {run}{host} uploads the image, and has sent nothing for {} s", limits::UPLOAD_SILENCE.as_secs();
                "if that run has ended, remove its domain: {}", uri.virsh(&format!("undefine --nvram iot-xtask-{run}"))
            );
        }
        own.ui.tick(&format!("waiting for the run {run}, which uploads the image"))?;
        std::thread::sleep(limits::SSH_AGAIN);
        Ok(())
    }
}

/// Returns the offsets and the lengths of the parts of an image that are compared.
fn parts(bytes: u64, is_here: bool) -> Vec<(u64, u64)> {
    if is_here && bytes <= WHOLE_BYTES {
        let offsets = (0..bytes.div_ceil(WHOLE_PART_BYTES)).map(|part| part * WHOLE_PART_BYTES);
        return offsets.map(|offset| (offset, WHOLE_PART_BYTES.min(bytes - offset))).collect();
    }
    let last = bytes.saturating_sub(PART_BYTES);
    let offsets = (0..PARTS).map(|part| last / (PARTS - 1) * part);
    offsets.map(|offset| (offset, PART_BYTES.min(bytes - offset))).collect()
}

impl Daemon {
    /// Returns whether parts of a volume, among them the first and the last one, are those of a file. A whole image would
    /// take as long to read as to upload. A small volume is compared completely if the daemon is on this host.
    fn resembles(&self, volume: &StorageVol, file: &Path, bytes: u64) -> Result<bool> {
        let mut file = File::open(file).with_context(|| format!("open {}", file.display()))?;
        for (offset, length) in parts(bytes, self.uri.destination.is_none()) {
            let mut own = vec![0; usize::try_from(length).context("read a part of the image")?];
            file.seek(SeekFrom::Start(offset))?;
            file.read_exact(&mut own)?;
            if own != self.part_of(volume, offset, length)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn part_of(&self, volume: &StorageVol, offset: u64, length: u64) -> Result<Vec<u8>> {
        let stream = Stream::new(&self.connect, 0).context("open a stream")?;
        volume.download(&stream, offset, length, 0).context("read the image in the storage pool")?;
        let (mut part, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
        loop {
            let count =
                usize::try_from(stream.recv(&mut buffer).context("read the image in the storage pool")?)?;
            if count == 0 {
                break;
            }
            part.extend(&buffer[..count]);
            ensure!(part.len() as u64 <= length, "libvirt sends more of the image than was asked for");
        }
        stream.finish().context("read the image in the storage pool")?;
        Ok(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_volume_of_this_host_is_compared_completely() {
        let sum = |parts: &[(u64, u64)]| parts.iter().map(|(_, length)| length).sum::<u64>();
        let bytes = (9 << 20) + 1;
        let small = parts(bytes, true);
        assert_eq!((small.len(), sum(&small), small[2]), (3, bytes, (8 << 20, (1 << 20) + 1)));
        for (bytes, is_here) in [(bytes, false), (WHOLE_BYTES + 1, true)] {
            let parts = parts(bytes, is_here);
            assert_eq!((parts.len(), sum(&parts)), (32, 32 * PART_BYTES));
            assert_eq!(parts[0].0, 0);
        }
        assert_eq!(parts(1000, false)[31], (0, 1000));
    }
}
