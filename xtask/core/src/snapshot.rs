//! Snapshots. A snapshot is a machine after its first boot, saved as its disk and its memory. The key of a snapshot is
//! a digest of all inputs that determine the machine. If a run has the same key, it uses the snapshot; otherwise it
//! makes another one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::arch::VmArchitecture;
use crate::digest::{Algorithm, Digest};
use crate::machine::seed::{PayloadTime, Seed};
use crate::machine::{RunFiles, xml};
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
        libvirt: String,
        content_bytes: u64,
        mut digest_of: impl FnMut(&Path) -> Result<Digest>,
    ) -> Result<Self> {
        let seed = neutral_seed(plan).files().map(|(name, content)| format!("{name}\n{content}")).concat();
        let domain = xml::domain_xml(&plan.domain(&files_of_nobody()));
        Ok(Self {
            format: FORMAT,
            image: image.0.clone(),
            image_path: image.1.to_owned(),
            seed: Algorithm::Sha256.of(seed.as_bytes()),
            domain: Algorithm::Sha256.of(domain.as_bytes()),
            firmware_code: digest_of(&plan.firmware.code)?,
            firmware_vars: digest_of(&plan.firmware.vars_template)?,
            emulator: digest_of(&plan.emulator)?,
            qemu: plan.qemu_version.clone(),
            libvirt,
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
mod tests {
    use super::*;
    use crate::cli::{Accel, ImageArgs, MachineArgs};
    use crate::host::edk2::Edk2;
    use crate::host::facts::{Facts, Guest};
    use crate::host::firmware::AarchFirmware;
    use crate::preflight::findings::tests::sound;

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
        // This comparison fails if a field was added to `Ingredients` and this table has no row for it.
        let fields = serde_json::to_value(ingredients()).unwrap().as_object().unwrap().len();
        assert_eq!(fields, changes.len());
        keys.push(key);
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), changes.len() + 1);
    }

    /// A test host: the inputs of a snapshot (a plan, an image, libvirt's version and a payload), and the files that
    /// they name.
    struct Host<'a> {
        files: &'a Path,
        facts: Facts,
        plan: Plan,
        image: Digest,
        disk: PathBuf,
        libvirt: &'static str,
        content: u64,
    }

    impl<'a> Host<'a> {
        fn new(files: &'a Path) -> Self {
            let file = |name: &str| {
                let path = files.join(name);
                std::fs::write(&path, name).unwrap();
                path
            };
            let mut facts = sound();
            let image = ImageArgs { image: Some("debian-12".to_owned()), ..ImageArgs::default() };
            let machine = MachineArgs { image, accel: Accel::Tcg, ..MachineArgs::default() };
            facts.guest = Guest::from_args(&machine, facts.arch, None).unwrap();
            facts.firmware = Ok(AarchFirmware { code: file("code"), vars_template: file("vars") });
            facts.emulator.as_mut().unwrap().as_mut().unwrap().path = file("qemu");
            let plan = Plan::resolve(&facts, 1.0).unwrap();
            let (image, disk) = (digest("image"), file("disk"));
            Self { facts, plan, image, disk, libvirt: "9.0.0", content: 9 << 20, files }
        }

        /// Changes the facts, and resolves the plan again.
        fn resolve(&mut self, change: impl FnOnce(&mut Facts)) {
            change(&mut self.facts);
            self.plan = Plan::resolve(&self.facts, 1.0).unwrap();
        }

        fn change(&self, name: &str) {
            std::fs::write(self.files.join(name), "changed").unwrap();
        }

        fn key(&self) -> String {
            let image = (&self.image, self.disk.as_path());
            let digest_of = |path: &Path| Ok(Algorithm::Sha256.of(&std::fs::read(path)?));
            let made_of =
                Ingredients::of(&self.plan, image, self.libvirt.to_owned(), self.content, digest_of).unwrap();
            made_of.key("debian-12", VmArchitecture::Aarch64)
        }
    }

    #[test]
    fn whatever_makes_another_machine_makes_another_snapshot() {
        type Change = (&'static str, fn(&mut Host<'_>));
        let changes: [Change; 18] = [
            ("the image", |host| host.image = digest("another")),
            ("the image's place", |host| host.disk = "/elsewhere/disk".into()),
            ("the login user, of the seed", |host| host.plan.image.login_user = "ubuntu".to_owned()),
            ("memory", |host| host.resolve(|facts| facts.guest.machine.memory += 1)),
            ("processors", |host| host.resolve(|facts| facts.guest.machine.vcpus += 1)),
            ("the CPU", |host| host.resolve(|facts| facts.guest.machine.cpu = Some("pi5".to_owned()))),
            ("the accelerator", |host| host.resolve(|facts| facts.guest.machine.accel = Accel::Auto)),
            ("the architecture, of the machine type", |host| {
                host.plan.spec.architecture = VmArchitecture::X86_64
            }),
            ("what max knows", |host| {
                let emulator = |facts: &mut Facts| {
                    facts.emulator.as_mut().unwrap().as_mut().unwrap().max_properties.clear()
                };
                host.resolve(emulator);
            }),
            ("a way around the firmware", |host| {
                host.resolve(|facts| facts.edk2 = Some(Edk2::new(2025, 11)));
            }),
            ("the emulator", |host| host.change("qemu")),
            ("the emulator's place", |host| {
                let moved = host.files.join("moved");
                std::fs::copy(&host.plan.emulator, &moved).unwrap();
                host.plan.emulator = moved;
            }),
            ("QEMU's version", |host| host.plan.qemu_version = "8.2.2".to_owned()),
            ("libvirt's version", |host| host.libvirt = "10.0.0"),
            ("the firmware's code", |host| host.change("code")),
            ("the firmware's variables", |host| host.change("vars")),
            ("the firmware's place", |host| {
                let moved = host.files.join("moved");
                std::fs::copy(&host.plan.firmware.code, &moved).unwrap();
                host.plan.firmware.code = moved;
            }),
            ("a payload that the disk does not hold", |host| host.content = 100 << 20),
        ];
        let files = tempfile::tempdir().unwrap();
        let usual = Host::new(files.path()).key();
        for (what, change) in changes {
            let mut host = Host::new(files.path());
            change(&mut host);
            assert_ne!(host.key(), usual, "{what} changed, but the key did not");
        }
    }

    #[test]
    fn what_makes_no_other_machine_makes_no_other_snapshot() {
        type Same = (&'static str, fn(&mut Host<'_>));
        let same: [Same; 5] = [
            ("the agent", |host| host.content += 12_345),
            ("the timeout scale", |host| host.plan = Plan::resolve(&host.facts, 7.0).unwrap()),
            ("the reason for emulation", |host| host.plan = host.plan.under_tcg("it hangs")),
            ("the fallback image", |host| host.plan.fallback = Some(host.plan.image.clone())),
            ("the expected properties of the image", |host| host.plan.image.expected = None),
        ];
        let files = tempfile::tempdir().unwrap();
        let usual = Host::new(files.path()).key();
        for (what, change) in same {
            let mut host = Host::new(files.path());
            change(&mut host);
            assert_eq!(host.key(), usual, "{what} must not change the key");
        }
    }

    #[test]
    fn a_somewhat_larger_agent_fits_the_same_disk() {
        assert_eq!(payload_bytes(13 << 20), 64 << 20);
        assert_eq!(payload_bytes(14 << 20), payload_bytes(40 << 20));
        assert!(payload_bytes(120 << 20) >= 139 << 20);
    }
}
