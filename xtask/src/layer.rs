//! Warm layers: a machine that has been through its first boot, kept as a disk and as its memory. Everything that could make it
//! another machine is part of its key, so that a layer is the right one or is made anew; nothing is ever adapted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::arch::VmArchitecture;
use crate::digest::{Algorithm, Digest};

/// Of what a layer is and of how it is made; whoever changes either makes it one more.
pub const FORMAT: u32 = 5;

/// The manifest's name in a layer's directory.
pub const MANIFEST: &str = "layer.json";
/// The frozen overlay over the image.
pub const DISK: &str = "disk.qcow2";
/// The machine's memory and devices, as libvirt saves them.
pub const RAM: &str = "ram.save";
/// The variable store as the first boot left it.
pub const NVRAM: &str = "nvram.fd";
/// The cloud-init seed of the first boot, which later boots read too.
pub const SEED: &str = "seed.img";
/// In a layer that was found changed: how. Nobody uses it from then on.
pub const BAD: &str = "bad";
/// All that a layer is.
pub const FILES: [&str; 4] = [DISK, RAM, NVRAM, SEED];

/// What a layer is made of. Each field is part of its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ingredients {
    /// [`FORMAT`].
    pub format: u32,
    /// The image's disk.
    pub image: Digest,
    /// Where that is: the frozen disk names it.
    pub image_path: PathBuf,
    /// The cloud-init seed, without what is each run's own: keys and identity.
    pub seed: Digest,
    /// The domain's XML, with no path of a run in it: the machine type, the CPU and its flags, the accelerator, memory, processors and
    /// devices.
    pub domain: Digest,
    /// The firmware's code.
    pub firmware_code: Digest,
    /// The template of its variables.
    pub firmware_vars: Digest,
    /// The emulator's executable.
    pub emulator: Digest,
    /// Its version.
    pub qemu: String,
    /// libvirt's version.
    pub libvirt: String,
    /// Bytes of the disk that the agent comes on.
    pub payload_bytes: u64,
}

impl Ingredients {
    /// The key, as a directory's name: for people the image and the architecture, then what tells it apart.
    pub fn key(&self, image: &str, arch: VmArchitecture) -> String {
        let text = serde_json::to_string(self).expect("ingredients are plain data");
        let digest = Algorithm::Sha256.of(text.as_bytes());
        format!("{image}-{arch}-{}", &digest.hex()[..16])
    }
}

/// `layer.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Layer {
    /// What it is made of.
    pub ingredients: Ingredients,
    /// The image's name.
    pub image: String,
    /// The architecture.
    pub arch: VmArchitecture,
    /// The machine's identity (SMBIOS), which its memory knows.
    pub uuid: String,
    /// When it was made, RFC 3339, UTC.
    pub made_at: String,
    /// The run that made it.
    pub made_by: String,
    /// Its files, and what they were when they were frozen.
    pub files: BTreeMap<String, Frozen>,
}

/// A file of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// SHA-256 of its content.
    pub digest: Digest,
    /// How long it is.
    pub bytes: u64,
}

impl Layer {
    /// The layer in a directory.
    ///
    /// # Errors
    /// Where there is no manifest that can be read. Whether the files are what was frozen is for whoever hashes them.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(MANIFEST);
        let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|file| file.bytes).sum()
    }
}

/// The payload disk's size for this much content: so large that another build of the agent is no other layer.
pub fn payload_bytes(content: u64) -> u64 {
    const LEAST: u64 = 64 << 20;
    (content + content / 8 + (4 << 20)).next_power_of_two().max(LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(text: &str) -> Digest {
        Algorithm::Sha256.of(text.as_bytes())
    }

    fn ingredients() -> Ingredients {
        Ingredients {
            format: FORMAT,
            image: digest("image"),
            image_path: "/images/a/disk".into(),
            seed: digest("seed"),
            domain: digest("domain"),
            firmware_code: digest("code"),
            firmware_vars: digest("vars"),
            emulator: digest("emulator"),
            qemu: "7.2.22".to_owned(),
            libvirt: "9.0.0".to_owned(),
            payload_bytes: 64 << 20,
        }
    }

    #[test]
    fn each_ingredient_makes_another_key_and_nothing_else_does() {
        let arch = VmArchitecture::Aarch64;
        let key = ingredients().key("debian-12", arch);
        assert_eq!(key, ingredients().key("debian-12", arch));
        type Change = fn(&mut Ingredients);
        let changes: [Change; 11] = [
            |i| i.format += 1,
            |i| i.image = digest("another"),
            |i| i.image_path = "/images/b/disk".into(),
            |i| i.seed = digest("another"),
            |i| i.domain = digest("another"),
            |i| i.firmware_code = digest("another"),
            |i| i.firmware_vars = digest("another"),
            |i| i.emulator = digest("another"),
            |i| i.qemu.push('1'),
            |i| i.libvirt.push('1'),
            |i| i.payload_bytes *= 2,
        ];
        let mut keys: Vec<String> = changes
            .iter()
            .map(|change| {
                let mut changed = ingredients();
                change(&mut changed);
                changed.key("debian-12", arch)
            })
            .collect();
        // A field that is added without a row here is found by its count.
        let fields = serde_json::to_value(ingredients()).unwrap().as_object().unwrap().len();
        assert_eq!(fields, changes.len());
        keys.push(key);
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), changes.len() + 1);
    }

    #[test]
    fn a_somewhat_larger_agent_fits_the_same_disk() {
        assert_eq!(payload_bytes(13 << 20), 64 << 20);
        assert_eq!(payload_bytes(14 << 20), payload_bytes(40 << 20));
        assert!(payload_bytes(120 << 20) >= 139 << 20);
    }
}
