//! Snapshots and machines to work in, on real machines: one snapshot is made, restored, tampered with. `cargo xtask ci` runs these,
//! after a preflight.

mod own;

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use xtask_core::cache::Cache;
use xtask_core::digest::Algorithm;
use xtask_core::error::Verdict;
use xtask_core::limits::{self, SILENCE};
use xtask_core::processes::processes_naming;
use xtask_core::report::{Phase, PhaseStatus, Report};
use xtask_core::snapshot::{BAD, DISK, FILES, MANIFEST, RAM, SnapshotManifest};

use own::Own;

const XTASK_VM: &str = env!("CARGO_BIN_EXE_xtask-vm");
const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

impl Own {
    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(program);
        command.args(arguments).env("IOT_XTASK_CACHE", &self.root).stdin(Stdio::null());
        command.output().unwrap()
    }

    /// A smoke, and its report; nothing of it may be left.
    fn smoke(&self, arguments: &[&str]) -> (Output, Report) {
        let words = [&["smoke", "--fsck", "--arch", "aarch64", "--image", "debian-12"], arguments].concat();
        let output = self.run(XTASK_VM, &words);
        let message = message(&output);
        let path = message.lines().find_map(|line| line.strip_prefix("report: "));
        let report = std::fs::read(path.unwrap_or_else(|| panic!("{message}"))).unwrap();
        let report: Report = serde_json::from_slice(&report).unwrap();
        let work = self.root.join("runs").join(&report.run_id).join("w");
        assert_eq!(processes_naming(&work), Vec::<Pid>::new(), "{message}");
        assert!(!work.exists(), "{} is left: {message}", work.display());
        if report.verdict == Verdict::Verified {
            let teardown = &report.phases.last().unwrap().detail;
            assert!(teardown.contains("1 file system(s) of the guest checked, no damage"), "{teardown}");
        }
        (output, report)
    }

    fn vm(&self, arguments: &[&str]) -> Output {
        self.run(XTASK, &[&["vm"], arguments].concat())
    }

    fn snapshots(&self) -> Vec<PathBuf> {
        xtask_core::fs::directories(&self.root.join("snapshots"))
    }
}

fn message(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn assert_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{}", message(output));
}

/// One after the other: they share the snapshot, whose making is a whole boot.
#[test]
fn a_snapshot_is_made_once_used_again_and_never_trusted() {
    let own = Own::new();
    let (output, made) = own.smoke(&["--until", "join"]);
    assert_code(&output, 0);
    let snapshot = made.snapshot.unwrap();
    assert_eq!((made.verdict, snapshot.made_by.as_str()), (Verdict::Verified, made.run_id.as_str()));
    assert!(message(&output).contains("warm, only until join"), "{}", message(&output));
    let [directory] = own.snapshots().try_into().unwrap();
    saved(&directory);

    let warm = compared(&own);
    let restored = warm.snapshot.as_ref().unwrap();
    assert_eq!(restored.made_by, made.run_id, "restored, not made again");
    // Each restore begins with the clock of when the snapshot was saved, and no time server is reached by the guest before it is set.
    let (first, later) = (snapshot.clock_step_seconds.unwrap(), restored.clock_step_seconds.unwrap());
    assert!(first < later, "{first} s and, later, {later} s");
    assert!(warm.phases.iter().all(|phase| phase.status == PhaseStatus::Passed), "{:?}", warm.phases);
    let evidence = &warm.evidence;
    let (join, rejoin) = (evidence.join.as_ref().unwrap(), evidence.rejoin.as_ref().unwrap());
    assert!(join.boot_id != rejoin.boot_id && join.exe_sha256 == rejoin.exe_sha256);
    assert!(evidence.workload_offline.is_some() && evidence.workload_rejoin.is_some());
    // What the runs wrote went into snapshots of their own.
    saved(&directory);

    machines_to_work_in(&own, &directory);

    let (output, past) = own.smoke(&["--sabotage", "stale-chain"]);
    assert_code(&output, 69);
    let failure = past.failure.unwrap();
    let described = format!("{} {}", failure.error, failure.causes.join(" "));
    assert!(described.contains("has the backing files") && described.contains(DISK), "{described}");

    pruned(&own, &directory);
    of_no_use(&own, &directory);
    stopped_and_let_go(&own);

    flip_a_byte(&directory.join(RAM));
    let (output, flipped) = own.smoke(&["--until", "join"]);
    assert_code(&output, 69);
    let failure = flipped.failure.unwrap();
    assert!(failure.error.contains("was changed in ram.save"), "{failure:?}");
    // Another run may still read it: it is deleted by the next one that looks, and used by none.
    assert_eq!(own.snapshots(), [directory.as_path()]);
    assert!(std::fs::read_to_string(directory.join("bad")).unwrap().contains("expected sha256:"));
}

/// A warm run and a cold one say the same; and where the cold one is spoiled, not. The warm one's report.
fn compared(own: &Own) -> Report {
    let smoke = |arguments: &[&str]| {
        let words =
            ["smoke", "--verify-cold", "--warm", "--fsck", "--arch", "aarch64", "--image", "debian-12"];
        own.run(XTASK_VM, &[&words, arguments].concat())
    };
    let output = smoke(&["--until", "join"]);
    assert_code(&output, 0);
    assert!(message(&output).contains("the warm run and the cold one agree"), "{}", message(&output));
    let output = smoke(&["--sabotage", "cold-panics"]);
    assert_code(&output, 1);
    let differs = "the verdict: warm Verified, cold Failed";
    assert!(message(&output).contains(differs), "{}", message(&output));
    let report = |name| {
        let path = own.root.join("compared").join(name).join("report.json");
        serde_json::from_slice::<Report>(&std::fs::read(path).unwrap()).unwrap()
    };
    assert_eq!(report("cold").failure.unwrap().phase, Phase::Boot);
    report("warm")
}

/// As it was written down, and read-only.
fn saved(directory: &Path) {
    let snapshot = SnapshotManifest::read(directory).unwrap();
    assert_eq!(snapshot.files.len(), FILES.len());
    for (name, file) in &snapshot.files {
        let path = directory.join(name);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o400, "{name}");
        let found = Algorithm::Sha256.of(&std::fs::read(&path).unwrap());
        assert_eq!(found, file.digest, "{name}");
    }
    let names: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), FILES.len() + 2, "nothing else is in a snapshot: {names:?}");
}

/// A snapshot stays for as long as its image and its QEMU are there, and there is room.
fn pruned(own: &Own, directory: &Path) {
    let would_for = |criterion: [&str; 2]| {
        let output = own.run(XTASK_VM, &[&["image", "prune", "--dry-run"][..], &criterion].concat());
        assert_code(&output, 0);
        message(&output)
    };
    let name = directory.file_name().unwrap().to_str().unwrap();
    assert!(!would_for(["--keep", "100G"]).contains(name));
    assert!(would_for(["--keep", "1M"]).contains(&format!("would delete {name}")));
    let would = || would_for(["--older-than", "999"]);
    assert!(!would().contains("snapshot"), "{}", would());
    let path = directory.join(MANIFEST);
    let manifest = std::fs::read_to_string(&path).unwrap();
    let made_of = SnapshotManifest::read(directory).unwrap().ingredients;
    for (digest, reason) in
        [(&made_of.emulator, "of a QEMU that is no longer"), (&made_of.image, "of an image that no longer")]
    {
        let other = Algorithm::Sha256.of(b"another").to_string();
        std::fs::write(&path, manifest.replace(&digest.to_string(), &other)).unwrap();
        assert!(would().contains(reason), "{reason}: {}", would());
    }
    std::fs::write(&path, manifest).unwrap();
    assert!(directory.exists() && !would().contains("snapshot"));
}

/// A snapshot that is unchanged, and of which no machine comes: the agent is not blamed, and the next run has another.
fn of_no_use(own: &Own, directory: &Path) {
    let (memory, manifest) = (directory.join(RAM), directory.join(MANIFEST));
    let aside = [&memory, &manifest].map(|path| (path, own.root.join(path.file_name().unwrap())));
    for (path, aside) in &aside {
        std::fs::rename(path, aside).unwrap();
    }
    let mut snapshot: SnapshotManifest =
        serde_json::from_slice(&std::fs::read(&aside[1].1).unwrap()).unwrap();
    let garbage = b"no memory of a machine";
    snapshot.files.get_mut(RAM).unwrap().digest = Algorithm::Sha256.of(garbage);
    std::fs::write(&memory, garbage).unwrap();
    std::fs::write(&manifest, serde_json::to_string(&snapshot).unwrap()).unwrap();
    let (output, past) = own.smoke(&["--until", "join"]);
    assert_code(&output, 69);
    let failure = past.failure.unwrap();
    assert!(failure.error.contains("restore the machine from the snapshot"), "{failure:?}");
    let listed = own.run(XTASK_VM, &["image", "list"]);
    let listed = String::from_utf8_lossy(&listed.stdout);
    assert!(listed.contains("a snapshot that will not be used again"), "{listed}");
    std::fs::remove_file(directory.join(BAD)).unwrap();
    for (path, aside) in &aside {
        std::fs::rename(aside, path).unwrap();
    }
}

/// A guest that says nothing for much longer than ever is called stuck, and is none the worse for it: where it goes on, so does the run.
fn stopped_and_let_go(own: &Own) {
    let mut child = Command::new(XTASK_VM)
        .args(["smoke", "--arch", "aarch64", "--image", "debian-12", "--warm", "--until", "join"])
        .env("IOT_XTASK_CACHE", &own.root)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut until = |wanted: &str| {
        let seen: Vec<_> = lines.by_ref().take_while(|line| !line.contains(wanted)).collect();
        seen.join("\n")
    };
    until("provision  …");
    let emulator = own_emulator(own);
    kill_process(emulator, Signal::STOP).unwrap();
    let stopped = Instant::now();
    let before = until("provision may be stuck");
    let silent = stopped.elapsed();
    kill_process(emulator, Signal::CONT).unwrap();
    let after = until("VERIFIED");
    assert_eq!(child.wait().unwrap().code(), Some(0), "{before}\n{after}");
    assert!(silent >= SILENCE, "after {silent:?}: {before}");
}

/// The QEMU of the one run that there is.
fn own_emulator(own: &Own) -> Pid {
    let named = processes_naming(&own.root.join("runs"));
    let is_emulator = |pid: &Pid| {
        let name =
            std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default();
        name.starts_with("qemu-system")
    };
    let [emulator] = named.into_iter().filter(is_emulator).collect::<Vec<_>>().try_into().unwrap();
    emulator
}

/// With the times of before: a stamp shows nothing.
fn flip_a_byte(path: &Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 1], middle).unwrap();
    file.set_modified(modified).unwrap();
}

/// Who attaches to the console sees what was said, types, and is answered; only one at a time.
fn attached(own: &Own) {
    let path = own.root.join("attached");
    let mut child = Command::new(XTASK_VM)
        .args(["vm", "console", "dev"])
        .env("IOT_XTASK_CACHE", &own.root)
        .stdin(Stdio::piped())
        .stdout(std::fs::File::create(&path).unwrap())
        .spawn()
        .unwrap();
    let until = |wanted: &str| {
        let deadline = Instant::now() + Duration::from_secs(90);
        let mut seen = String::new();
        while !seen.contains(wanted) {
            assert!(Instant::now() < deadline, "no {wanted:?} in {seen}");
            std::thread::sleep(Duration::from_millis(200));
            seen = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
        }
    };
    until("Linux version");
    until(" login: ");
    let second = own.run(XTASK_VM, &["vm", "console", "dev"]);
    assert_code(&second, 69);
    assert!(message(&second).contains("another terminal is attached"), "{}", message(&second));
    child.stdin.as_mut().unwrap().write_all(b"nobody-of-this-name\n").unwrap();
    until("nobody-of-this-name");
    until("Password: ");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let log = own.vm(&["console", "dev", "--no-follow"]);
    assert!(message(&log).contains("nobody-of-this-name"), "the log has what was said to somebody else");
}

/// What is said of it and by it; and a dead run beside it, which is collected while it is not.
fn looked_at(own: &Own) {
    let json = |arguments: &[&str]| {
        let output = own.vm(arguments);
        assert_code(&output, 0);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let entered = own.vm(&["ssh", "dev", "--", "echo", "$HOME and  it's"]);
    assert_code(&entered, 0);
    assert!(message(&entered).contains("$HOME and  it's"), "{}", message(&entered));
    let journal = own.vm(&["logs", "dev", "--", "--unit=ssh.service", "--output=json", "--lines=1"]);
    assert_code(&journal, 0);
    assert!(String::from_utf8_lossy(&journal.stdout).contains("\"_BOOT_ID\""), "{}", message(&journal));
    let running = |name: &str| {
        let listed = json(&["list", "--json"]);
        let machines = listed["machines"].as_array().unwrap();
        machines.len() == 1 && machines[0]["name"] == name && machines[0]["running"] == true
    };
    assert!(running("dev"));
    let dead = own.root.join("runs/0101-000000-dead");
    std::fs::create_dir_all(dead.join("w")).unwrap();
    std::fs::write(dead.join("lock"), "").unwrap();
    for (arguments, collected) in [(&["gc", "--dry-run", "--json"][..], false), (&["gc", "--json"], true)] {
        let message = json(arguments);
        assert_eq!(
            (&message["collected"], &message["runs"][0]["run"]),
            (&collected.into(), &"0101-000000-dead".into())
        );
        assert_eq!(dead.exists(), !collected);
    }
    assert!(running("dev"));
}

/// Up in seconds, entered, cut off, booted from its own disk, shut down, removed.
fn machines_to_work_in(own: &Own, snapshot: &Path) {
    let up = own.run(XTASK_VM, &["vm", "up", "dev", "--arch", "aarch64", "--image", "debian-12", "--json"]);
    assert_code(&up, 0);
    let machine: serde_json::Value = serde_json::from_slice(&up.stdout).unwrap();
    assert_eq!(machine["name"], "dev");
    let users = xtask_core::runs::users_of(&Cache::at(&own.root), snapshot);
    assert_eq!(users, [machine["id"].as_str().unwrap()], "nobody deletes what it lies on");
    let again = own.vm(&["up", "dev", "--arch", "aarch64"]);
    assert!(message(&again).contains("a machine of this name exists"), "{}", message(&again));

    let asked = own.vm(&["exec", "--", "sh", "-c", "uname -m; echo kept > here; sync here; exit 7"]);
    assert_code(&asked, 7);
    assert_eq!(String::from_utf8_lossy(&asked.stdout), "aarch64\n");
    looked_at(own);
    assert_code(&own.vm(&["power-cut", "dev"]), 0);
    let off = own.vm(&["exec", "true"]);
    assert_code(&off, 69);
    assert!(message(&off).contains("vm start dev"), "{}", message(&off));

    let started = own.vm(&["start", "dev"]);
    assert_code(&started, 0);
    let asked = own.vm(&["exec", "--", "cat", "here"]);
    assert_eq!(String::from_utf8_lossy(&asked.stdout), "kept\n", "{}", message(&asked));
    assert!(message(&own.vm(&["console", "dev", "--no-follow"])).contains("Linux version"));
    attached(own);
    // Its guest shuts itself down with nobody there to see it; then it boots all the same.
    let boot_id = || own.vm(&["exec", "--", "cat", "/proc/sys/kernel/random/boot_id"]).stdout;
    let before = boot_id();
    own.vm(&["exec", "--", "sudo", "systemctl", "poweroff"]);
    let asked = Instant::now();
    while !message(&own.vm(&["console", "dev", "--no-follow"])).contains("reboot: Power down") {
        assert!(asked.elapsed() < limits::SHUTDOWN, "it does not shut down");
        std::thread::sleep(limits::POLL);
    }
    assert_code(&own.vm(&["start", "dev"]), 0);
    let after = boot_id();
    assert!(!before.is_empty() && !after.is_empty() && before != after, "it has booted");
    assert_code(&own.vm(&["exec", "--", "cat", "here"]), 0);
    assert_code(&own.vm(&["stop", "dev"]), 0);
    let listed = own.vm(&["list"]);
    assert!(message(&listed).contains("off"), "{}", message(&listed));
    assert_code(&own.vm(&["gc"]), 0);
    assert_code(&own.vm(&["rm", "dev"]), 0);
    assert_eq!(message(&own.vm(&["list"])), "");
}
