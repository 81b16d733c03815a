//! Tests that the settings and directories of a user change neither what is built nor the verdict.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use crate::ordinary_user::{as_ordinary_user, copy_checkout};
use crate::scratch::{Scratch, XTASK, XTASK_INSPECT, assert_code, message};

/// The variables of a user who cross-compiles and whose terminal shows colours.
const SETTINGS: [(&str, &str); 2] =
    [("CARGO_BUILD_TARGET", "aarch64-unknown-linux-gnu"), ("CARGO_TERM_COLOR", "always")];

#[test]
fn xtask_runs_on_this_host_whatever_target_is_configured() {
    let mut help = Command::new(env!("CARGO"));
    let output = help.args(["xtask", "--help"]).current_dir(workspace()).envs(SETTINGS).output().unwrap();
    assert_code(&output, 0);
    assert!(String::from_utf8_lossy(&output.stdout).contains("preflight"), "{}", message(&output));
}

/// A program in place of cargo records the arguments and the variables of the agent's build.
#[test]
fn the_agents_build_gets_the_target_the_linker_and_the_profile() {
    let scratch = Scratch::new();
    let (linker, path) = compiler_under_another_name(&scratch);
    let linker_variable = ("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", linker.as_str());
    let hidden = ("PATH", path.as_str());
    let recorded = build(
        &scratch,
        &["--profile", "fast"],
        &[linker_variable, hidden, ("CARGO_PROFILE_FAST_INHERITS", "release"), ("TARGET_CC", "")],
    );
    for expected in [
        format!("CC_aarch64_unknown_linux_gnu={linker}"),
        "CARGO_BUILD_TARGET=host-tuple".to_owned(),
        "--target aarch64-unknown-linux-gnu --profile fast".to_owned(),
    ] {
        assert!(recorded.contains(&expected), "{expected}: {recorded}");
    }
    let own = build(&scratch, &[], &[linker_variable, hidden, ("CC_aarch64_unknown_linux_gnu", &linker)]);
    assert_eq!(own.matches("CC_aarch64_unknown_linux_gnu").count(), 1, "{own}");
}

#[test]
fn a_missing_cargo_is_the_hosts_fault() {
    let output = Command::new(XTASK)
        .args(["preflight", "--arch", "aarch64"])
        .current_dir(workspace())
        .env("CARGO", "/nonexistent/cargo")
        .output()
        .unwrap();
    assert_code(&output, 69);
    assert!(message(&output).contains("correct the variables PATH and CARGO"), "{}", message(&output));
}

#[test]
fn an_unknown_profile_is_a_usage_error() {
    let output = Command::new(XTASK_INSPECT)
        .args(["build", "--profile", "fast"])
        .current_dir(workspace())
        .envs(SETTINGS)
        .output()
        .unwrap();
    assert_code(&output, 2);
    assert!(message(&output).contains("profile `fast` is not defined"), "{}", message(&output));
}

/// Preflight has the same verdict in each environment in which a run can succeed.
#[test]
fn each_environment_has_its_verdict() {
    let scratch = Scratch::new();
    let odd = scratch.path().join("a b,c'd\"\u{fc}");
    copy_checkout(&odd);
    let in_odd = |program: &str| {
        let mut command = Command::new(program);
        command.current_dir(&odd).env("CARGO_MANIFEST_DIR", odd.join("xtask"));
        command.env("CARGO_TARGET_DIR", odd.join("target")).env("IOT_XTASK_CACHE", scratch.cache());
        command
    };
    let here = || {
        let mut command = Command::new(XTASK);
        command.current_dir(workspace()).env("IOT_XTASK_CACHE", scratch.cache());
        command
    };
    let with = |mut command: Command, settings: &[(&str, &str)]| {
        command.envs(settings.iter().copied());
        command
    };
    let mut homeless = here();
    homeless.env_remove("HOME").env_remove("XDG_CACHE_HOME").env_remove("IOT_XTASK_CACHE");
    let mut closed = here();
    closed.stdout(std::io::pipe().unwrap().1);
    let mut detached = Command::new("setsid");
    detached.args(["--wait", XTASK]).current_dir(workspace()).env("IOT_XTASK_CACHE", scratch.cache());
    let shared = scratch.path().join("shared");
    let table = [
        ("this checkout", here(), 0, "ready"),
        ("another target", with(here(), &SETTINGS), 0, "ready"),
        (
            "a shared target directory",
            with(here(), &[("CARGO_TARGET_DIR", shared.to_str().unwrap())]),
            0,
            "ready",
        ),
        ("no terminal", detached, 0, "ready"),
        ("a closed stdout", closed, 0, "ready"),
        ("an odd path", in_odd(XTASK), 0, "ready"),
        ("an ordinary user", as_ordinary_user(XTASK, &odd, scratch.path()), 0, "ready"),
        ("no HOME", homeless, 69, "set IOT_XTASK_CACHE to a directory of this user"),
    ];
    for (environment, mut command, code, words) in table {
        command.args(["preflight", "--arch", "aarch64", "--image", "ubuntu-24.04", "--strict-image"]);
        let output = command.output().unwrap();
        let message = message(&output);
        assert_eq!(output.status.code(), Some(code), "{environment}: {message}");
        assert!(message.contains(words), "{environment}: {message}");
    }
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Makes a cross-compiler whose name is not the default one. Returns its path, and a PATH without the default one.
fn compiler_under_another_name(scratch: &Scratch) -> (String, String) {
    let directory = scratch.path().join("bin");
    std::fs::create_dir(&directory).unwrap();
    for entry in std::fs::read_dir("/usr/bin").unwrap().map(Result::unwrap) {
        if entry.file_name() != "aarch64-linux-gnu-gcc" {
            std::os::unix::fs::symlink(entry.path(), directory.join(entry.file_name())).unwrap();
        }
    }
    let compiler = directory.join("aarch64-none-linux-gnu-gcc");
    script(&compiler, "exec /usr/bin/aarch64-linux-gnu-gcc \"$@\"");
    let cargo = Path::new(env!("CARGO")).parent().unwrap();
    (compiler.display().to_string(), format!("{}:{}", cargo.display(), directory.display()))
}

/// Builds the agent with a program in place of cargo. Returns the arguments and the variables of `cargo build`.
fn build(scratch: &Scratch, arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let (record, fake) = (scratch.path().join("record"), scratch.path().join("cargo"));
    let lines = format!(
        "[ $1 = build ] || exec {} \"$@\"\n{{ echo \"$@\"; env; }} > {}\nexit 1",
        env!("CARGO"),
        record.display()
    );
    script(&fake, &lines);
    let output: Output = Command::new(XTASK_INSPECT)
        .args([&["build", "--arch", "aarch64"], arguments].concat())
        .current_dir(workspace())
        .envs(SETTINGS)
        .env("CARGO", &fake)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    assert_code(&output, 69);
    std::fs::read_to_string(&record).unwrap_or_else(|_| panic!("no build was started: {}", message(&output)))
}

fn script(path: &Path, lines: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{lines}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).unwrap();
}
