//! Tests the rehearsal, the start of a paused domain, with real QEMUs: sound machines pass, every planted fault is
//! found under its own id, and no process or file is left. `cargo xtask ci` runs these tests after a preflight.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::process::Pid;
use serde_json::Value;
use xtask_core::processes::processes_naming;

use crate::draw::drawn;
use crate::scratch::{Scratch, XTASK_VM, assert_code, message, wait_until};

const ARCHITECTURES: [&str; 2] = ["aarch64", "x86_64"];

/// These commands run in a cache without images, so that an empty disk replaces the image.
impl Scratch {
    fn rehearsal(&self, arguments: &[&str]) -> Command {
        self.xtask_vm(&[&["preflight", "--rehearse", "--json"], arguments].concat())
    }

    /// Runs a rehearsal under emulation, which works on every host.
    fn rehearse(&self, arguments: &[&str]) -> Rehearsed {
        let output = self.rehearsal(&["--accel", "tcg"]).args(arguments).output().unwrap();
        Rehearsed::of(&output)
    }

    fn assert_nothing_left(&self) {
        assert_eq!(processes_naming(&self.cache()), Vec::<Pid>::new());
        assert_eq!(entries(&self.cache().join("runs")), [".lock"]);
    }
}

fn entries(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

struct Rehearsed {
    code: Option<i32>,
    described: Value,
    message: String,
}

impl Rehearsed {
    fn of(output: &Output) -> Self {
        let message = message(output);
        let described =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {message}"));
        Self { code: output.status.code(), described, message }
    }

    fn findings(&self) -> &[Value] {
        self.described["findings"].as_array().unwrap()
    }

    fn blocking(&self) -> Vec<&str> {
        let blocks = self.findings().iter().filter(|finding| finding["severity"] == "blocks");
        blocks.map(|finding| finding["id"].as_str().unwrap()).collect()
    }
}

#[test]
fn sound_machines_of_both_architectures_pass() {
    let scratch = Scratch::new();
    let rehearsed = scratch.rehearse(&[]);
    assert_eq!(rehearsed.blocking(), Vec::<&str>::new(), "{}", rehearsed.message);
    assert_eq!(rehearsed.code, Some(0), "{}", rehearsed.message);
    let described: Vec<_> =
        rehearsed.findings().iter().filter(|finding| finding["id"] == "rehearsed").collect();
    assert_eq!(described.len(), 2, "{described:?}");
    for finding in described {
        let evidence = finding["evidence"].as_str().unwrap();
        assert!(evidence.contains("tcg") && evidence.contains("an empty disk instead of"), "{evidence}");
    }
    scratch.assert_nothing_left();
}

#[test]
fn each_planted_fault_is_found_under_its_own_id() {
    let scratch = Scratch::new();
    let faults = vec![
        ("single-thread", "rehearsal-threads"),
        ("cpu-feature", "rehearsal-cpu-feature"),
        ("cpu-refused", "rehearsal-cpu-refused"),
        ("flash-size", "rehearsal-flash-size"),
        ("unsafe-cache", "rehearsal-disk-cache"),
        ("nvram-template", "rehearsal-nvram"),
    ];
    for (fault, id) in drawn("rehearsal", faults, |(fault, _)| (*fault).to_owned()) {
        for arch in ARCHITECTURES {
            let rehearsed = scratch.rehearse(&["--arch", arch, "--sabotage", fault]);
            assert_eq!(rehearsed.blocking(), [id], "{fault} {arch}: {}", rehearsed.message);
            assert_eq!(rehearsed.code, Some(69), "{fault} {arch}: {}", rehearsed.message);
            scratch.assert_nothing_left();
        }
    }
}

/// Makes a QEMU that always emulates all processors on one thread: it changes `-accel tcg` to
/// `-accel tcg,thread=single`. Returns a `PATH` with it.
fn path_with_single_threaded_qemu(directory: &Path) -> std::ffi::OsString {
    use std::os::unix::fs::PermissionsExt as _;
    let name = "qemu-system-x86_64";
    let real = xtask_core::host::tools::require(name).unwrap();
    let script = format!(
        "#!/bin/sh\nfor word do shift; [ \"$word\" = tcg ] && word=tcg,thread=single; set -- \"$@\" \"$word\"; done\n\
         exec {} \"$@\"\n",
        real.display()
    );
    std::fs::create_dir(directory).unwrap();
    std::fs::write(directory.join(name), script).unwrap();
    std::fs::set_permissions(directory.join(name), std::fs::Permissions::from_mode(0o700)).unwrap();
    let mut path = directory.as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap());
    path
}

#[test]
fn a_qemu_that_does_otherwise_is_found_by_the_rehearsal_and_by_the_smoke() {
    let scratch = Scratch::new();
    let path = path_with_single_threaded_qemu(&scratch.path().join("bin"));
    let arguments = ["--arch", "x86_64", "--accel", "tcg"];
    let rehearsed = Rehearsed::of(&scratch.rehearsal(&arguments).env("PATH", &path).output().unwrap());
    assert_eq!(rehearsed.blocking(), ["rehearsal-threads"], "{}", rehearsed.message);

    // The checks before a boot accept this disk with a partition table, and this executable for x86_64.
    let disk = scratch.path().join("disk.raw");
    let mut bytes = vec![0; 1 << 20];
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(&disk, bytes).unwrap();
    let report = scratch.path().join("report");
    let output = scratch
        .xtask_vm(&["smoke", "--agent", XTASK_VM, "--unverified", "--image"])
        .args([&disk, Path::new("--report"), &report])
        .args(arguments)
        .env("PATH", &path)
        .output()
        .unwrap();
    assert_code(&output, 69);
    let message = message(&output);
    assert!(message.contains("its 2 processors run on 1 thread(s)"), "{message}");
    let console = std::fs::read(report.join("console.log")).unwrap_or_default();
    assert!(console.is_empty(), "the guest has run: {}", String::from_utf8_lossy(&console));
    assert_eq!(processes_naming(&scratch.cache()), Vec::<Pid>::new());
}

#[test]
fn a_fault_that_changes_nothing_is_told_as_not_found() {
    let scratch = Scratch::new();
    // With one processor, QEMU uses one thread for the processors in any case, so this fault changes nothing.
    let rehearsed = scratch.rehearse(&["--arch", "aarch64", "--vcpus", "1", "--sabotage", "single-thread"]);
    assert_eq!(rehearsed.code, Some(1), "{}", rehearsed.message);
    assert!(rehearsed.message.contains("did not find the planted fault"), "{}", rehearsed.message);
    scratch.assert_nothing_left();
}

#[test]
fn what_libvirt_learned_of_qemu_is_kept_private_and_valid() {
    let scratch = Scratch::new();
    scratch.rehearse(&["--arch", "aarch64"]);
    let kept = scratch.cache().join("libvirt");
    let mode = std::os::unix::fs::MetadataExt::mode(&kept.metadata().unwrap());
    assert_eq!(mode & 0o077, 0, "{mode:o}");
    let known = kept.join("qemu/capabilities");
    let [name] = entries(&known).try_into().unwrap();
    let written = || known.join(&name).metadata().unwrap().modified().unwrap();
    let first = written();
    scratch.rehearse(&["--arch", "aarch64"]);
    assert_eq!(written(), first, "the second run used the probe result of the first one");
    // Write half of the file, as if another run were still writing it.
    let whole = std::fs::read(known.join(&name)).unwrap();
    std::fs::write(known.join(&name), &whole[..whole.len() / 2]).unwrap();
    let rehearsed = scratch.rehearse(&["--arch", "aarch64"]);
    assert_eq!(rehearsed.code, Some(0), "{}", rehearsed.message);
    assert_eq!(
        std::fs::read(known.join(&name)).unwrap().len(),
        whole.len(),
        "QEMU was probed again and the file written anew"
    );
}

#[test]
fn rehearsals_at_once_share_what_libvirt_learns() {
    let scratch = Scratch::new();
    let start = |arch| {
        let mut command = scratch.rehearsal(&["--accel", "tcg", "--arch", arch]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children = ["aarch64", "x86_64", "aarch64", "x86_64"].map(start);
    for child in children {
        let rehearsed = Rehearsed::of(&child.wait_with_output().unwrap());
        assert_eq!(rehearsed.code, Some(0), "{}", rehearsed.message);
    }
    scratch.assert_nothing_left();
}

#[test]
fn what_a_killed_rehearsal_left_is_collected_by_the_next_one() {
    let scratch = Scratch::new();
    let mut child = scratch
        .rehearsal(&["--accel", "tcg", "--arch", "aarch64"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The first process that names the cache is a QEMU that libvirt probes. It exists only for a moment.
    wait_until("libvirt probes QEMU", Duration::from_secs(60), || {
        assert!(child.try_wait().unwrap().is_none(), "the rehearsal has ended");
        !processes_naming(&scratch.cache()).is_empty()
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let rehearsed = scratch.rehearse(&["--arch", "aarch64"]);
    assert_eq!(rehearsed.code, Some(0), "{}", rehearsed.message);
    assert!(rehearsed.message.contains("which died"), "{}", rehearsed.message);
    scratch.assert_nothing_left();
}

#[test]
fn a_rehearsal_of_a_cpu_that_qemu_does_not_have_is_a_usage_error() {
    let scratch = Scratch::new();
    let output =
        scratch.rehearsal(&["--arch", "aarch64", "--accel", "tcg", "--cpu", "z80"]).output().unwrap();
    assert_code(&output, 2);
    scratch.assert_nothing_left();
}
