//! Tests of planted faults, one for each fault. `cargo xtask ci` runs a third of this file's tests.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Pid;
use xtask_core::cache::Cache;
use xtask_core::cli::Sabotage;
use xtask_core::format::name_of;
use xtask_core::fs::entries;
use xtask_core::processes::processes_naming;
use xtask_core::report::{ARCHIVE, Phase};

use super::{DEBIAN_12, assert_fails, assert_nothing_left, ended, skipped, smoke};
use crate::scratch::{XTASK, XTASK_INSPECT, XTASK_VM, assert_code, command, message};

#[test]
fn an_executable_for_another_machine_never_reaches_the_guest() {
    let ended = smoke(&["--agent", XTASK_VM]);
    assert_fails(&ended, Phase::Build, "built for x86_64, and the device is aarch64");
    assert!(skipped(&ended.report, Phase::Boot));
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

/// If the broker refuses the device, the smoke says so. `--keep` keeps the machine, which can be entered. On its core,
/// that of the device, executables that `inspect` refuses must fail, and executables that it accepts must run.
#[test]
fn a_broker_that_refuses_is_named_and_a_kept_machine_lives_until_it_is_removed() {
    let ended = smoke(&["--cold", "--sabotage", "broker-refuses", "--keep", "--cpu", "pi5"]);
    assert_code(&ended.output, 1);
    let failure = ended.report.failure.as_ref().unwrap();
    assert_eq!(failure.phase, Phase::Join);
    assert!(failure.error.contains("refuses the device's credentials"), "{}", ended.message());
    let log = std::fs::read_to_string(ended.directory.join("nats.log")).unwrap();
    assert!(log.contains("authentication error"), "{log}");
    let id = ended.report.run_id.as_str();
    let work = ended.directory.join("w");
    assert_no_secret(&ended.directory);
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
        assert_code(&command(XTASK_INSPECT, &inspect).output().unwrap(), i32::from(!runs));
        let (code, message) = in_guest(id, &file);
        assert_eq!(code == Some(0), *runs, "{name} in the guest: {code:?} {message}");
    }
    assert_eq!(vm(&["rm", "no-such-run"]).status.code(), Some(2));
    assert!(vm(&["rm", id]).status.success());
    assert_eq!(processes_naming(&work), Vec::<Pid>::new());
    assert!(!ended.directory.exists());
}

/// Checks that no report of a run whose machine was kept contains a password or a line of a private key.
#[track_caller]
fn assert_no_secret(directory: &Path) {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    let work = directory.join("w");
    let keys = ["user_key", "host_key"].map(|name| read(&work.join(name))).join("\n");
    // The agent's configuration is on the payload's disk.
    let payload = std::fs::read(work.join("payload.img")).unwrap();
    let payload = String::from_utf8_lossy(&payload);
    let configuration =
        [read(&work.join("nats/nats.conf")), payload.replace("password = ", "password: ")].join("\n");
    let passwords = configuration.split("password: \"").skip(1).map(|rest| rest.split('"').next().unwrap());
    let lines = keys.lines().filter(|line| line.len() >= 16 && !line.starts_with("-----"));
    let secrets: Vec<_> = passwords.chain(lines).collect();
    assert!(secrets.len() >= 3 + 2 * 5, "{secrets:?}");
    let archive = std::fs::read(directory.join(ARCHIVE)).unwrap();
    let mut left = vec![("the archive".to_owned(), zstd::decode_all(archive.as_slice()).unwrap())];
    let files = entries(directory).filter(|path| path.is_file());
    left.extend(files.map(|path| (path.display().to_string(), std::fs::read(path).unwrap())));
    for (name, content) in &left {
        let text = String::from_utf8_lossy(content);
        let found = secrets.iter().find(|secret| text.contains(**secret));
        assert_eq!(found, None, "{name}");
    }
}

/// Executables: the name, the compiler's flags, the source, and whether it runs on a Pi 5 with Debian 12.
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

/// Runs an executable in an instance. Returns its exit code and its output.
fn in_guest(id: &str, file: &Path) -> (Option<i32>, String) {
    let run = "f=$(mktemp) && cat > $f && chmod +x $f && $f; echo ended $?";
    let output = Command::new(XTASK)
        .args(["vm", "exec", "--machine", id, "--", "sh", "-c", run])
        .stdin(std::fs::File::open(file).unwrap())
        .output()
        .unwrap();
    let message = message(&output);
    let code =
        message.lines().find_map(|line| line.strip_prefix("ended ")).and_then(|code| code.parse().ok());
    (code, message)
}

/// The wait for the guest's userspace ends with the panic. If it went on to its limit, the error would be another one.
#[test]
fn a_kernel_panic_ends_the_wait() {
    let ended = smoke(&["--sabotage", "kernel-panic"]);
    assert_fails(&ended, Phase::Boot, "kernel panicked");
    let failure = ended.report.failure.unwrap();
    assert!(failure.console_tail.iter().any(|line| line.contains("Kernel panic")), "{failure:?}");
}

/// In each smoke, root in the guest tries to connect to a port on which the smoke listens on this host's loopback. If
/// QEMU is not confined, this succeeds.
#[test]
fn a_guest_that_reaches_the_services_of_this_host_is_found() {
    let ended = smoke(&["--sabotage", "open-network"]);
    assert_code(&ended.output, 69);
    let found = Sabotage::OpenNetwork.detection().unwrap().check(&ended.report);
    found.unwrap_or_else(|reason| panic!("{reason}: {}", ended.message()));
    assert_nothing_left(&Cache::from_env().unwrap(), &ended.report.run_id);
}

/// Makes a test of each fault: the smoke finds it in the right phase and names it.
macro_rules! found {
    ($($name:ident: $fault:ident),* $(,)?) => {
        /// The faults that have such a test.
        pub(super) const FOUND: &[Sabotage] = &[$(Sabotage::$fault),*];
        $(
            #[test]
            fn $name() {
                assert_found(Sabotage::$fault);
            }
        )*
    };
}

found! {
    crash_loop: CrashLoop,
    deaf_after_rejoin: DeafAfterRejoin,
    foreign_image: ForeignImage,
    forged_status: ForgedStatus,
    forgets_deletions: ForgetsDeletions,
    ignores_deletes: IgnoresDeletes,
    kill_qemu: KillQemu,
    loses_bus: LosesBus,
    loses_state: LosesState,
    loses_volume: LosesVolume,
    no_fsync: NoFsync,
    no_memory_cgroup: NoMemoryCgroup,
    other_digest: OtherDigest,
    powers_off: PowersOff,
    read_only_root: ReadOnlyRoot,
    reboots_itself: RebootsItself,
    recreates: Recreates,
    small_pages: SmallPages,
    stale_boot_id: StaleBootId,
    stale_heartbeat: StaleHeartbeat,
    unit_not_enabled: UnitNotEnabled,
    waits_for_bus: WaitsForBus,
    watches_only_new: WatchesOnlyNew,
}

fn assert_found(fault: Sabotage) {
    let detection = fault.detection().unwrap();
    let name = name_of(&fault);
    let machine = if detection.machine.is_empty() { &DEBIAN_12 } else { detection.machine };
    let sabotage = ["smoke", "--arch", "aarch64", "--sabotage", name.as_str()];
    let arguments = [&sabotage[..], machine, detection.arguments].concat();
    let ended = ended(command(XTASK_VM, &arguments).output().unwrap());
    detection.check(&ended.report).unwrap_or_else(|reason| panic!("{reason}: {}", ended.message()));
    assert_fails(&ended, ended.report.failure.as_ref().unwrap().phase, "");
    let journal = ended.directory.join("journal.log");
    assert!(fault != Sabotage::OtherDigest || journal.exists(), "the guest could still be asked");
}
