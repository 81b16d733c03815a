//! Tests [`diff`] with live XML without faults and with each fault. The XML is from libvirt 9.0 with QEMU 7.2. It
//! describes paused domains that were made from `test_data/domain-ARCH-tcg.xml`, with other paths and with an overlay
//! on two backing files.

use super::*;
use crate::arch::VmArchitecture;
use crate::image::Format;
use crate::machine::FORWARDED_PORTS;
use crate::preflight::findings::Severity;

const DIRECTORY: &str = "/var/lib/libvirt/images/iot & test";

fn live_xml(arch: VmArchitecture) -> &'static str {
    arch.pick(
        include_str!("../../../test_data/live-x86_64.xml"),
        include_str!("../../../test_data/live-aarch64.xml"),
    )
}

fn expected(arch: VmArchitecture) -> ExpectedMachine {
    let file = |name: &str| Path::new(DIRECTORY).join(name);
    let disk = |name, format, read_only| Disk { path: file(name), format, read_only, backing: Vec::new() };
    let backing = vec![file("snapshot.qcow2"), "/var/lib/libvirt/images/debian-12.qcow2".into()];
    let (code, template) = arch.profile().firmware_paths[arch.pick(0, 1)];
    let off = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), false)).collect();
    ExpectedMachine {
        architecture: arch,
        accelerator: Accelerator::Tcg,
        cpu_model: "max".to_owned(),
        cpu_properties: arch.pick(Vec::new(), off(&["sve", "pauth"])),
        vcpus: 2,
        own_threads: true,
        memory_bytes: 2 << 30,
        flash: Some(ExpectedFlash {
            code: code.into(),
            code_bytes: Some(0),
            nvram: file("nvram.fd"),
            template: template.into(),
            vars_bytes: Some(0),
        }),
        disks: vec![
            Disk { backing, ..disk("disk.qcow2", Format::Qcow2, false) },
            disk("seed.img", Format::Raw, true),
            disk("payload.img", Format::Raw, true),
        ],
        forwarded_ports: FORWARDED_PORTS.to_vec(),
    }
}

/// Returns the findings that block, after these replacements in the live XML. Each replaced text must occur.
fn blocking(expected: &ExpectedMachine, replacements: &[(&str, &str)]) -> Vec<Finding> {
    let mut xml = live_xml(expected.architecture).to_owned();
    for (from, to) in replacements {
        assert!(xml.contains(from), "{}: the live XML does not have {from}", expected.architecture);
        xml = xml.replacen(from, to, 1);
    }
    let mut findings = diff(expected, &xml).unwrap();
    findings.retain(|finding| finding.severity == Severity::Blocks);
    findings
}

fn ids(findings: &[Finding]) -> Vec<&'static str> {
    findings.iter().map(|finding| finding.id).collect()
}

#[test]
fn a_sound_domain_has_one_finding_that_informs() {
    for arch in VmArchitecture::ALL {
        let findings = diff(&expected(arch), live_xml(arch)).unwrap();
        let found: Vec<_> = findings.iter().map(|finding| (finding.id, finding.severity)).collect();
        assert_eq!(found, [("rehearsal-not-compared", Severity::Informs)], "{arch}: {findings:?}");
        let sentence = &findings[0].sentence;
        assert!(
            sentence.contains("the threads of its processors, the sizes of its flash devices"),
            "{sentence}"
        );
    }
}

#[test]
fn each_fault_is_found_under_its_own_id() {
    let table: &[(&str, &str, &str)] = &[
        ("rehearsal-accelerator", "<domain type='qemu'", "<domain type='kvm'"),
        ("rehearsal-machine", " machine='", " machine='none' was='"),
        ("rehearsal-machine", "<type arch='", "<type arch='un"),
        ("rehearsal-memory", "<memory unit='KiB'>", "<memory unit='KB'>"),
        ("rehearsal-memory", "<memory unit='KiB'>2097152<", "<memory unit='MiB'>2047<"),
        ("rehearsal-memory", "<memory unit='KiB'>2097152<", "<memory unit='parsec'>2097152<"),
        ("rehearsal-memory", "<currentMemory unit='KiB'>2097152<", "<currentMemory unit='GiB'>1<"),
        ("rehearsal-processors", "'static'>2<", "'static'>1<"),
        // With this XML, libvirt 9.0 lists one of two processors as online.
        ("rehearsal-processors", "<vcpu placement='static'>", "<vcpu placement='static' current='1'>"),
        ("rehearsal-cpu-model", "<cpu mode='maximum'", "<cpu mode='host-passthrough'"),
        ("rehearsal-firmware", "_CODE", "_CODE.secboot"),
        ("rehearsal-firmware", "type='pflash'", "type='rom'"),
        ("rehearsal-firmware", "<loader readonly='yes'", "<loader readonly='no'"),
        ("rehearsal-firmware", "<loader readonly='yes'", "<loader"),
        ("rehearsal-nvram", "nvram.fd</nvram>", "other.fd</nvram>"),
        ("rehearsal-nvram", "<nvram>/", "<nvram>/other/"),
        ("rehearsal-disk", "/seed.img'", "/other.img'"),
        ("rehearsal-disk", "&amp; test/disk.qcow2'", "and test/disk.qcow2'"),
        ("rehearsal-disk", "dev='vda'", "dev='vdd'"),
        ("rehearsal-disk", "dev='vdc' bus='virtio'", "dev='vdc' bus='scsi'"),
        ("rehearsal-disk", "<driver name='qemu' type='raw'/>", "<driver name='qemu' type='qcow2'/>"),
        ("rehearsal-disk", "type='qcow2' cache", "type='raw' cache"),
        ("rehearsal-disk", "<target dev='vda' bus='virtio'/>", "<target dev='vda' bus='virtio'/><readonly/>"),
        ("rehearsal-disk", "<readonly/>", ""),
        ("rehearsal-disk", "<devices>", "<devices><disk device='cdrom'/>"),
        ("rehearsal-disk-cache", " cache='none'", ""),
        ("rehearsal-disk-cache", " cache='none'", " cache='unsafe'"),
        ("rehearsal-disk-chain", "/debian-12.qcow2'", "/debian-13.qcow2'"),
        ("rehearsal-network", "'-netdev'", "'-object'"),
        ("rehearsal-network", "tcp:127.0.0.1:0-:8081", "tcp::0-:8081"),
        ("rehearsal-network", ":8081", ":9081"),
    ];
    for arch in VmArchitecture::ALL {
        for (id, from, to) in table {
            let found = blocking(&expected(arch), &[(from, to)]);
            assert_eq!(ids(&found), [*id], "{arch}, {from} -> {to}: {found:?}");
            assert!(!found[0].evidence.is_empty() && found[0].remedy.is_some(), "{found:?}");
        }
    }
}

/// The XML in the file of a saved machine would have this effect: the snapshot's disk is left out. libvirt 9.0 writes
/// the live XML of such a domain like this.
#[test]
fn a_layer_that_is_left_out_is_found() {
    let xml = live_xml(VmArchitecture::X86_64);
    let below = xml.split_once("index='4'>").unwrap().1;
    let end = "</backingStore>\n      </backingStore>";
    let below = &below[..below.find(end).unwrap() + end.len()];
    let image = "<source file='/var/lib/libvirt/images/debian-12.qcow2'/>\n<backingStore/></backingStore>";
    let expected = expected(VmArchitecture::X86_64);
    let found = blocking(&expected, &[(below, image)]);
    assert_eq!(ids(&found), ["rehearsal-disk-chain"]);
    assert!(found[0].sentence.contains("has the backing files /var/lib/libvirt/images/debian-12.qcow2, "));
    // If libvirt has not searched the chain to its end, the chain is not compared.
    let open = [("<backingStore/>\n        </backingStore>", "</backingStore>")];
    assert_eq!(blocking(&expected, &open), []);
    let findings = diff(&expected, &xml.replacen(open[0].0, open[0].1, 1)).unwrap();
    assert!(findings[0].sentence.ends_with(", the backing files of its disk"), "{findings:?}");
}

#[test]
fn a_missing_disk_is_named() {
    for arch in VmArchitecture::ALL {
        let xml = live_xml(arch);
        let start = xml.rfind("<disk ").unwrap();
        let end = xml.rfind("</disk>").unwrap() + "</disk>".len();
        let found = blocking(&expected(arch), &[(&xml[start..end], "")]);
        assert_eq!(ids(&found), ["rehearsal-disk"]);
        assert!(found[0].sentence.contains(&format!("the disk {DIRECTORY}/payload.img")), "{found:?}");
    }
}

#[test]
fn a_missing_flash_is_named() {
    for arch in VmArchitecture::ALL {
        let xml = live_xml(arch);
        let place = |text| xml.find(text).unwrap();
        let (loader, nvram, rest) = (place("<loader"), place("<nvram"), place("<bootmenu"));
        let found = blocking(&expected(arch), &[(&xml[loader..nvram], "")]);
        assert_eq!(ids(&found), ["rehearsal-firmware"]);
        let found = blocking(&expected(arch), &[(&xml[nvram..rest], "")]);
        assert_eq!(ids(&found), ["rehearsal-nvram"]);
        assert_eq!(found[0].evidence, "there is no os/nvram");
    }
}

#[test]
fn the_variables_template_in_the_place_of_a_copy_is_named() {
    let copy = "/var/lib/libvirt/images/iot &amp; test/nvram.fd";
    for arch in VmArchitecture::ALL {
        let expected = expected(arch);
        let template = expected.flash.as_ref().unwrap().template.display().to_string();
        let found = blocking(&expected, &[(copy, &template)]);
        assert_eq!(ids(&found), ["rehearsal-nvram"]);
        assert!(found[0].sentence.contains(&format!("the template {template}")), "{found:?}");
        // libvirt keeps the attribute that names the template, and may describe the file by a `<source>`.
        let named = format!("<nvram template='{template}'>");
        assert_eq!(blocking(&expected, &[("<nvram>", &named)]), []);
        let element = format!("<nvram>{copy}</nvram>");
        let described = format!("<nvram type='file'>\n<source file='{copy}'/>\n</nvram>");
        assert_eq!(blocking(&expected, &[(&element, &described)]), []);
    }
}

#[test]
fn a_cpu_property_must_be_set_as_requested() {
    const FEATURE: &str = "<feature policy='disable' name='sve'/>";
    const GLOBAL: &str = "max-arm-cpu.pauth=off";
    let expected = expected(VmArchitecture::Aarch64);
    for (from, to, property) in [
        (FEATURE, "", "sve"),
        (FEATURE, "<feature policy='require' name='sve'/>", "sve"),
        (FEATURE, "<feature policy='optional' name='sve'/>", "sve"),
        (FEATURE, "<feature policy='disable' name='sve2'/>", "sve"),
        (GLOBAL, "max-arm-cpu.pauth=on", "pauth"),
        (GLOBAL, "max-x86_64-cpu.pauth", "pauth"),
        (GLOBAL, "cortex-a76-arm-cpu.pauth=off", "pauth"),
        ("'-global'", "'-set'", "pauth"),
        // Two places contradict each other.
        (FEATURE, "<feature policy='disable' name='sve'/><feature policy='force' name='pauth'/>", "pauth"),
    ] {
        let found = blocking(&expected, &[(from, to)]);
        assert_eq!(ids(&found), ["rehearsal-cpu-feature"], "{from} -> {to}: {found:?}");
        assert!(found[0].sentence.contains(&format!("the CPU's {property} is not off")), "{found:?}");
    }
    let forbidden = FEATURE.replace("disable", "forbid");
    assert_eq!(blocking(&expected, &[(FEATURE, &forbidden)]), []);
}

/// libvirt 9.0 adds a feature to the live XML of a CPU model.
#[test]
fn a_named_cpu_model_is_compared_by_its_name() {
    let cpu = "<cpu mode='custom' match='exact' check='full'>\n    <model fallback='forbid'>Nehalem</model>\n    \
               <feature policy='require' name='hypervisor'/>\n  </cpu>";
    let live = [("<cpu mode='maximum' check='none'/>", cpu)];
    let named =
        |name: &str| ExpectedMachine { cpu_model: name.to_owned(), ..expected(VmArchitecture::X86_64) };
    assert_eq!(blocking(&named("Nehalem"), &live), []);
    for other in ["Haswell", "max", "host"] {
        assert_eq!(ids(&blocking(&named(other), &live)), ["rehearsal-cpu-model"]);
    }
    let host = [("<cpu mode='maximum'", "<cpu mode='host-passthrough'")];
    assert_eq!(blocking(&named("host"), &host), []);
}

#[test]
fn equal_values_in_another_form_are_no_faults() {
    for arch in VmArchitecture::ALL {
        for (from, to) in [
            ("<memory unit='KiB'>2097152<", "<memory unit='b'>2147483648<"),
            ("<memory unit='KiB'>2097152<", "<memory unit='GiB'>2<"),
            ("<memory unit='KiB'>", "<memory>"),
            ("<currentMemory unit='KiB'>2097152</currentMemory>", ""),
            ("<vcpu placement='static'>2<", "<vcpu current='2'>4<"),
        ] {
            assert_eq!(blocking(&expected(arch), &[(from, to)]), [], "{from} -> {to}");
        }
    }
}

/// The network card of a libvirt network stands in the XML as an `<interface>`.
#[test]
fn a_network_card_of_libvirt_is_not_compared() {
    let expected = expected(VmArchitecture::X86_64);
    let card = [("'-netdev'", "'-object'"), ("<devices>", "<devices><interface type='network'/>")];
    assert_eq!(blocking(&expected, &card), []);
}

#[test]
fn without_firmware_the_machine_boots_by_bios() {
    let expected = ExpectedMachine { flash: None, ..expected(VmArchitecture::X86_64) };
    let xml = live_xml(VmArchitecture::X86_64);
    let boot = &xml[xml.find("<loader").unwrap()..xml.find("<bootmenu").unwrap()];
    assert_eq!(blocking(&expected, &[(boot, "")]), []);
    let findings = diff(&expected, &xml.replace(boot, "")).unwrap();
    assert!(!findings[0].sentence.contains("flash"), "{findings:?}");
}

#[test]
fn xml_of_no_running_domain_is_an_error() {
    let expected = expected(VmArchitecture::Aarch64);
    let xml = live_xml(VmArchitecture::Aarch64);
    for (xml, reason) in [
        ("", "libvirt's domain cannot be read"),
        ("<pool type='dir'/>", "libvirt's domain cannot be read"),
        (&xml[..xml.len() / 2], "libvirt's domain cannot be read"),
        (&xml.replacen(" id='1'", "", 1), "without VIR_DOMAIN_XML_INACTIVE"),
    ] {
        let error = diff(&expected, xml).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }
}
