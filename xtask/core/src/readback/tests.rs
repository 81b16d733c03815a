//! Tests [`diff`] with a machine without faults and with each fault. The tests use recorded responses of real QEMUs
//! (`test_data/qmp-*.json`: QEMU 7.2 under libvirt 9.0, with shortened paths).

use std::path::Path;

use serde_json::{Value, json};

use super::diff::{diff, refused};
use super::observed::Observed;
use super::*;
use crate::cli::MachineArgs;
use crate::cpu::Cpu;
use crate::host::firmware::AarchFirmware;
use crate::machine::RunFiles;

/// Returns the recorded queries and responses.
fn recorded(arch: VmArchitecture) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("test_data/qmp-{arch}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn params(arch: VmArchitecture) -> DomainXmlParams {
    let (code, vars_template) = arch.profile().firmware_paths[arch.pick(0, 1)];
    let firmware = AarchFirmware { code: code.into(), vars_template: vars_template.into() };
    let files = RunFiles {
        overlay: "/run/w/disk.qcow2".into(),
        backing: vec!["/images/disk".into()],
        seed: "/run/w/seed.img".into(),
        payload: "/run/w/payload.img".into(),
        nvram: "/run/w/nvram.fd".into(),
        console_log: "/run/console.log".into(),
        console_socket: "/run/console.sock".into(),
        markers_log: "/run/markers.log".into(),
        root_socket: "/run/root.sock".into(),
        uuid: "6a7e489a-24e7-440d-b2b9-310110de50b9".into(),
    };
    DomainXmlParams {
        spec: VmSpec::from_args(arch, &MachineArgs::default()),
        accelerator: Accelerator::Tcg,
        cpu: Cpu::resolve(arch, Accelerator::Tcg, None),
        emulator: Path::new("/usr/bin").join(arch.profile().emulator),
        firmware: Some(firmware),
        files,
        daemon: None,
    }
}

fn expected(arch: VmArchitecture) -> ExpectedMachine {
    let params = params(arch);
    let code = &params.firmware.as_ref().unwrap().code;
    let size = |path: &Path| Ok(if path == code { 3_653_632 } else { 540_672 });
    ExpectedMachine { own_threads: true, ..ExpectedMachine::with_sizes(&params, size).unwrap() }
}

/// Reads a machine from these responses.
fn read(expected: &ExpectedMachine, answers: &[Value]) -> Result<Observed> {
    let mut ask = |command: &str, arguments: &Value| {
        let asked =
            answers.iter().find(|answer| answer["execute"] == command && answer["arguments"] == *arguments);
        let asked = asked.with_context(|| format!("{command} {arguments} was not recorded"))?;
        Ok(asked["return"].clone())
    };
    Observed::read(expected, &mut ask)
}

fn ids(expected: &ExpectedMachine, seen: &Observed) -> Vec<&'static str> {
    diff(expected, seen).iter().map(|finding| finding.id).collect()
}

#[test]
fn a_sound_domain_has_no_findings() {
    for arch in VmArchitecture::ALL {
        let expected = expected(arch);
        let seen = read(&expected, &recorded(arch)).unwrap();
        assert_eq!(diff(&expected, &seen), [], "{arch}");
        assert_eq!((seen.flashes.len(), seen.vcpus.len(), seen.devices.len()), (2, 2, 5), "{arch}");
    }
}

#[test]
fn each_fault_is_found_under_its_own_id() {
    type Deviation = fn(&mut Observed);
    fn disk(seen: &mut Observed) -> impl Iterator<Item = &mut super::observed::Layer> {
        seen.layers.iter_mut().filter(|layer| layer.file.ends_with("disk.qcow2"))
    }
    let table: &[(&str, Deviation)] = &[
        ("rehearsal-guest-ran", |seen| seen.status.running = true),
        ("rehearsal-guest-ran", |seen| seen.status.status = "running".into()),
        ("rehearsal-accelerator", |seen| seen.kvm.enabled = true),
        ("rehearsal-machine", |seen| seen.machine = "none-machine".into()),
        ("rehearsal-memory", |seen| seen.memory_bytes /= 2),
        ("rehearsal-processors", |seen| drop(seen.vcpus.pop())),
        ("rehearsal-threads", |seen| seen.vcpus[1].thread_id = seen.vcpus[0].thread_id),
        ("rehearsal-cpu-model", |seen| seen.cpu_type = "cortex-a15-arm-cpu".into()),
        ("rehearsal-flash-size", |seen| seen.flashes[0].bytes += 4096),
        ("rehearsal-flash-size", |seen| seen.flashes[1].bytes /= 2),
        ("rehearsal-firmware", |seen| seen.flashes.clear()),
        ("rehearsal-firmware", |seen| seen.flashes[0].layer.ro = false),
        ("rehearsal-firmware", |seen| seen.flashes[0].layer.file = "/other.fd".into()),
        ("rehearsal-nvram", |seen| seen.flashes.truncate(1)),
        ("rehearsal-nvram", |seen| seen.flashes[1].layer.file = "/other.fd".into()),
        ("rehearsal-nvram", |seen| seen.flashes[1].layer.ro = true),
        ("rehearsal-disk", |seen| seen.devices.retain(|device| !device.qdev.contains("virtio-disk1"))),
        ("rehearsal-disk-chain", |seen| {
            let root = seen.devices.iter_mut().filter_map(|device| device.inserted.as_mut());
            let image = root
                .filter_map(|layer| layer.image.as_mut())
                .find(|image| image.filename.ends_with("disk.qcow2"));
            image.unwrap().backing_image.as_mut().unwrap().filename = "/images/another".to_owned();
        }),
        ("rehearsal-disk-writable", |seen| {
            seen.layers
                .iter_mut()
                .filter(|layer| layer.file == "/images/disk")
                .for_each(|layer| layer.ro = false);
        }),
        ("rehearsal-disk-cache", |seen| disk(seen).for_each(|layer| layer.cache.no_flush = true)),
        // The fault must be found in each of the two nodes of the disk.
        ("rehearsal-disk-cache", |seen| disk(seen).next().unwrap().cache.direct = false),
        ("rehearsal-disk-cache", |seen| disk(seen).nth(1).unwrap().cache.direct = false),
        ("rehearsal-network", |seen| seen.forwarding.clear()),
        ("rehearsal-network", |seen| seen.forwarding = seen.forwarding.replace(" 8081 ", " 9081 ")),
        ("rehearsal-network", |seen| seen.forwarding = seen.forwarding.replace("127.0.0.1", "0.0.0.0")),
    ];
    for arch in VmArchitecture::ALL {
        let expected = expected(arch);
        for (id, fault) in table {
            let mut seen = read(&expected, &recorded(arch)).unwrap();
            fault(&mut seen);
            let found = ids(&expected, &seen);
            assert!(found.contains(id), "{arch}: {found:?} are not {id}");
            // The row that removes all flash devices causes two findings: one for the code, and one for the variables.
            assert!(found.len() == 1 || seen.flashes.is_empty(), "{arch} {id}: {found:?}");
        }
    }
}

/// This test uses the response of a QEMU that was started by hand with `-accel tcg,thread=single`.
#[test]
fn one_thread_for_all_processors_is_found_as_qemu_tells_it() {
    let expected = expected(VmArchitecture::X86_64);
    let mut answers = recorded(VmArchitecture::X86_64);
    let cpus = answers.iter_mut().find(|answer| answer["execute"] == "query-cpus-fast").unwrap();
    cpus["return"] = json!([
        { "thread-id": 9697, "props": { "core-id": 0, "thread-id": 0, "socket-id": 0 },
          "qom-path": "/machine/unattached/device[0]", "cpu-index": 0, "target": "x86_64" },
        { "thread-id": 9697, "props": { "core-id": 1, "thread-id": 0, "socket-id": 0 },
          "qom-path": "/machine/unattached/device[2]", "cpu-index": 1, "target": "x86_64" },
    ]);
    let seen = read(&expected, &answers).unwrap();
    assert_eq!(ids(&expected, &seen), ["rehearsal-threads"]);
    assert_eq!(ids(&ExpectedMachine { own_threads: false, ..expected }, &seen), Vec::<&str>::new());
}

#[test]
fn the_variables_template_in_the_place_of_a_copy_is_named() {
    let mut expected = expected(VmArchitecture::Aarch64);
    let seen = read(&expected, &recorded(VmArchitecture::Aarch64)).unwrap();
    expected.flash.as_mut().unwrap().template = "/run/w/nvram.fd".into();
    let findings = diff(&expected, &seen);
    assert_eq!(findings[0].id, "rehearsal-nvram");
    assert!(findings[0].sentence.contains("the template /run/w/nvram.fd"), "{findings:?}");
}

#[test]
fn a_cpu_property_that_is_not_as_asked_is_found_on_any_processor() {
    let arch = VmArchitecture::Aarch64;
    let mut expected = expected(arch);
    assert_eq!(expected.cpu_properties, [("sve".to_owned(), false), ("pauth".to_owned(), false)]);
    let asked = |answer: &&mut Value, name: &str| answer["arguments"]["property"] == name;
    for name in ["sve", "pauth"] {
        let mut answers = recorded(arch);
        answers.iter_mut().rfind(|answer| asked(answer, name)).unwrap()["return"] = json!(true);
        let seen = read(&expected, &answers).unwrap();
        assert_eq!(ids(&expected, &seen), ["rehearsal-cpu-feature"], "{name}");
    }
    // If the CPU does not have a property at all, this is a fault only if the property should be on.
    let mut answers = recorded(arch);
    answers
        .retain(|answer| !["sve", "pauth"].contains(&answer["arguments"]["property"].as_str().unwrap_or("")));
    expected.cpu_properties.push(("lpa2".to_owned(), true));
    let seen = read(&expected, &answers).unwrap();
    let findings = diff(&expected, &seen);
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(findings[0].sentence.contains("lpa2 is not on"), "{findings:?}");
}

#[test]
fn an_answer_that_cannot_be_read_names_the_question() {
    let expected = expected(VmArchitecture::X86_64);
    let mut answers = recorded(VmArchitecture::X86_64);
    answers.iter_mut().find(|answer| answer["execute"] == "query-kvm").unwrap()["return"] = json!("yes");
    let error = read(&expected, &answers).unwrap_err();
    assert!(error.to_string().contains("query-kvm"), "{error:#}");
}

#[test]
fn a_refusal_is_told_by_what_it_is_about_in_its_own_words() {
    let table = [
        ("unknown CPU feature: no-such-feature", "rehearsal-cpu-refused"),
        ("device requires 67108864 bytes, block backend provides 67112960 bytes", "rehearsal-flash-size"),
        ("combined size of system firmware exceeds 8388608 bytes: pflash1", "rehearsal-flash-size"),
        ("Cannot access storage file '/images/disk': Permission denied", "rehearsal-refused"),
    ];
    let expected = expected(VmArchitecture::Aarch64);
    for (words, id) in table {
        let finding = refused(&expected, words);
        assert_eq!((finding.id, finding.evidence.as_str()), (id, words));
    }
    let words = "Could not access KVM kernel module: Permission denied";
    assert_eq!(refused(&expected, words).id, "rehearsal-refused", "KVM was not requested");
    let kvm = ExpectedMachine { accelerator: Accelerator::Kvm, ..expected };
    assert_eq!(refused(&kvm, words).id, "rehearsal-kvm");
}
