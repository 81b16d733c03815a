//! Snapshots: a machine that has been through its first boot, kept as a disk and as its memory. Everything that could make it
//! another machine is part of its key, so that a snapshot is the right one or is made anew; nothing is ever adapted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::arch::VmArchitecture;
use crate::digest::{Algorithm, Digest};
use crate::machine::seed::{PayloadTime, Seed};
use crate::machine::{RunFiles, xml};
use crate::plan::Plan;

/// Of what a snapshot is and of how it is made; whoever changes either makes it one more.
pub const FORMAT: u32 = 5;

/// The manifest's name in a snapshot's directory.
pub const MANIFEST: &str = "snapshot.json";
/// The saved overlay over the image.
pub const DISK: &str = "disk.qcow2";
/// The machine's memory and devices, as libvirt saves them.
pub const RAM: &str = "ram.save";
/// The variable store as the first boot left it.
pub const NVRAM: &str = "nvram.fd";
/// The cloud-init seed of the first boot, which later boots read too.
pub const SEED: &str = "seed.img";
/// In a snapshot that was found changed: how. Nobody uses it from then on.
pub const BAD: &str = "bad";
/// All that a snapshot is.
pub const FILES: [&str; 4] = [DISK, RAM, NVRAM, SEED];

/// What a snapshot is made of. Each field is part of its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ingredients {
    /// [`FORMAT`].
    pub format: u32,
    /// The image's disk.
    pub image: Digest,
    /// Where that is: the saved disk names it.
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
    pub qemu: String,
    /// libvirt's version.
    pub libvirt: String,
    /// Bytes of the disk that the agent comes on.
    pub payload_bytes: u64,
}

impl Ingredients {
    /// What a snapshot of this plan's machine is made of, with the image's disk, for a payload with this much content.
    ///
    /// # Errors
    /// Those of `digest_of`, which takes the SHA-256 of a file of this host.
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

    /// The key, as a directory's name: for people the image and the architecture, then what tells it apart.
    pub fn key(&self, image: &str, arch: VmArchitecture) -> String {
        let text = serde_json::to_string(self).expect("ingredients are plain data");
        let digest = Algorithm::Sha256.of(text.as_bytes());
        format!("{image}-{arch}-{}", &digest.hex()[..16])
    }
}

/// `snapshot.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SnapshotManifest {
    /// What it is made of.
    pub ingredients: Ingredients,
    pub image: String,
    pub arch: VmArchitecture,
    /// The machine's identity (SMBIOS), which its memory knows.
    pub uuid: String,
    /// When it was made, RFC 3339, UTC.
    pub made_at: String,
    /// The run that made it.
    pub made_by: String,
    /// Its files, and what they were when they were saved.
    pub files: BTreeMap<String, SavedFile>,
}

/// A file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFile {
    /// SHA-256 of its content.
    pub digest: Digest,
    /// How long it is.
    pub bytes: u64,
}

impl SnapshotManifest {
    /// The snapshot in a directory.
    ///
    /// # Errors
    /// Where there is no manifest that can be read. Whether the files are what was saved is for whoever hashes them.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(MANIFEST);
        let text = fs_err::read(&path)?;
        serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|file| file.bytes).sum()
    }
}

/// The seed of a snapshot's machine, without what is each run's own.
pub fn neutral_seed(plan: &Plan) -> Seed<'_> {
    Seed {
        instance_id: "",
        login_user: &plan.image.login_user,
        authorized_key: "",
        host_private_key: "",
        host_public_key: "",
        sabotage: None,
        payload: PayloadTime::Awaited,
    }
}

/// In place of a run's own files, so that its domain says nothing of the run.
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
        uuid: "00000000-0000-0000-0000-000000000000".to_owned(),
    }
}

/// The payload disk's size for this much content: so large that another build of the agent is no other snapshot.
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
        // A field that is added without a row here is found by its count.
        let fields = serde_json::to_value(ingredients()).unwrap().as_object().unwrap().len();
        assert_eq!(fields, changes.len());
        keys.push(key);
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), changes.len() + 1);
    }

    /// What this host is to a snapshot: a plan, an image, libvirt and a payload; and the files that they name.
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
            facts.guest = Guest::from_args(&machine, facts.arch).unwrap();
            facts.firmware = Ok(AarchFirmware { code: file("code"), vars_template: file("vars") });
            facts.emulator.as_mut().unwrap().as_mut().unwrap().path = file("qemu");
            let plan = Plan::resolve(&facts, 1.0).unwrap();
            let (image, disk) = (digest("image"), file("disk"));
            Self { facts, plan, image, disk, libvirt: "9.0.0", content: 9 << 20, files }
        }

        /// Resolves the plan again on another host or for another machine.
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
            assert_ne!(host.key(), usual, "{what} is changed, and the snapshot is the same");
        }
    }

    #[test]
    fn what_makes_no_other_machine_makes_no_other_snapshot() {
        type Same = (&'static str, fn(&mut Host<'_>));
        let same: [Same; 5] = [
            ("the agent", |host| host.content += 12_345),
            ("patience", |host| host.plan = Plan::resolve(&host.facts, 7.0).unwrap()),
            ("why it is emulated", |host| host.plan = host.plan.under_tcg("it hangs")),
            ("what would stand in for its image", |host| host.plan.fallback = Some(host.plan.image.clone())),
            ("what its image is checked against", |host| host.plan.image.expected = None),
        ];
        let files = tempfile::tempdir().unwrap();
        let usual = Host::new(files.path()).key();
        for (what, change) in same {
            let mut host = Host::new(files.path());
            change(&mut host);
            assert_eq!(host.key(), usual, "{what} is changed, and the snapshot is another one");
        }
    }

    #[test]
    fn a_somewhat_larger_agent_fits_the_same_disk() {
        assert_eq!(payload_bytes(13 << 20), 64 << 20);
        assert_eq!(payload_bytes(14 << 20), payload_bytes(40 << 20));
        assert!(payload_bytes(120 << 20) >= 139 << 20);
    }
}
