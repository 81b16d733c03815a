//! Checks that `cargo xtask` changes only its own directories and processes, and works on the checkout in which the
//! command was typed.

use std::fs::Permissions;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;
use xtask_core::fs::mark;

const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

fn message(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Makes a cache with a dead run, and with directories of another program in `runs`. Returns the cache and the dead
/// run.
fn cache() -> (TempDir, PathBuf) {
    let cache = tempfile::Builder::new().permissions(Permissions::from_mode(0o700)).tempdir().unwrap();
    let dead = cache.path().join("runs/0101-000000-0001");
    std::fs::create_dir_all(dead.join("w")).unwrap();
    std::fs::write(dead.join("w/domain.xml"), "<domain/>").unwrap();
    std::fs::write(dead.join("lock"), "").unwrap();
    mark(&dead).unwrap();
    for number in 0..25 {
        let foreign = cache.path().join(format!("runs/exp{number:02}"));
        std::fs::create_dir_all(foreign.join("w/weights")).unwrap();
    }
    std::fs::write(cache.path().join("runs/.lock"), "").unwrap();
    (cache, dead)
}

#[test]
fn collecting_spares_the_shell_that_calls_it_a_reader_and_directories_of_others() {
    let (cache, dead) = cache();
    let file = dead.join("w/domain.xml");
    let mut reader = Command::new("tail").arg("-f").arg(&file).stdout(Stdio::piped()).spawn().unwrap();
    // The reader prints the content only after it has opened the file.
    reader.stdout.as_mut().unwrap().read_exact(&mut [0; 9]).unwrap();
    // The shell has the file's name on its own command line, like a user who looks at the file afterwards.
    let line = format!("{XTASK} vm gc; code=$?; ls {}; echo survived $code", file.display());
    let output =
        Command::new("bash").args(["-c", &line]).env("IOT_XTASK_CACHE", cache.path()).output().unwrap();
    let message = message(&output);
    assert!(message.contains("survived 0"), "{message}");
    assert!(message.contains("collected 0101-000000-0001: 0 process(es)"), "{message}");
    assert!(!dead.exists(), "{message}");
    assert!(reader.try_wait().unwrap().is_none(), "the reader of a dead run's file was killed");
    reader.kill().unwrap();
    reader.wait().unwrap();
    for number in 0..25 {
        let foreign = cache.path().join(format!("runs/exp{number:02}"));
        assert!(foreign.join("w/weights").exists(), "{} was deleted", foreign.display());
        assert!(!foreign.join("lock").exists(), "{} was written to", foreign.display());
    }
}

/// Copies this checkout and adds a cargo profile to the copy.
fn copied_checkout() -> TempDir {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let copy = tempfile::tempdir().unwrap();
    let parts = ["Cargo.toml", "Cargo.lock", ".cargo", "agent", "xtask"].map(|part| here.join(part));
    let copied = Command::new("cp").arg("-r").args(parts).arg(copy.path()).output().unwrap();
    assert!(copied.status.success(), "{}", message(&copied));
    let manifest = copy.path().join("Cargo.toml");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text + "\n[profile.only-in-the-copy]\ninherits = \"release\"\n").unwrap();
    copy
}

/// Runs a smoke with the profile of the copy and an agent that does not exist. The profile is checked first, and only
/// the copy has it.
fn smoke_in(checkout: &Path, target: &Path) -> Output {
    let mut command = Command::new(XTASK);
    command.args(["smoke", "--profile", "only-in-the-copy", "--agent", "/nonexistent"]).current_dir(checkout);
    command
        .env("CARGO_MANIFEST_DIR", checkout.join("xtask"))
        .env("CARGO_TARGET_DIR", target)
        .output()
        .unwrap()
}

#[test]
fn the_workspace_is_the_one_in_which_the_command_was_typed() {
    let copy = copied_checkout();
    let output = smoke_in(copy.path(), &copy.path().join("target"));
    let message = message(&output);
    assert!(message.contains("--agent /nonexistent: no such file"), "{message}");
    assert_eq!(output.status.code(), Some(2), "{message}");
}

#[test]
fn a_program_that_another_checkout_left_in_a_shared_target_directory_is_refused() {
    let copy = copied_checkout();
    let shared = Path::new(XTASK).parent().unwrap();
    let output = smoke_in(copy.path(), shared);
    let message = message(&output);
    assert_eq!(output.status.code(), Some(69), "{message}");
    assert!(message.contains("was compiled in") && message.contains("unset CARGO_TARGET_DIR"), "{message}");
}

/// Returns the writing end of a pipe without a reader.
fn closed_pipe() -> Stdio {
    std::io::pipe().unwrap().1.into()
}

fn full_disk() -> Stdio {
    std::fs::File::options().write(true).open("/dev/full").unwrap().into()
}

#[test]
fn a_command_whose_output_cannot_be_written_does_not_panic() {
    type Stream = fn() -> Stdio;
    let table: [(&[&str], Stream, Stream, i32); 6] = [
        (&["vm", "list", "--json"], closed_pipe, Stdio::piped, 0),
        (&["vm", "list", "--json"], full_disk, Stdio::piped, 69),
        (&["vm", "gc", "--dry-run"], closed_pipe, Stdio::piped, 0),
        (&["vm", "gc", "--dry-run"], full_disk, closed_pipe, 69),
        (&["vm", "rm", "nosuch"], closed_pipe, closed_pipe, 2),
        (&["vm", "rm", "nosuch"], full_disk, full_disk, 2),
    ];
    let (cache, _) = cache();
    for (arguments, stdout, stderr, code) in table {
        let mut command = Command::new(XTASK);
        command.args(arguments).env("IOT_XTASK_CACHE", cache.path()).stdout(stdout()).stderr(stderr());
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", message(&output));
    }
}

#[test]
fn a_command_refuses_a_cache_that_is_not_its_own_with_a_remedy() {
    let exposed = tempfile::tempdir().unwrap();
    std::fs::set_permissions(exposed.path(), Permissions::from_mode(0o777)).unwrap();
    let exposed = exposed.path().display().to_string();
    for (cache, remedy) in [("relative", "to an absolute path"), (&exposed, "chmod go-w")] {
        for arguments in [["vm", "list"], ["vm", "gc"]] {
            let output = Command::new(XTASK).args(arguments).env("IOT_XTASK_CACHE", cache).output().unwrap();
            let message = message(&output);
            assert_eq!(output.status.code(), Some(69), "{message}");
            assert!(
                message.contains(&format!("use the cache {cache}")) && message.contains(remedy),
                "{message}"
            );
        }
    }
}

#[test]
fn a_report_does_not_lie_beside_the_files_of_an_earlier_run() {
    let report = tempfile::tempdir().unwrap();
    for name in ["console.log", "report.json", "notes.txt"] {
        std::fs::write(report.path().join(name), "of an earlier run").unwrap();
    }
    let mut command = Command::new(XTASK);
    command.args(["smoke", "--image", "nosuch", "--report"]).arg(report.path());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", message(&output));
    assert!(!report.path().join("console.log").exists() && report.path().join("notes.txt").exists());
    assert!(std::fs::read_to_string(report.path().join("report.json")).unwrap().contains("nosuch"));
}

#[test]
fn a_message_has_no_control_characters_of_a_foreign_text() {
    let (cache, _) = cache();
    let mut command = Command::new(XTASK);
    command.args(["vm", "rm", "a\x1b[2J\nVERIFIED  iot-agent"]).env("IOT_XTASK_CACHE", cache.path());
    let message = message(&command.output().unwrap());
    assert!(message.contains("VERIFIED") && !message.contains('\x1b'), "{message:?}");
    assert!(!message.lines().any(|line| line.starts_with("VERIFIED")), "{message:?}");
}

#[test]
fn machines_are_listed_outside_a_checkout() {
    let elsewhere = tempfile::tempdir().unwrap();
    let mut command = Command::new(XTASK);
    command.args(["vm", "list", "--json"]).current_dir(elsewhere.path()).env_remove("CARGO_MANIFEST_DIR");
    let output = command.env("IOT_XTASK_CACHE", elsewhere.path().join("cache")).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", message(&output));
}
