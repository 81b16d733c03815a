//! Sabotage: every check of the smoke is seen to fail on a subject that deserves it, with the right phase, a cause and a
//! remedy, and nothing left behind. Real machines; `cargo xtask ci` runs these, after a preflight.

mod own;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Pid, Signal, kill_process};
use xtask_core::cache::Cache;
use xtask_core::error::Verdict;
use xtask_core::processes::processes_naming;
use xtask_core::report::{Phase, PhaseStatus, Report};

use own::Own;

const XTASK_VM: &str = env!("CARGO_BIN_EXE_xtask-vm");
const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

/// A finished smoke: how it ended, what it said, what it wrote.
struct Ended {
    output: Output,
    report: Report,
    directory: PathBuf,
}

impl Ended {
    fn message(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }
}

/// A smoke of the aarch64 guest with `arguments`, awaited. From a snapshot, but for faults of the first boot.
fn smoke(arguments: &[&str]) -> Ended {
    let mut command = Command::new(XTASK_VM);
    command.args(["smoke", "--arch", "aarch64", "--image", "debian-12"]).args(arguments);
    ended(command.stdin(Stdio::null()).output().unwrap())
}

/// The report is where the last but one line says: in the run's own directory, which a pipeline keeps.
fn ended(output: Output) -> Ended {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    let path =
        message.lines().find_map(|line| line.strip_prefix("report: ")).unwrap_or_else(|| panic!("{message}"));
    let report = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    Ended { output, report, directory: Path::new(path).parent().unwrap().to_owned() }
}

/// Exit 1 in `phase`, saying `words`, with a remedy; and nothing left of the run.
fn assert_fails(ended: &Ended, phase: Phase, words: &str) {
    let message = ended.message();
    assert_eq!(ended.output.status.code(), Some(1), "{message}");
    assert_eq!(ended.report.verdict, Verdict::Failed, "{message}");
    let failure = ended.report.failure.as_ref().unwrap();
    assert_eq!(failure.phase, phase, "{message}");
    let described = format!("{} {}", failure.error, failure.causes.join(" "));
    assert!(described.contains(words), "{described:?} does not say {words:?}");
    assert!(failure.hint.is_some(), "no remedy: {message}");
    assert!(message.contains(&failure.error), "the screen does not say what the report says");
    assert_nothing_left(&Cache::from_env().unwrap(), &ended.report.run_id);
}

/// No QEMU, no nats-server, no working files: whatever names the run's directory is a leftover.
fn assert_nothing_left(cache: &Cache, run_id: &str) {
    let run = cache.runs().join(run_id);
    assert_eq!(processes_naming(&run.join("w")), Vec::<Pid>::new());
    assert!(!run.join("w").exists(), "{} is left", run.display());
}

fn skipped(report: &Report, phase: Phase) -> bool {
    report.phases.iter().any(|done| done.name == phase && done.status == PhaseStatus::Skipped)
}

#[test]
fn an_executable_for_another_machine_never_reaches_the_guest() {
    let started = Instant::now();
    let ended = smoke(&["--agent", XTASK_VM]);
    assert_fails(&ended, Phase::Build, "built for x86_64, and the device is aarch64");
    assert!(skipped(&ended.report, Phase::Boot));
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[test]
fn an_executable_that_its_core_cannot_run_never_reaches_the_guest() {
    let directory = tempfile::tempdir().unwrap();
    let (name, flags, source, _) = GUESTS[1];
    let file = compiled(directory.path(), name, flags, source);
    let ended = smoke(&["--agent", file.to_str().unwrap()]);
    assert_fails(&ended, Phase::Inspect, "used without a check");
    assert!(skipped(&ended.report, Phase::Boot));
}

#[test]
fn another_executable_in_the_guest_is_found_at_join() {
    let ended = smoke(&["--sabotage", "other-digest"]);
    assert_fails(&ended, Phase::Join, "the agent in the guest has the digest");
    assert!(
        ended.directory.join("journal.log").exists(),
        "the guest could still be asked: {}",
        ended.message()
    );
}

/// A broker that refuses the device is named; the machine, kept, is entered, and what `inspect` refuses fails in there, on the
/// device's own core, and what it accepts runs.
#[test]
fn a_broker_that_refuses_is_named_and_a_kept_machine_lives_until_it_is_removed() {
    let ended = smoke(&["--cold", "--sabotage", "broker-refuses", "--keep", "--cpu", "pi5"]);
    assert_eq!(ended.output.status.code(), Some(1), "{}", ended.message());
    let failure = ended.report.failure.as_ref().unwrap();
    assert_eq!(failure.phase, Phase::Join);
    assert!(failure.error.contains("refuses the device's credentials"), "{}", ended.message());
    let log = std::fs::read_to_string(ended.directory.join("nats.log")).unwrap();
    assert!(log.contains("authentication error"), "{log}");
    let id = ended.report.run_id.as_str();
    let work = ended.directory.join("w");
    assert_eq!(processes_naming(&work).len(), 1, "QEMU alone: {}", ended.message());
    let vm = |arguments: &[&str]| Command::new(XTASK).arg("vm").args(arguments).output().unwrap();
    let listed = String::from_utf8(vm(&["list"]).stdout).unwrap();
    assert!(listed.lines().any(|line| line.starts_with(id) && line.contains("running")), "{listed}");
    assert!(ended.message().contains(&format!("cargo xtask vm ssh {id}")), "{}", ended.message());
    for (name, flags, source, runs) in GUESTS {
        let file = compiled(&work, name, flags, source);
        let inspect = [
            "inspect",
            file.to_str().unwrap(),
            "--arch",
            "aarch64",
            "--device",
            "pi5",
            "--image",
            "debian-12",
        ];
        let inspected = Command::new(XTASK).args(inspect).output().unwrap();
        let message = String::from_utf8_lossy(&inspected.stderr).into_owned();
        assert_eq!(inspected.status.code(), Some(i32::from(!runs)), "{name}: {message}");
        let (code, message) = in_guest(id, &file);
        assert_eq!(code == Some(0), *runs, "{name} in the guest: {code:?} {message}");
    }
    assert_eq!(vm(&["rm", "no-such-run"]).status.code(), Some(2));
    assert!(vm(&["rm", id]).status.success());
    assert_eq!(processes_naming(&work), Vec::<Pid>::new());
    assert!(!ended.directory.exists());
}

/// Name, flags of the compiler, source, whether it runs on a Pi 5 with Debian 12.
const GUESTS: &[(&str, &[&str], &str, bool)] = &[
    ("sound", &[], "#include <stdio.h>\nint main(void) { puts(\"here\"); return 0; }\n", true),
    (
        "sve",
        &[],
        "__asm__(\".arch_extension sve\");\nint main(void) { long n; __asm__ volatile(\"cntb %0\" : \"=r\"(n)); return n == 0; }\n",
        false,
    ),
    ("loader", &["-Wl,--dynamic-linker=/lib/ld-elsewhere.so.1"], "int main(void) { return 0; }\n", false),
    (
        "library",
        &["-Wl,--no-as-needed", "-L.", "-l:libnowhere.so.7"],
        "int main(void) { return 0; }\n",
        false,
    ),
];

fn compiled(directory: &Path, name: &str, flags: &[&str], source: &str) -> PathBuf {
    let compile = |arguments: &[&str]| {
        let status = Command::new("aarch64-linux-gnu-gcc").args(arguments).current_dir(directory).status();
        assert!(status.unwrap().success(), "{name}");
    };
    std::fs::write(directory.join("empty.c"), "int nothing;\n").unwrap();
    compile(&["-shared", "-fPIC", "-Wl,-soname,libnowhere.so.7", "-o", "libnowhere.so.7", "empty.c"]);
    let file = format!("{name}.c");
    std::fs::write(directory.join(&file), source).unwrap();
    compile(&[&["-o", name, file.as_str()], flags].concat());
    directory.join(name)
}

/// Runs an executable in a kept machine; its exit code and its output.
fn in_guest(id: &str, file: &Path) -> (Option<i32>, String) {
    let run = "f=$(mktemp) && cat > $f && chmod +x $f && $f; echo ended $?";
    let output = Command::new(XTASK)
        .args(["vm", "exec", "--machine", id, "--", "sh", "-c", run])
        .stdin(std::fs::File::open(file).unwrap())
        .output()
        .unwrap();
    let message =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let code =
        message.lines().find_map(|line| line.strip_prefix("ended ")).and_then(|code| code.parse().ok());
    (code, message)
}

#[test]
fn a_unit_that_is_not_enabled_is_found_after_the_power_cut() {
    let ended = smoke(&["--sabotage", "unit-not-enabled"]);
    assert_fails(&ended, Phase::Rejoin, "disabled at boot");
    assert!(ended.report.evidence.join.is_some(), "it did join");
    assert!(ended.report.evidence.rejoin.is_none());
}

#[test]
fn an_agent_that_keeps_its_first_boot_id_is_found_after_the_power_cut() {
    let ended = smoke(&["--sabotage", "stale-boot-id"]);
    assert_fails(&ended, Phase::Rejoin, "still reports the boot id");
}

#[test]
fn an_image_for_another_machine_is_found_by_the_agents_own_words() {
    let ended = smoke(&["--sabotage", "foreign-image"]);
    assert_fails(&ended, Phase::Workload, "is made for amd64, this device is arm64");
    assert!(ended.report.evidence.workload.is_none());
}

#[test]
fn a_deployment_that_outlives_its_deletion_is_found_from_outside() {
    let ended = smoke(&["--sabotage", "ignores-deletes"]);
    assert_fails(&ended, Phase::Workload, "its port still answers");
}

#[test]
fn an_agent_that_loses_its_state_is_found_while_there_is_no_broker() {
    let ended = smoke(&["--sabotage", "loses-state"]);
    assert_fails(&ended, Phase::Rejoin, "the desired state did not survive the power cut");
    assert!(ended.report.evidence.workload.is_some(), "it did run before: {}", ended.message());
    assert!(ended.report.evidence.workload_offline.is_none());
}

#[test]
fn an_agent_that_waits_for_the_bus_is_found_while_there_is_no_broker() {
    let ended = smoke(&["--sabotage", "waits-for-bus"]);
    assert_fails(&ended, Phase::Rejoin, "iot-agent.service is activating: it waits for something");
    assert!(ended.report.evidence.workload.is_some(), "it did run before: {}", ended.message());
}

#[test]
fn a_kernel_panic_ends_the_wait_at_once() {
    let ended = smoke(&["--sabotage", "kernel-panic"]);
    let now = SystemTime::now();
    assert_fails(&ended, Phase::Boot, "kernel panicked");
    // A kernel that has panicked writes no more: the file's time is the panic's.
    let console = ended.directory.join("console.log");
    let since = now.duration_since(console.metadata().unwrap().modified().unwrap()).unwrap();
    assert!(since < Duration::from_secs(15), "the panic was told {since:?} after it");
    let failure = ended.report.failure.unwrap();
    assert!(failure.console_tail.iter().any(|line| line.contains("Kernel panic")), "{failure:?}");
}

#[test]
fn a_qemu_that_dies_ends_the_wait_at_once() {
    let ended = smoke(&["--sabotage", "kill-qemu"]);
    assert_fails(&ended, Phase::Boot, "QEMU ended");
}

#[test]
fn a_wrong_value_is_a_usage_error_before_anything_starts() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a-file");
    std::fs::write(&file, "").unwrap();
    let file = file.to_str().unwrap();
    let table: &[(&[&str], &str)] = &[
        (&["--image", "ubuntu-95"], "there are: ubuntu-24.04"),
        (&["--image", "./not-there.qcow2", "--unverified"], "./not-there.qcow2"),
        (&["--image", "https://host/disk.img"], "--image-digest"),
        (&["--image-digest", "md5:0"], "64 hex digits"),
        (&["--cpu", "z80"], "cortex-a76"),
        (&["--cpu", "host"], "it needs KVM"),
        (&["--accel", "kvm"], "leave out --accel"),
        (&["--agent", "/nonexistent/agent"], "/nonexistent/agent"),
        (&["--report", file], "cannot write to the directory"),
        (&["--profile", "fastest"], "no such cargo profile"),
        (&["--memory", "1"], "512..=65536"),
        (&["--vcpus", "99"], "1..=16"),
        (&["--timeout-scale", "0"], "0.1 to 100"),
        (&["--arch", "mips"], "possible values"),
    ];
    for (arguments, words) in table {
        let arch: &[&str] = if arguments.contains(&"--arch") { &[] } else { &["--arch", "aarch64"] };
        let output = Command::new(XTASK)
            .arg("smoke")
            .args(arch)
            .args(*arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.contains(words), "{arguments:?}: {message:?} does not say {words:?}");
    }
}

impl Own {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(XTASK_VM);
        command.args(["smoke", "--arch", "aarch64", "--image", "debian-12"]).args(arguments);
        command.env("IOT_XTASK_CACHE", &self.root).stdin(Stdio::null());
        command
    }

    fn start(&self) -> Child {
        self.command(&[]).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// The directory of the only run, once its guest has printed `sign`.
    fn wait_for_console(&self, child: &mut Child, sign: &str) -> PathBuf {
        let deadline = Instant::now() + Duration::from_secs(600);
        loop {
            assert!(Instant::now() < deadline, "no {sign:?} on the console");
            assert_eq!(child.try_wait().unwrap(), None, "the smoke ended before {sign:?}");
            std::thread::sleep(Duration::from_millis(200));
            let Ok(entries) = std::fs::read_dir(self.root.join("runs")) else { continue };
            for run in entries.map(|entry| entry.unwrap().path()) {
                let text = std::fs::read(run.join("console.log")).unwrap_or_default();
                if String::from_utf8_lossy(&text).contains(sign) {
                    return run;
                }
            }
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), signal).unwrap();
}

#[test]
fn the_first_ctrl_c_tears_down_in_order() {
    let own = Own::new();
    let mut child = own.start();
    let run = own.wait_for_console(&mut child, "Linux version");
    assert!(!processes_naming(&run.join("w")).is_empty(), "a machine and a broker");
    signal(&child, Signal::INT);
    let ended = ended(child.wait_with_output().unwrap());
    assert_eq!(ended.output.status.code(), Some(130), "{}", ended.message());
    assert_eq!(ended.report.verdict, Verdict::Interrupted);
    let last = ended.report.phases.last().unwrap();
    assert_eq!((last.name, last.status), (Phase::Teardown, PhaseStatus::Passed));
    assert_eq!(processes_naming(&run.join("w")), Vec::<Pid>::new());
    assert!(!run.join("w").exists());
}

#[test]
fn what_a_killed_run_left_is_collected_by_the_next_one() {
    let own = Own::new();
    let mut child = own.start();
    let run = own.wait_for_console(&mut child, "Linux version");
    signal(&child, Signal::KILL);
    child.wait().unwrap();
    assert!(!processes_naming(&run.join("w")).is_empty(), "QEMU outlives the run that started it");

    let next = own.command(&["--agent", XTASK_VM]).output().unwrap();
    let message = String::from_utf8_lossy(&next.stderr);
    let id = run.file_name().unwrap().to_str().unwrap();
    assert!(message.contains(&format!("collected the run {id}, which died")), "{message}");
    assert_eq!(processes_naming(&run.join("w")), Vec::<Pid>::new());
    assert!(!run.exists());
}
