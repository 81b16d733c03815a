//! Which changes make another snapshot, and which do not.

use super::*;
use crate::cache::Cache;
use crate::cli::{Accel, ImageArgs, MachineArgs, Network};
use crate::host::edk2::Edk2;
use crate::host::facts::{Facts, Guest};
use crate::host::firmware::AarchFirmware;
use crate::preflight::findings::tests::sound;
use crate::runs::RunDir;
use crate::runs::owner::Owner;

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
    daemon: Option<(DaemonDomain, PathBuf)>,
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
        Self { facts, plan, image, disk, libvirt: "9.0.0", daemon: None, content: 9 << 20, files }
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
        let firmware = self.plan.own_firmware().unwrap().clone();
        let platform = Platform { libvirt: self.libvirt.to_owned(), firmware, daemon: self.daemon.clone() };
        let made_of = Ingredients::of(&self.plan, image, &platform, self.content, digest_of).unwrap();
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
            let emulator =
                |facts: &mut Facts| facts.emulator.as_mut().unwrap().as_mut().unwrap().max_properties.clear();
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
            std::fs::copy(&host.plan.own_firmware().unwrap().code, &moved).unwrap();
            host.plan.firmware.as_mut().unwrap().code = moved;
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

/// Returns the platform's part of a machine that a new run has on a daemon.
fn on_daemon(files: &Path, change: impl FnOnce(&mut DaemonDomain)) -> Option<(DaemonDomain, PathBuf)> {
    let (run, _) = RunDir::create(&Cache::at(files), || Ok(())).unwrap();
    let owner = Owner::of(&run).unwrap();
    let volumes = ["disk.qcow2", "seed.img", "payload.img"].map(|name| format!("{}-{name}", owner.domain()));
    let mut daemon = DaemonDomain {
        owner,
        pool: "default".to_owned(),
        volumes,
        network: Network::User,
        mac: GUEST_MAC.to_owned(),
        host: None,
        is_restricted: true,
        is_incoming: false,
    };
    change(&mut daemon);
    Some((daemon, "/pool".into()))
}

#[test]
fn the_runs_of_a_daemon_share_a_snapshot() {
    let files = tempfile::tempdir().unwrap();
    let mut host = Host::new(files.path());
    let embedded = host.key();
    let mut key = |daemon| {
        host.daemon = daemon;
        host.key()
    };
    let own = key(on_daemon(files.path(), |_| ()));
    assert_ne!(own, embedded);
    assert_eq!(own, key(on_daemon(files.path(), |_| ())), "another run");
    assert_eq!(own, key(on_daemon(files.path(), |daemon| daemon.is_restricted = false)));
    assert_eq!(own, key(on_daemon(files.path(), |daemon| daemon.is_incoming = true)));
    assert_ne!(own, key(on_daemon(files.path(), |daemon| daemon.pool = "fast".to_owned())));
    let moved = on_daemon(files.path(), |_| ()).map(|(daemon, _)| (daemon, "/elsewhere".into()));
    assert_ne!(own, key(moved), "the saved disk names the image's path");
}

#[test]
fn a_somewhat_larger_agent_fits_the_same_disk() {
    assert_eq!(payload_bytes(13 << 20), 64 << 20);
    assert_eq!(payload_bytes(14 << 20), payload_bytes(40 << 20));
    assert!(payload_bytes(120 << 20) >= 139 << 20);
}
