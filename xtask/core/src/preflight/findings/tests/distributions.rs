//! Evaluates the facts about hosts with six distributions. The hosts have either architecture, with KVM and without,
//! and either have everything installed or only Rust. They are evaluated for guests of either architecture. A golden
//! file has one row with the findings of each combination.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::super::*;
use super::{linking, sound};
use crate::arch::VmArchitecture;
use crate::build::linker::{Unfit, UnfitKind};
use crate::host::edk2::Edk2;
use crate::host::firmware;
use crate::host::kvm::Kvm;
use crate::host::local::PROGRAMS;
use crate::host::packages::{Need, PackageManager};
use crate::preflight::{Preflight, fix};

#[derive(Deserialize)]
struct Distributions {
    distribution: Vec<Distribution>,
}

#[derive(Deserialize)]
struct Distribution {
    name: String,
    os: Os,
    package_manager: PackageManager,
    qemu: String,
    libvirt: String,
    libvirt_driver: PathBuf,
    nats_server: String,
    libc: String,
    edk2: String,
    files: Vec<FirmwareFile>,
    descriptors: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Os {
    name: String,
    id: String,
    version_id: String,
}

#[derive(Deserialize)]
struct FirmwareFile {
    path: String,
    bytes: u64,
}

#[derive(Deserialize)]
struct Descriptor {
    name: String,
    arch: String,
    machine: String,
    code: String,
    vars: String,
    format: String,
    features: Vec<String>,
}

/// The state of a machine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Complete,
    /// Only Rust is installed, with pkg-config and a linker for the host, as Rust's own documentation requires.
    Bare,
}

impl Distribution {
    /// Writes the files of the distribution's firmware packages below `root`.
    fn install_firmware(&self, root: &Path) {
        let below = |path: &str| root.join(path.trim_start_matches('/'));
        for file in &self.files {
            let path = below(&file.path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::File::create(path).unwrap().set_len(file.bytes).unwrap();
        }
        let directory = below("usr/share/qemu/firmware");
        std::fs::create_dir_all(&directory).unwrap();
        for descriptor in &self.descriptors {
            let Descriptor { name, arch, machine, code, vars, format, features } = descriptor;
            let text = serde_json::json!({
                "description": name,
                "interface-types": ["uefi"],
                "mapping": {
                    "device": "flash",
                    "executable": { "filename": code, "format": format },
                    "nvram-template": { "filename": vars, "format": format },
                },
                "targets": [{ "architecture": arch, "machines": [machine] }],
                "features": features,
                "tags": [],
            });
            std::fs::write(directory.join(format!("{name}.json")), text.to_string()).unwrap();
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one for each column of the table of hosts")]
    fn facts(
        &self,
        root: &Path,
        host: VmArchitecture,
        guest: VmArchitecture,
        kvm: bool,
        state: State,
    ) -> Facts {
        let mut facts = sound();
        facts.arch = guest;
        let Os { name, id, version_id } = &self.os;
        facts.host.os = crate::os_release::OsRelease {
            name: name.clone(),
            id: id.clone(),
            version_id: version_id.clone(),
        };
        facts.host.package_manager = Some(self.package_manager);
        facts.host.libvirt = Ok(self.libvirt.clone());
        facts.host.libvirt_driver = Some(self.libvirt_driver.clone());
        facts.host.nats_server = Some(Ok(self.nats_server.clone()));
        facts.linker = linking(&self.libc, true);
        facts.firmware = firmware::discover(guest, root);
        let (year, month) = self.edk2.split_once('.').unwrap();
        let described = guest.pick(false, true) && facts.firmware.is_ok();
        facts.edk2 = described.then(|| Edk2::new(year.parse().unwrap(), month.parse().unwrap()));
        if let Some(Ok(emulator)) = &mut facts.emulator {
            emulator.version.clone_from(&self.qemu);
            emulator.path = Path::new("/usr/bin").join(guest.profile().emulator);
        }
        facts.kvm = match (host == guest, kvm) {
            (false, _) => Kvm::Foreign(format!("the host is {host} and the guest {guest}")),
            (true, true) => Kvm::Opens,
            (true, false) => Kvm::Absent("/dev/kvm does not open: No such file or directory".into()),
        };
        facts.runs_guest_programs = host == guest || state == State::Complete;
        // If the distribution has no package of a program, the program is missing even on a complete machine.
        let installable = |need: Need| !self.package_manager.packages(need, guest).is_empty();
        let programs = PROGRAMS.iter().copied();
        facts.host.missing_programs =
            programs.filter(|(_, need, _)| state == State::Bare || !installable(*need)).collect();
        if state == State::Bare {
            self.strip(&mut facts, host == guest);
        }
        facts
    }

    fn strip(&self, facts: &mut Facts, native: bool) {
        facts.emulator = None;
        facts.edk2 = None;
        facts.firmware = firmware::discover(facts.arch, Path::new("/nonexistent"));
        facts.host.libvirt = Err("pkg-config is missing".into());
        (facts.host.pkg_config.program, facts.host.libvirt_header) = (None, false);
        facts.host.libvirt_driver = None;
        facts.host.libvirt_iohelper = false;
        facts.host.nats_server = None;
        facts.host.debian_keyring = false;
        facts.host.missing_libvirt_user =
            Ok((self.package_manager == PackageManager::Apt).then_some("libvirt-qemu"));
        facts.user_emulator = false;
        if !native {
            let text = "run the linker: No such file or directory".to_owned();
            let remedy = String::new();
            facts.linker = Err(Unfit { kind: UnfitKind::Missing, reason: text, remedy, is_users: false });
            facts.rust_target = Ok(false);
        }
    }
}

/// Formats the ids of the findings that block, degrade and inform, and the commands that repair them.
fn row(preflight: &Preflight) -> String {
    let mut text = String::new();
    for (word, severity) in
        [("blocks", Severity::Blocks), ("degrades", Severity::Degrades), ("informs", Severity::Informs)]
    {
        let of = preflight.findings.iter().filter(|finding| finding.severity == severity);
        let ids: Vec<_> = of
            .map(|finding| match finding.id {
                "program" => finding.sentence.split(' ').next().unwrap(),
                id => id,
            })
            .collect();
        if !ids.is_empty() {
            write!(text, "\n    {word}: {}", ids.join(", ")).unwrap();
        }
    }
    for command in fix::plan(preflight) {
        write!(text, "\n    fix: {}", command.join(" ")).unwrap();
    }
    text
}

fn distributions() -> Vec<Distribution> {
    let text = include_str!("../../../../test_data/hosts/distributions.toml");
    let Distributions { distribution } = toml::from_str(text).unwrap();
    distribution
}

#[test]
fn what_is_said_of_each_distribution() {
    let (mut golden, mut rows) = (String::new(), 0);
    for distribution in &distributions() {
        let root = tempfile::tempdir().unwrap();
        distribution.install_firmware(root.path());
        for (state, how) in [(State::Complete, "complete"), (State::Bare, "bare")] {
            for host in VmArchitecture::ALL {
                for guest in VmArchitecture::ALL {
                    for (kvm, device) in [(true, "with KVM"), (false, "without KVM")] {
                        let facts = distribution.facts(root.path(), host, guest, kvm, state);
                        let preflight = Preflight::evaluate(vec![facts]);
                        let ready = preflight.verdict().is_ok();
                        assert_eq!(ready, state == State::Complete, "{} {how}", distribution.name);
                        let output = row(&preflight);
                        let name = &distribution.name;
                        writeln!(golden, "{name}, {how}, {host} host {device}, {guest} guest{output}")
                            .unwrap();
                        rows += 1;
                    }
                }
            }
        }
    }
    assert!(rows >= 60, "{rows} rows");
    crate::golden::compare("hosts/judgements.txt", golden);
}

/// `ci/Containerfile` lists packages by hand. It must list all packages that a bare Debian 12 lacks, except those of
/// its base image.
#[test]
fn the_runners_image_has_what_a_bare_debian_12_lacks() {
    const OF_THE_BASE: [&str; 2] = ["debian-archive-keyring", "mount"];
    let listed: Vec<_> = include_str!("../../../../../../ci/Containerfile").split_whitespace().collect();
    let debian = distributions().into_iter().find(|distribution| distribution.name == "debian-12").unwrap();
    let root = tempfile::tempdir().unwrap();
    for guest in VmArchitecture::ALL {
        let facts = debian.facts(root.path(), VmArchitecture::X86_64, guest, false, State::Bare);
        let plan = fix::plan(&Preflight::evaluate(vec![facts]));
        let install = plan.iter().find(|command| command[1] == "install").unwrap();
        let packages: Vec<_> = install[2..].iter().filter(|word| !word.starts_with('-')).collect();
        assert!(packages.len() > 10, "{packages:?}");
        for package in packages {
            let there = listed.contains(&package.as_str()) || OF_THE_BASE.contains(&package.as_str());
            assert!(there, "{package} for {guest} is not in ci/Containerfile");
        }
    }
}
