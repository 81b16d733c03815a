//! Tests that each missing requirement is found under its own id, on a machine that has everything else.

mod distributions;
mod pipelines;

use super::*;
use crate::arch::VmArchitecture;
use crate::build::linker::{Unfit, UnfitKind};
use crate::cache::{Cache, Unusable};
use crate::cli::MachineArgs;
use crate::host::edk2::Edk2;
use crate::host::facts::{Built, Guest, Linking};
use crate::host::firmware::{AarchFirmware, Rejected, Why};
use crate::host::kvm::Kvm;
use crate::host::local::{LocalHost, Purpose, When};
use crate::host::memory::Memory;
use crate::host::network::LoopbackServices;
use crate::host::packages::{Need, PackageManager};
use crate::host::pkg_config::PkgConfig;
use crate::host::qemu::Emulator;
use crate::image::Image;
use crate::image::scripts::SCRIPTS;
use crate::os_release::OsRelease;

const GIB: u64 = 1 << 30;

/// Returns the facts about a machine without faults, for aarch64 guests.
pub(crate) fn sound() -> Facts {
    Facts {
        arch: VmArchitecture::Aarch64,
        host: sound_host(),
        emulator: Some(Ok(emulator("10.0.2"))),
        other_emulators: Vec::new(),
        firmware: Ok(AarchFirmware { code: "/c".into(), vars_template: "/v".into() }),
        edk2: Some(Edk2::new(2025, 2)),
        rust_target: Ok(true),
        linker: linking("2.36", true),
        kvm: Kvm::Opens,
        runs_guest_programs: true,
        user_emulator: true,
        registers_handler: Some(
            ["/usr/sbin/update-binfmts", "--enable", "qemu-aarch64"].map(str::to_owned).to_vec(),
        ),
        guest: Guest::from_args(&MachineArgs::default(), VmArchitecture::Aarch64, None).unwrap(),
        purpose: Purpose::Run,
        is_on_daemon: false,
    }
}

fn unfit(kind: UnfitKind) -> Unfit {
    Unfit { kind, reason: "x".to_owned(), remedy: "unset X".to_owned(), is_users: false }
}

fn linking(libc: &str, static_libc: bool) -> Result<Linking, Unfit> {
    Ok(Linking { libc: Some(("/lib/libc.so.6".into(), libc.into())), static_libc })
}

fn emulator(version: &str) -> Emulator {
    let names = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    Emulator {
        path: "/usr/bin/qemu-system-aarch64".into(),
        version: version.into(),
        cpu_models: names(&["cortex-a76", "max"]),
        max_properties: names(&["pauth", "sve"]),
        user_network: Ok(()),
        max_cpus: Some(512),
    }
}

fn sound_host() -> LocalHost {
    LocalHost {
        os: OsRelease {
            name: "Debian GNU/Linux 12 (bookworm)".into(),
            id: "debian".into(),
            version_id: "12".into(),
        },
        kernel: "6.12".into(),
        security_modules: Some("lockdown,capability,landlock,yama,apparmor".into()),
        supervises: true,
        loopback_services: LoopbackServices::default(),
        cpus: 2,
        root: true,
        escalation: Err("neither sudo nor doas is installed"),
        rustup: true,
        container: None,
        systemd: true,
        package_manager: Some(PackageManager::Apt),
        missing_programs: Vec::new(),
        nats_server: Some(Ok("2.9.10".into())),
        pkg_config: PkgConfig::at("/usr/bin/pkg-config"),
        libvirt: Ok("9.0.0".into()),
        libvirt_header: true,
        libvirt_driver: Some("/usr/lib/d.so".into()),
        libvirt_iohelper: true,
        missing_libvirt_user: Ok(None),
        cache: Ok("/c".into()),
        cache_access: Ok(()),
        free_disk: Some(80 * GIB),
        direct_io: Ok(()),
        free_memory: memory(8 * GIB),
        no_mounts: None,
        binfmt_mounted: true,
        debian_keyring: true,
        now: 1_800_000_000,
        built: 1_799_000_000,
        dead_runs: Vec::new(),
    }
}

fn memory(bytes: u64) -> Option<Memory> {
    Some(Memory { bytes, source: "memory.max in /sys/fs/cgroup/a".into() })
}

type Change = fn(&mut Facts);

fn evaluated(change: impl FnOnce(&mut Facts)) -> Vec<Finding> {
    let mut facts = sound();
    change(&mut facts);
    evaluate(&facts)
}

fn ids(change: impl FnOnce(&mut Facts)) -> Vec<&'static str> {
    evaluated(change).iter().map(|finding| finding.id).collect()
}

fn reject(facts: &mut Facts, whys: Vec<Why>) {
    facts.firmware = Err(whys.into_iter().map(|why| Rejected { path: "/f".into(), why }).collect());
}

#[test]
fn a_sound_machine_has_no_findings() {
    assert_eq!(evaluated(|_| {}), []);
}

const VIRTUALISATION: &[(&str, Change)] = &[
    ("emulator", |f| f.emulator = None),
    ("emulator-arch", |f| (f.emulator, f.other_emulators) = (None, vec!["qemu-system-x86_64".into()])),
    ("emulator-broken", |f| f.emulator = Some(Err(("/q".into(), "signal 11".into())))),
    ("emulator-old", |f| f.emulator = Some(Ok(emulator("7.2.22")))),
    ("emulator-old", |f| f.emulator = Some(Ok(emulator("9.0.2")))),
    ("emulator-cpu", |f| f.emulator.as_mut().unwrap().as_mut().unwrap().max_properties = vec!["sve".into()]),
    ("emulator-network", |f| {
        f.emulator.as_mut().unwrap().as_mut().unwrap().user_network = Err("not compiled in".into());
    }),
    ("firmware", |f| reject(f, vec![Why::Absent])),
    ("firmware-size", |f| reject(f, vec![Why::Absent, Why::Size(1, Some(2)), Why::Enrolled])),
    ("firmware-descriptor", |f| reject(f, vec![Why::Enrolled, Why::Dangling("/x".into()), Why::Absent])),
    ("firmware-enrolled", |f| reject(f, vec![Why::Absent, Why::Enrolled])),
    ("firmware-unreadable", |f| reject(f, vec![Why::Unreadable("EACCES".into()), Why::Absent])),
    ("firmware", |f| reject(f, vec![Why::Malformed("{".into())])),
    ("libvirt-driver", |f| f.host.libvirt_driver = None),
    ("libvirt-iohelper", |f| f.host.libvirt_iohelper = false),
    ("libvirt-user", |f| f.host.missing_libvirt_user = Ok(Some("libvirt-qemu"))),
    ("libvirt-user-unknown", |f| f.host.missing_libvirt_user = Err("too many open files".into())),
    ("kvm-nested", |f| f.kvm = Kvm::Nested),
    ("kvm-foreign", |f| f.kvm = Kvm::Foreign("x".into())),
    ("kvm-software", |f| f.kvm = Kvm::Software("x".into())),
    ("kvm-failed", |f| f.kvm = Kvm::Failed("x".into())),
    ("kvm-absent", |f| f.kvm = Kvm::Absent("x".into())),
    ("kvm-denied", |f| (f.host.root, f.kvm) = (false, denied(Some("kvm")))),
    ("kvm-denied", |f| (f.host.root, f.kvm) = (false, denied(None))),
    ("kvm-denied", |f| f.kvm = denied(Some("kvm"))),
    ("nats-server-old", |f| f.host.nats_server = Some(Ok("2.8.4".into()))),
    ("nats-server-broken", |f| f.host.nats_server = Some(Err("x".into()))),
];

fn denied(group: Option<&str>) -> Kvm {
    Kvm::Denied { why: "EACCES".into(), group: group.map(str::to_owned) }
}

fn eperm() -> Option<String> {
    Some("EPERM".into())
}

const BUILDING: &[(&str, Change)] = &[
    ("libvirt-headers", |f| (f.host.libvirt, f.host.libvirt_header) = (Err("none".into()), false)),
    ("pkg-config", |f| f.host.pkg_config.program = None),
    ("pkg-config", |f| {
        (f.host.pkg_config.program, f.host.libvirt) = (None, Err("pkg-config is missing".into()))
    }),
    ("pkg-config", |f| {
        (f.host.pkg_config.program, f.host.pkg_config.variables) = (None, vec!["PKG_CONFIG=/x".into()]);
    }),
    ("pkg-config-astray", |f| f.host.libvirt = Err("none".into())),
    ("pkg-config-astray", |f| {
        (f.host.libvirt, f.host.pkg_config) =
            (Err("none".into()), PkgConfig::at("/opt/conda/bin/pkg-config"));
    }),
    ("pkg-config-astray", |f| {
        (f.host.libvirt, f.host.pkg_config.variables) =
            (Err("none".into()), vec!["PKG_CONFIG_LIBDIR=/x".into()]);
    }),
    ("rust-target", |f| f.rust_target = Ok(false)),
    ("rust-target", |f| (f.rust_target, f.host.rustup) = (Ok(false), false)),
    ("program", |f| {
        f.host.root = false;
        f.host.missing_programs = vec![("mcopy", Need::Mtools, When::Always)];
    }),
    ("rust", |f| f.rust_target = Err("no rustc".into())),
    ("linker", |f| f.linker = Err(unfit(UnfitKind::Missing))),
    ("linker", |f| {
        f.linker = Err(Unfit { is_users: true, ..unfit(UnfitKind::Missing) });
    }),
    ("linker-foreign", |f| f.linker = Err(unfit(UnfitKind::Foreign))),
    ("linker-configuration", |f| f.linker = Err(unfit(UnfitKind::Configuration))),
    ("c-compiler", |f| f.linker = Err(unfit(UnfitKind::Compiler))),
    ("static-libc", |f| f.linker = linking("2.36", false)),
    ("libc-newer", |f| f.linker = linking("2.41", true)),
    ("program", |f| f.host.missing_programs = vec![("mcopy", Need::Mtools, When::Always)]),
    ("program", |f| f.host.missing_programs = vec![("sfdisk", Need::Sfdisk, When::Building)]),
    ("no-fallback", |f| {
        f.host.package_manager = Some(PackageManager::Zypper);
        f.host.missing_programs = vec![("mmdebstrap", Need::Mmdebstrap, When::Building)];
    }),
    ("program", |f| {
        f.host.package_manager = Some(PackageManager::Zypper);
        f.host.missing_programs = vec![("mmdebstrap", Need::Mmdebstrap, When::Building)];
        f.guest.built = Built::Chosen;
    }),
    ("keyring", |f| f.host.debian_keyring = false),
    ("user-namespace", |f| (f.host.root, f.host.no_mounts, f.guest.built) = (false, eperm(), Built::Chosen)),
    ("user-namespace", |f| (f.host.root, f.host.no_mounts) = (false, eperm())),
    ("mount", |f| (f.host.no_mounts, f.guest.built) = (eperm(), Built::Chosen)),
    ("mount", |f| f.host.no_mounts = eperm()),
    ("binfmt", |f| f.runs_guest_programs = false),
    ("user-emulation", |f| (f.runs_guest_programs, f.user_emulator) = (false, false)),
];

const ROOM: &[(&str, Change)] = &[
    ("cache", |f| f.host.cache = Err(Unusable::Nowhere)),
    ("cache", |f| f.host.cache = Err(Unusable::Relative("x".into()))),
    ("cache-path", |f| f.host.cache = Err(Unusable::TooLong("/x".into(), 120))),
    ("cache-access", |f| f.host.cache_access = Err("EACCES".into())),
    ("disk", |f| f.host.free_disk = Some(3 * GIB)),
    ("cache-direct", |f| f.host.direct_io = Err("EINVAL".into())),
    ("memory", |f| f.host.free_memory = memory(GIB)),
    ("memory", |f| f.guest.machine.memory = 8192),
    ("guest-network", |f| {
        (f.host.supervises, f.host.security_modules) = (false, Some("capability,apparmor".into()));
    }),
    ("guest-network", |f| {
        (f.host.supervises, f.host.kernel) = (false, "6.1.0-49-amd64".into());
    }),
    ("loopback-services", |f| {
        (f.host.supervises, f.host.loopback_services.tcp) = (false, vec![22, 80]);
    }),
    ("loopback-services", |f| {
        (f.host.supervises, f.host.loopback_services.udp) = (false, vec![5353]);
    }),
    ("clock", |f| f.host.now = 1_700_000_000),
    ("stale-run", |f| f.host.dead_runs = vec!["1123-090000-abcd".into()]),
];

#[test]
fn each_lack_is_found_under_its_own_id() {
    let mut screens = String::new();
    for (id, change) in VIRTUALISATION.iter().chain(BUILDING).chain(ROOM) {
        assert_eq!(ids(*change), [*id]);
        let mut facts = sound();
        change(&mut facts);
        screens += &format!("== {id}\n{}", crate::preflight::Preflight::evaluate(vec![facts]));
    }
    crate::golden::compare("hosts/findings.txt", screens);
}

#[test]
fn firmware_that_does_not_go_with_the_emulator_is_told_where_it_matters() {
    let found = |edk2, kvm: Kvm, cpu: Option<&str>| {
        let found = evaluated(|f| {
            (f.edk2, f.kvm, f.guest.machine.cpu) = (Some(edk2), kvm, cpu.map(str::to_owned));
        });
        found.iter().any(|finding| finding.id == "firmware-known-bad")
    };
    let emulated = || Kvm::Foreign("x".into());
    let bad = Edk2::new(2025, 11);
    assert!(found(bad, emulated(), None) && found(Edk2::new(2022, 11), emulated(), Some("max")));
    assert!(!found(bad, Kvm::Opens, None) && !found(bad, emulated(), Some("pi5")));
    assert!(!found(Edk2::new(2025, 2), emulated(), None));
}

#[test]
fn whatever_blocks_or_degrades_has_a_remedy_and_evidence() {
    for (id, change) in VIRTUALISATION.iter().chain(BUILDING).chain(ROOM) {
        for finding in evaluated(*change) {
            assert!(!finding.evidence.is_empty() && !finding.sentence.is_empty(), "{finding:?}");
            // A finding that only informs needs no remedy.
            let described = finding.remedy.is_some() || finding.severity == Severity::Informs;
            assert!(described, "{id}: {finding:?}");
        }
    }
}

#[test]
fn what_only_a_build_needs_is_not_asked_of_a_downloaded_image() {
    let downloaded = |change: Change| {
        ids(|facts| {
            change(facts);
            facts.guest.built = Built::No;
        })
    };
    for (id, change) in
        BUILDING.iter().filter(|(id, _)| ["keyring", "mount", "user-namespace", "binfmt"].contains(id))
    {
        assert_eq!(downloaded(*change), Vec::<&str>::new(), "{id}");
    }
    assert_eq!(
        downloaded(|f| f.host.missing_programs = vec![("sfdisk", Need::Sfdisk, When::Building)]),
        [] as [&str; 0]
    );
    assert_eq!(downloaded(|f| f.host.missing_programs = vec![("ssh", Need::Ssh, When::Always)]), ["program"]);
    assert_eq!(downloaded(|f| f.host.free_disk = Some(3 * GIB)), ["disk"]);
    assert_eq!(
        downloaded(|f| (f.host.free_disk, f.guest.download) = (Some(3 * GIB), None)),
        [] as [&str; 0],
        "the image is in the cache"
    );
    let as_user = |root| {
        ids(|f| {
            f.host.root = root;
            f.host.missing_programs = vec![("newuidmap", Need::Uidmap, When::BuildingAsUser)];
        })
    };
    assert_eq!((as_user(true), as_user(false)), (vec![], vec!["program"]));
}

#[test]
fn a_check_that_lacks_a_resource_does_not_advise_a_package() {
    let lacking = evaluated(|f| {
        let text = "run the linker: Too many open files (os error 24)".to_owned();
        f.linker = Err(Unfit { reason: text, ..unfit(UnfitKind::Missing) });
        f.host.libvirt = Err("run /usr/bin/pkg-config: Cannot allocate memory (os error 12)".into());
    });
    let remedies: Vec<_> = lacking.iter().filter_map(|finding| finding.by_hand()).collect();
    assert_eq!(remedies.len(), 2, "{lacking:?}");
    assert!(remedies[0].contains("--memory") && remedies[1].contains("ulimit -n"), "{remedies:?}");
}

#[test]
fn what_is_in_the_cache_is_neither_built_nor_downloaded() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path());
    let guest = |name: Option<&str>| {
        let mut machine = MachineArgs::default();
        machine.image.image = name.map(str::to_owned);
        Guest::from_args(&machine, VmArchitecture::Aarch64, Some(&cache)).unwrap()
    };
    let keep = |image: &Image| std::fs::create_dir_all(cache.images().join(image.key(SCRIPTS))).unwrap();
    let (default, built) = (guest(None), guest(Some("debian-12")));
    assert_eq!((default.built, default.download.is_some()), (Built::Fallback, true));
    assert_eq!((built.built, built.download), (Built::Chosen, None));
    keep(&built.choice.image);
    assert_eq!((guest(None).built, guest(Some("debian-12")).built), (Built::No, Built::No));
    assert!(guest(None).download.is_some());
    keep(&default.choice.image);
    assert_eq!(guest(None).download, None);
    std::fs::remove_dir(cache.images().join(built.choice.image.key(SCRIPTS))).unwrap();
    assert_eq!(guest(None).built, Built::No, "the fallback image is not needed");
}

#[test]
fn what_the_test_suite_lacks_is_installed_by_name() {
    let lacking = |purpose| {
        let mut facts = sound();
        facts.purpose = purpose;
        facts.host.missing_programs = vec![("libvirtd", Need::LibvirtDaemon, When::Testing)];
        crate::preflight::Preflight::evaluate(vec![facts])
    };
    assert_eq!((lacking(Purpose::Run).findings, lacking(Purpose::Torture).findings), (vec![], vec![]));
    let preflight = lacking(Purpose::TestSuite);
    let found: Vec<_> = preflight.findings.iter().map(|finding| (finding.id, finding.severity)).collect();
    assert_eq!(found, [(CI_PROGRAM, Severity::Blocks)]);
    let commands = crate::preflight::fix::plan(&preflight);
    assert_eq!(
        commands[1].join(" "),
        "apt-get install --yes --no-install-recommends --option=DPkg::Lock::Timeout=300 libvirt-daemon"
    );
    let error = preflight.verdict().unwrap_err();
    assert_eq!(crate::error::hint(&error), Some("cargo xtask ci --fix"));
}

#[test]
fn what_torture_lacks_blocks_torture_and_the_test_suite() {
    let lacking = |purpose| {
        let mut facts = sound();
        facts.purpose = purpose;
        facts.host.missing_programs = vec![("docker-registry", Need::Registry, When::Torturing)];
        crate::preflight::Preflight::evaluate(vec![facts])
    };
    assert_eq!(lacking(Purpose::Run).findings, []);
    for (purpose, id, hint) in [
        (Purpose::Torture, TORTURE_PROGRAM, "run the command again with --fix"),
        (Purpose::TestSuite, CI_PROGRAM, "cargo xtask ci --fix"),
    ] {
        let preflight = lacking(purpose);
        assert_eq!(preflight.findings.iter().map(|finding| finding.id).collect::<Vec<_>>(), [id]);
        assert!(crate::preflight::fix::plan(&preflight)[1].join(" ").ends_with(" docker-registry"));
        let error = preflight.verdict().unwrap_err();
        assert_eq!((crate::error::code(&error), crate::error::hint(&error)), (69, Some(hint)));
    }
}
