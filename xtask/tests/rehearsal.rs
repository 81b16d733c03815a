//! The rehearsal against real QEMUs: sound machines pass in silence, and every planted fault is found under its own id, with
//! nothing left running and nothing left lying. `cargo xtask ci` runs these, after a preflight.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use xtask_core::processes::processes_naming;

const XTASK_VM: &str = env!("CARGO_BIN_EXE_xtask-vm");
const ARCHITECTURES: [&str; 2] = ["aarch64", "x86_64"];

/// A cache of its own without any image: what a rehearsal leaves can be seen, and an empty disk stands in.
struct Own {
    directory: tempfile::TempDir,
}

impl Own {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("c")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(XTASK_VM);
        command.args(["preflight", "--rehearse", "--json"]).args(arguments);
        command.env("IOT_XTASK_CACHE", self.root()).stdin(Stdio::null());
        command
    }

    /// A rehearsal under emulation, which every host can do.
    fn rehearse(&self, arguments: &[&str]) -> Rehearsed {
        let output = self.command(&["--accel", "tcg"]).args(arguments).output().unwrap();
        Rehearsed::of(&output)
    }

    fn assert_nothing_left(&self) {
        assert_eq!(processes_naming(&self.root()), Vec::<Pid>::new());
        let names: Vec<_> = entries(&self.root().join("runs"));
        assert_eq!(names, [".lock"]);
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
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
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
    let own = Own::new();
    let rehearsed = own.rehearse(&[]);
    assert_eq!(rehearsed.blocking(), Vec::<&str>::new(), "{}", rehearsed.message);
    assert_eq!(rehearsed.code, Some(0), "{}", rehearsed.message);
    let described: Vec<_> =
        rehearsed.findings().iter().filter(|finding| finding["id"] == "rehearsed").collect();
    assert_eq!(described.len(), 2, "{described:?}");
    for finding in described {
        let evidence = finding["evidence"].as_str().unwrap();
        assert!(evidence.contains("tcg") && evidence.contains("an empty disk instead of"), "{evidence}");
    }
    own.assert_nothing_left();
}

#[test]
fn each_planted_fault_is_found_under_its_own_id() {
    let own = Own::new();
    for (fault, id) in [
        ("single-thread", "rehearsal-threads"),
        ("cpu-feature", "rehearsal-cpu-feature"),
        ("cpu-refused", "rehearsal-cpu-refused"),
        ("flash-size", "rehearsal-flash-size"),
        ("unsafe-cache", "rehearsal-disk-cache"),
        ("nvram-template", "rehearsal-nvram"),
    ] {
        for arch in ARCHITECTURES {
            let rehearsed = own.rehearse(&["--arch", arch, "--sabotage", fault]);
            assert_eq!(rehearsed.blocking(), [id], "{fault} {arch}: {}", rehearsed.message);
            assert_eq!(rehearsed.code, Some(69), "{fault} {arch}: {}", rehearsed.message);
            own.assert_nothing_left();
        }
    }
}

/// A QEMU that emulates all processors on one thread, whatever it is told: `-accel tcg` becomes `-accel tcg,thread=single`.
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
    let own = Own::new();
    let path = path_with_single_threaded_qemu(&own.directory.path().join("bin"));
    let arguments = ["--arch", "x86_64", "--accel", "tcg"];
    let rehearsed = Rehearsed::of(&own.command(&arguments).env("PATH", &path).output().unwrap());
    assert_eq!(rehearsed.blocking(), ["rehearsal-threads"], "{}", rehearsed.message);

    // As far as anybody looks before it would boot: a disk with partitions, and an executable for x86_64.
    let disk = own.directory.path().join("disk.raw");
    let mut bytes = vec![0; 1 << 20];
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(&disk, bytes).unwrap();
    let report = own.directory.path().join("report");
    let output = Command::new(XTASK_VM)
        .args(["smoke", "--agent", XTASK_VM, "--unverified", "--image"])
        .args([&disk, Path::new("--report"), &report])
        .args(arguments)
        .env("IOT_XTASK_CACHE", own.root())
        .env("PATH", &path)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{message}");
    assert!(message.contains("its 2 processors run on 1 thread(s)"), "{message}");
    let console = std::fs::read(report.join("console.log")).unwrap_or_default();
    assert!(console.is_empty(), "the guest has run: {}", String::from_utf8_lossy(&console));
    assert_eq!(processes_naming(&own.root()), Vec::<Pid>::new());
}

#[test]
fn a_fault_that_changes_nothing_is_told_as_not_found() {
    let own = Own::new();
    // One processor has one thread in any case.
    let rehearsed = own.rehearse(&["--arch", "aarch64", "--vcpus", "1", "--sabotage", "single-thread"]);
    assert_eq!(rehearsed.code, Some(1), "{}", rehearsed.message);
    assert!(rehearsed.message.contains("did not find the planted fault"), "{}", rehearsed.message);
    own.assert_nothing_left();
}

#[test]
fn what_libvirt_learned_of_qemu_is_kept_private_and_valid() {
    let own = Own::new();
    own.rehearse(&["--arch", "aarch64"]);
    let kept = own.root().join("libvirt");
    let mode = std::os::unix::fs::MetadataExt::mode(&kept.metadata().unwrap());
    assert_eq!(mode & 0o077, 0, "{mode:o}");
    let known = kept.join("qemu/capabilities");
    let [name] = entries(&known).try_into().unwrap();
    let written = || known.join(&name).metadata().unwrap().modified().unwrap();
    let first = written();
    own.rehearse(&["--arch", "aarch64"]);
    assert_eq!(written(), first, "the second run took what the first one had learned");
    // Half a file, as another run might be writing it.
    let whole = std::fs::read(known.join(&name)).unwrap();
    std::fs::write(known.join(&name), &whole[..whole.len() / 2]).unwrap();
    let rehearsed = own.rehearse(&["--arch", "aarch64"]);
    assert_eq!(rehearsed.code, Some(0), "{}", rehearsed.message);
    assert_eq!(
        std::fs::read(known.join(&name)).unwrap().len(),
        whole.len(),
        "it was probed and written again"
    );
}

#[test]
fn rehearsals_at_once_share_what_libvirt_learns() {
    let own = Own::new();
    let start = |arch| {
        let mut command = own.command(&["--accel", "tcg", "--arch", arch]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children = ["aarch64", "x86_64", "aarch64", "x86_64"].map(start);
    for child in children {
        let rehearsed = Rehearsed::of(&child.wait_with_output().unwrap());
        assert_eq!(rehearsed.code, Some(0), "{}", rehearsed.message);
    }
    own.assert_nothing_left();
}

#[test]
fn what_a_killed_rehearsal_left_is_collected_by_the_next_one() {
    let own = Own::new();
    let mut child = own
        .command(&["--accel", "tcg", "--arch", "aarch64"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    // The first thing that names it is a QEMU that libvirt probes.
    while processes_naming(&own.root()).is_empty() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "no QEMU");
        std::thread::sleep(Duration::from_millis(2));
    }
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
    child.wait().unwrap();
    let rehearsed = own.rehearse(&["--arch", "aarch64"]);
    assert_eq!(rehearsed.code, Some(0), "{}", rehearsed.message);
    assert!(rehearsed.message.contains("which died"), "{}", rehearsed.message);
    own.assert_nothing_left();
}

#[test]
fn a_rehearsal_of_a_cpu_that_qemu_does_not_have_is_a_usage_error() {
    let own = Own::new();
    let output = own.command(&["--arch", "aarch64", "--accel", "tcg", "--cpu", "z80"]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    own.assert_nothing_left();
}
