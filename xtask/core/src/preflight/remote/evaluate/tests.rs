//! Tests of the findings, with the XML of a real libvirt 9.0.

use super::*;
use crate::cli::PlaceArgs;
use crate::host::local::Purpose;
use crate::preflight::findings::{Remedy, Severity};
use crate::preflight::remote::{Network, Node, Pool, capabilities};

const CAPABILITIES: &str = include_str!("../../../../test_data/libvirt-capabilities.xml");
const AARCH64: &str = include_str!("../../../../test_data/libvirt-domain-aarch64.xml");
const X86_64: &str = include_str!("../../../../test_data/libvirt-domain-x86_64.xml");
const URI: &str = "qemu+ssh://me@far/system";

/// Returns the facts about a libvirt without faults. It emulates aarch64 guests, and runs x86_64 guests with KVM.
fn sound() -> ConnectionOffer {
    ConnectionOffer {
        access: Access::Full,
        hypervisor: Ok("QEMU 7.2.22".into()),
        libvirt: Ok("9.0.0".into()),
        host_name: Ok("far".into()),
        node: Ok(Node { machine: "x86_64".into(), cpus: 8, memory: 16384 * MIB }),
        free_memory: Ok(8192 * MIB),
        guests: Ok(capabilities::guests(CAPABILITIES).unwrap()),
        domains: vec![answer(VmArchitecture::X86_64, X86_64), answer(VmArchitecture::Aarch64, AARCH64)],
        network: Ok(Some(Network { active: true, autostart: true })),
        pool: Ok(Some(Pool { active: true, free: 65536 * MIB })),
    }
}

fn answer(arch: VmArchitecture, xml: &str) -> (VmArchitecture, Result<DomainOffer, String>) {
    (arch, Ok(capabilities::domain(xml).unwrap()))
}

fn findings(uri: &str, offer: ConnectionOffer, machine: &MachineArgs) -> Vec<Finding> {
    let facts = ConnectionFacts { uri: uri.parse().unwrap(), answer: Ok(offer) };
    let place = &PlaceArgs::default();
    evaluate(
        &facts,
        &PreflightRequest { architectures: &VmArchitecture::ALL, machine, place, purpose: Purpose::Run },
    )
}

/// Returns the findings about [`sound`] after a change. The findings that [`sound`] has without the change are left
/// out.
fn found(uri: &str, change: impl FnOnce(&mut ConnectionOffer, &mut MachineArgs)) -> Vec<Finding> {
    let (mut offer, mut machine) = (sound(), MachineArgs::default());
    change(&mut offer, &mut machine);
    let usual = ["connect-host", "connect-offer", "connect-pool"];
    let mut found = findings(uri, offer, &machine);
    found.retain(|finding| finding.severity != Severity::Informs || !usual.contains(&finding.id));
    found
}

fn domain(offer: &mut ConnectionOffer, index: usize) -> &mut DomainOffer {
    offer.domains[index].1.as_mut().unwrap()
}

#[test]
fn a_sound_libvirt_is_described_and_not_blamed() {
    let described: Vec<_> = findings(URI, sound(), &MachineArgs::default())
        .into_iter()
        .map(|f| (f.id, f.severity, f.sentence))
        .collect();
    let informs = |id, sentence: &str| (id, Severity::Informs, format!("{URI}: {sentence}"));
    assert_eq!(
        described,
        [
            informs(
                "connect-host",
                "host far: x86_64, 8 CPUs, 16.0 GiB of memory (8.0 GiB free); libvirt 9.0.0, QEMU 7.2.22"
            ),
            informs("connect-offer", "x86_64 guests: by KVM (not tested); machine type pc-q35-7.2"),
            informs("connect-offer", "aarch64 guests: emulated; machine type virt-7.2"),
            informs("connect-pool", "64.0 GiB free in the storage pool default"),
        ]
    );
}

#[expect(clippy::too_many_lines, reason = "a table with a row for each finding")]
#[test]
fn each_lack_is_found_under_its_own_id() {
    use Severity::{Blocks, Degrades};
    type Change = fn(&mut ConnectionOffer, &mut MachineArgs);
    let no = || "no reason".to_owned();
    let table: &[(&str, Severity, &str, Change)] = &[
        ("connect-permission", Blocks, "usermod", |o, _| o.access = Access::ReadOnly("read only".into())),
        ("connect-memory", Blocks, "--memory", |_, m| m.memory = 65536),
        ("connect-memory", Degrades, "--memory", |o, _| o.free_memory = Ok(2048 * MIB)),
        ("connect-memory", Degrades, "--memory", |_, m| m.memory = 8000),
        ("connect-arch", Degrades, "capabilities", |o, _| {
            (o.guests, o.domains) = (Err("none".into()), Vec::new());
        }),
        ("connect-arch", Blocks, "on me@far: install qemu-system-aarch64", |o, _| {
            o.guests.as_mut().unwrap().retain(|guest| guest.machine != "aarch64");
        }),
        ("connect-machine", Blocks, "on me@far: ", |o, _| {
            o.guests.as_mut().unwrap()[1].machine_types.retain(|kind| kind != "q35");
        }),
        ("connect-domain", Degrades, "domcapabilities --arch aarch64 --machine virt", |o, _| {
            o.domains[1].1 = Err("not supported".into());
        }),
        ("connect-firmware", Blocks, "ovmf", |o, _| domain(o, 0).loaders.clear()),
        ("connect-firmware", Blocks, "qemu-efi-aarch64", |o, _| domain(o, 1).loaders.clear()),
        ("connect-firmware", Degrades, "<loader", |o, _| domain(o, 1).selects_uefi = false),
        ("connect-cpu", Blocks, "--cpu", |o, _| domain(o, 1).cpu_modes.retain(|mode| mode != "maximum")),
        ("connect-cpu", Blocks, "--cpu", |o, _| {
            domain(o, 0).cpu_modes.retain(|mode| mode != "host-passthrough")
        }),
        ("connect-network", Degrades, "network driver", |o, _| o.network = Err("not supported".into())),
        ("connect-network-missing", Degrades, "net-define", |o, _| o.network = Ok(None)),
        ("connect-network-inactive", Degrades, "net-start default && virsh", |o, _| {
            o.network = Ok(Some(Network { active: false, autostart: false }));
        }),
        ("connect-network-inactive", Degrades, "net-start default", |o, _| {
            o.network = Ok(Some(Network { active: false, autostart: true }));
        }),
        ("connect-network-autostart", Degrades, "net-autostart default", |o, _| {
            o.network = Ok(Some(Network { active: true, autostart: false }));
        }),
        ("connect-pool", Blocks, "storage driver", |o, _| o.pool = Err("not supported".into())),
        ("connect-pool-missing", Blocks, "pool-define-as", |o, _| o.pool = Ok(None)),
        ("connect-pool-inactive", Blocks, "pool-start", |o, _| {
            o.pool = Ok(Some(Pool { active: false, free: 0 }));
        }),
        ("connect-pool-room", Blocks, "vol-list", |o, _| {
            o.pool = Ok(Some(Pool { active: true, free: 1024 * MIB }));
        }),
    ];
    assert_eq!(found(URI, |_, _| {}), []);
    for (id, severity, remedy, change) in table {
        let found = found(URI, change);
        let [finding] = found.as_slice() else { panic!("{id}: {found:?}") };
        assert_eq!((finding.id, finding.severity), (*id, *severity), "{finding:?}");
        let Some(Remedy::Manual(described)) = &finding.remedy else {
            panic!("{id}: nothing that --fix would run")
        };
        assert!(described.contains(remedy), "{id}: {described}");
        assert!(!finding.evidence.is_empty(), "{id}");
    }
    // If facts are unknown, the finding about the host says so.
    let mut dumb = sound();
    (dumb.host_name, dumb.hypervisor, dumb.libvirt) = (Err(no()), Err(no()), Err(no()));
    (dumb.node, dumb.free_memory) = (Err("no node".into()), Err(no()));
    let host = findings(URI, dumb, &MachineArgs::default()).remove(0);
    assert!(
        host.sentence.ends_with("host unknown: an unknown machine; libvirt unknown, unknown"),
        "{host:?}"
    );
    assert!(host.evidence.contains("no node"), "{host:?}");
}

#[test]
fn the_accelerator_and_the_cpu_are_those_that_a_smoke_would_take() {
    let named = |cpu: &str, accel| {
        found(URI, |_, machine| (machine.cpu, machine.accel) = (Some(cpu.to_owned()), accel))
            .into_iter()
            .map(|finding| (finding.id, finding.sentence.replace(&format!("{URI}: "), "")))
            .collect::<Vec<_>>()
    };
    let cpu = |arch: &str, name: &str| {
        ("connect-cpu", format!("the CPU {name} is not available for its {arch} guests"))
    };
    let no_kvm = ("connect-accel", "KVM is not available for its aarch64 guests".to_owned());
    assert_eq!(named("max", Accel::Auto), []);
    assert_eq!(named("pi5", Accel::Tcg), [cpu("x86_64", "pi5")]);
    assert_eq!(
        named("Nehalem", Accel::Auto),
        [cpu("x86_64", "Nehalem"), cpu("aarch64", "Nehalem")],
        "usable='no'"
    );
    assert_eq!(named("pentium3", Accel::Auto), [cpu("aarch64", "pentium3")], "usable='yes'");
    assert_eq!(named("host", Accel::Kvm), [no_kvm]);
}

#[test]
fn a_session_is_not_blamed_for_what_no_session_has() {
    let found = found("qemu:///session", |offer, _| offer.network = Ok(None));
    assert_eq!((found[0].id, found[0].severity), ("connect-network-missing", Severity::Informs));
    let pool = &self::found("qemu:///session", |offer, _| offer.pool = Ok(None))[0];
    assert!(pool.by_hand().unwrap().contains("--target \"$HOME/"), "a user's own directory: {pool:?}");
}

#[test]
fn libvirts_xml_is_read() {
    let guests = capabilities::guests(CAPABILITIES).unwrap();
    let kinds: Vec<_> =
        guests.iter().map(|g| (g.machine.as_str(), g.emulator.as_str(), g.domain_types.len())).collect();
    let expected =
        [("aarch64", "/usr/bin/qemu-system-aarch64", 1), ("x86_64", "/usr/bin/qemu-system-x86_64", 2)];
    assert_eq!(kinds, expected);
    assert!(guests[1].machine_types.iter().any(|kind| kind == "pc-q35-7.2"));

    let arm = capabilities::domain(AARCH64).unwrap();
    assert_eq!(
        (arm.emulator.as_str(), arm.machine_type.as_str()),
        ("/usr/bin/qemu-system-aarch64", "virt-7.2")
    );
    assert_eq!(arm.cpu_modes, ["maximum", "custom"]);
    assert_eq!(arm.loaders, ["/usr/share/AAVMF/AAVMF_CODE.ms.fd", "/usr/share/AAVMF/AAVMF_CODE.fd"]);
    assert!(arm.selects_uefi && arm.cpu_models.contains(&("cortex-a76".to_owned(), None)));

    let intel = capabilities::domain(X86_64).unwrap();
    assert_eq!(intel.cpu_modes, ["host-passthrough", "maximum", "custom"]);
    assert!(intel.cpu_models.contains(&("Nehalem".to_owned(), Some(false))));
    assert!(intel.cpu_models.contains(&("pentium3".to_owned(), Some(true))));
}

#[test]
fn what_is_not_libvirts_xml_is_an_error() {
    let half = &CAPABILITIES[..CAPABILITIES.len() / 2];
    for xml in ["", "no XML", "<other/>", "<capabilities>", "<capabilities></guest>", half, AARCH64] {
        let error = capabilities::guests(xml).unwrap_err();
        assert!(error.contains("cannot be read"), "{error}");
    }
    assert!(capabilities::domain(CAPABILITIES).is_err());
    assert_eq!(capabilities::guests("<capabilities/>"), Ok(Vec::new()), "a host that runs nothing");
}

/// A smoke with `--network nat` needs the network, and one with `--network user` does not look at networks.
#[test]
fn a_network_that_is_requested_must_be_there() {
    let found = |network: Option<&str>, known: Option<Network>| {
        let offer = ConnectionOffer { network: Ok(known), ..sound() };
        let facts = ConnectionFacts { uri: URI.parse().unwrap(), answer: Ok(offer) };
        let place = &PlaceArgs { network: network.map(|name| name.parse().unwrap()), ..PlaceArgs::default() };
        let machine = &MachineArgs::default();
        let asked =
            PreflightRequest { architectures: &VmArchitecture::ALL, machine, place, purpose: Purpose::Run };
        let found =
            evaluate(&facts, &asked).into_iter().find(|finding| finding.id.starts_with("connect-network"));
        found.map(|finding| (finding.severity, finding.sentence.replace(&format!("{URI}: "), "")))
    };
    let inactive = Some(Network { active: false, autostart: true });
    assert_eq!(
        found(Some("nat"), inactive),
        Some((Severity::Blocks, "the network default is not active".into()))
    );
    assert_eq!(found(Some("nat:lab"), None), Some((Severity::Blocks, "there is no network lab".into())));
    assert_eq!(found(None, inactive).unwrap().0, Severity::Degrades);
    assert_eq!(found(Some("user"), None), None);
}
