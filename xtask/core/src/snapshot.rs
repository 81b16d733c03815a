//! Snapshots. A snapshot is a machine after its first boot, saved as its disk and its memory. The key of a snapshot is
//! a digest of all inputs that determine the machine. If a run has the same key, it uses the snapshot; otherwise it
//! makes another one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::arch::VmArchitecture;
use crate::digest::{Algorithm, Digest};
use crate::host::firmware::AarchFirmware;
use crate::machine::seed::{PayloadTime, Seed};
use crate::machine::{DOMAIN_NAME, DaemonDomain, DomainXmlParams, GUEST_MAC, RunFiles, xml};
use crate::plan::Plan;

/// The version of the format of snapshots and of the way in which they are made. Raise this number if one of the two
/// changes.
pub const FORMAT: u32 = 5;

/// The file name of the manifest in a snapshot's directory.
pub const MANIFEST: &str = "snapshot.json";
/// The machine's disk, an overlay over the image.
pub const DISK: &str = "disk.qcow2";
/// The memory and the devices of the machine, in libvirt's format of saved machines.
pub const RAM: &str = "ram.save";
/// The UEFI variables after the first boot.
pub const NVRAM: &str = "nvram.fd";
/// The cloud-init seed of the first boot. Later boots read it too.
pub const SEED: &str = "seed.img";
/// The file that marks a snapshot as unusable, because a file of the snapshot was changed or the snapshot does not
/// restore. It contains the reason.
pub const BAD: &str = "bad";
/// The files of a snapshot.
pub const FILES: [&str; 4] = [DISK, RAM, NVRAM, SEED];
/// The files of a snapshot of a machine on a libvirt daemon. Its memory contains the UEFI variables, which QEMU writes to
/// their file when the restored machine runs.
pub const FILES_ON_DAEMON: [&str; 3] = [DISK, RAM, SEED];

/// The libvirt that makes and restores a snapshot, and its firmware.
#[derive(Debug, Clone)]
pub struct Platform {
    /// The version of libvirt.
    pub libvirt: String,
    pub firmware: AarchFirmware,
    /// The part of the domain that only a domain on a daemon has, and the directory of its storage pool. `None` for the
    /// embedded driver.
    pub daemon: Option<(DaemonDomain, PathBuf)>,
}

impl Platform {
    /// Returns the domain's XML without the parts that differ in each run.
    fn domain_xml(&self, plan: &Plan) -> String {
        let params = plan.domain(&files_of_nobody());
        let Some((daemon, directory)) = &self.daemon else { return xml::domain_xml(&params) };
        // Only a restored machine is incoming, and the network of a first boot may be open for packages.
        let daemon = DaemonDomain { is_restricted: true, is_incoming: false, ..daemon.clone() };
        let (record, name) = (daemon.owner.element_in_domain(), daemon.owner.domain());
        let xml = xml::domain_xml(&DomainXmlParams { daemon: Some(daemon), ..params });
        // The saved disk names the path of the image, which is in this directory.
        format!("{}{}", xml.replace(&record, "").replace(&name, DOMAIN_NAME), directory.display())
    }
}

/// The inputs of a snapshot. Each field is part of the key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ingredients {
    /// The format version, [`FORMAT`].
    pub format: u32,
    /// The digest of the image's disk.
    pub image: Digest,
    /// The path of the image's disk. It is an input because the saved disk names this path as its backing file.
    pub image_path: PathBuf,
    /// The digest of the cloud-init seed. The keys and the instance id, which differ in each run, are left out of the
    /// seed.
    pub seed: Digest,
    /// The digest of the domain XML, in which placeholders replace the paths of a run. It covers the machine type, the
    /// CPU and its flags, the accelerator, memory, processors and devices.
    pub domain: Digest,
    /// The digest of the firmware's code.
    pub firmware_code: Digest,
    /// The digest of the template of the firmware's variables.
    pub firmware_vars: Digest,
    /// The digest of the emulator's executable.
    pub emulator: Digest,
    pub qemu: String,
    pub libvirt: String,
    /// The size in bytes of the payload's disk.
    pub payload_bytes: u64,
}

impl Ingredients {
    /// Returns the inputs of a snapshot of this plan's machine. `image` is the digest and the path of the image's disk.
    /// `content_bytes` is the size of the files on the payload's disk.
    ///
    /// # Errors
    /// Returns the errors of `digest_of`, a function that returns the SHA-256 digest of a file.
    pub fn of(
        plan: &Plan,
        image: (&Digest, &Path),
        platform: &Platform,
        content_bytes: u64,
        mut digest_of: impl FnMut(&Path) -> Result<Digest>,
    ) -> Result<Self> {
        let seed = neutral_seed(plan).files().map(|(name, content)| format!("{name}\n{content}")).concat();
        let (domain, firmware) = (platform.domain_xml(plan), &platform.firmware);
        Ok(Self {
            format: FORMAT,
            image: image.0.clone(),
            image_path: image.1.to_owned(),
            seed: Algorithm::Sha256.of(seed.as_bytes()),
            domain: Algorithm::Sha256.of(domain.as_bytes()),
            firmware_code: digest_of(&firmware.code)?,
            firmware_vars: digest_of(&firmware.vars_template)?,
            emulator: digest_of(&plan.emulator)?,
            qemu: plan.qemu_version.clone(),
            libvirt: platform.libvirt.clone(),
            payload_bytes: payload_bytes(content_bytes),
        })
    }

    /// Returns the key, with which the name of the snapshot's directory begins: the image and the architecture, which
    /// are for people, and a digest.
    pub fn key(&self, image: &str, arch: VmArchitecture) -> String {
        let text = serde_json::to_string(self).expect("ingredients are plain data");
        let digest = Algorithm::Sha256.of(text.as_bytes());
        format!("{image}-{arch}-{}", &digest.hex()[..16])
    }
}

/// The contents of `snapshot.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotManifest {
    /// The inputs of the snapshot.
    pub ingredients: Ingredients,
    pub image: String,
    pub arch: VmArchitecture,
    /// The UUID of the machine (SMBIOS). A restored machine must have the same UUID, because it is in the saved memory.
    pub uuid: String,
    /// The time at which the snapshot was made, in RFC 3339, UTC.
    pub made_at: String,
    pub made_by: String,
    /// The files of the snapshot, with their digests and sizes when they were saved.
    pub files: BTreeMap<String, SavedFile>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFile {
    /// The SHA-256 digest of the content.
    pub digest: Digest,
    pub bytes: u64,
}

impl SnapshotManifest {
    /// Reads the manifest of the snapshot in a directory.
    ///
    /// # Errors
    /// Returns an error if the manifest cannot be read or parsed. This function does not check whether the files are
    /// unchanged.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(MANIFEST);
        let text = fs_err::read(&path)?;
        serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
    }

    /// Returns the size of all files in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|file| file.bytes).sum()
    }
}

/// Returns the seed for the machine of a snapshot. The values that differ in each run are empty.
pub fn neutral_seed(plan: &Plan) -> Seed<'_> {
    Seed {
        instance_id: "",
        login_user: &plan.image.login_user,
        authorized_key: "",
        host_private_key: "",
        host_public_key: "",
        sabotage: None,
        payload: PayloadTime::Awaited,
        proxies: &plan.proxies,
        mac: GUEST_MAC,
    }
}

/// Returns placeholders for the files of a run, so that the domain XML does not depend on the run.
fn files_of_nobody() -> RunFiles {
    let nowhere = |name: &str| Path::new("/").join(name);
    RunFiles {
        overlay: nowhere("disk"),
        backing: Vec::new(),
        seed: nowhere("seed"),
        payload: nowhere("payload"),
        nvram: nowhere("nvram"),
        console_log: nowhere("console"),
        console_socket: nowhere("console.sock"),
        markers_log: nowhere("markers"),
        root_socket: nowhere("root.sock"),
        uuid: "00000000-0000-0000-0000-000000000000".to_owned(),
    }
}

/// Returns the size of the payload's disk, given the size of the files on it. The size is rounded up generously, so
/// that another build of the agent usually fits into the same snapshot.
fn payload_bytes(content: u64) -> u64 {
    const LEAST: u64 = 64 << 20;
    (content + content / 8 + (4 << 20)).next_power_of_two().max(LEAST)
}

#[cfg(test)]
mod tests;
