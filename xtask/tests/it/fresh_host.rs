//! Tests preflight on a fresh Debian that has only Rust. Rust consists of rustc's read-only sysroot with cargo, the
//! crates (builds have no network), and the packages `gcc` and `libc6-dev`, which Rust needs. Preflight must name
//! everything that is missing at once. One `--fix` must make the system ready: as root without systemd, and as an
//! ordinary user for the part that needs no packages. `rustup target add` is replaced by a script, which installs the
//! standard library that was hidden. Everything else is real: the packages, the mirror, and, from Linux 6.7 on, the
//! kernel's empty table of executable formats.

mod debian;

use std::collections::BTreeSet;
use std::process::Output;

use serde_json::Value;

use self::debian::{As, Debian, fresh_target};
use crate::scratch::message;

/// The findings on a minimal Debian of any suite: the id, and a word of the sentence.
const LACKS: &[(&str, &str)] = &[
    ("emulator", "qemu-system-x86_64"),
    ("emulator", "qemu-system-aarch64"),
    ("firmware", "firmware for x86_64"),
    ("firmware", "firmware for aarch64"),
    ("libvirt-driver", "QEMU driver"),
    ("libvirt-iohelper", "libvirt_iohelper"),
    ("libvirt-headers", "headers"),
    ("pkg-config", "pkg-config"),
    ("program", "qemu-img"),
    ("program", "ssh"),
    ("program", "ssh-keygen"),
    ("program", "nats-server"),
    ("program", "mkfs.vfat"),
    ("program", "mcopy"),
    ("program", "mmdebstrap"),
    ("program", "sfdisk"),
    ("rust-target", "standard library"),
    ("linker", "linker"),
];
/// The finding on a kernel whose table of executable formats is still empty.
const KERNELS: &[(&str, &str)] = &[("user-emulation", "image builds need them")];
/// The finding that only root gets: without this account, libvirt does not start as root.
const ROOTS: (&str, &str) = ("libvirt-user", "libvirt-qemu");
/// The findings that only an ordinary user has, because images are built in a user namespace.
const USERS: &[(&str, &str)] = &[("program", "newgidmap"), ("program", "newuidmap")];

fn kernels(debian: &Debian) -> &'static [(&'static str, &'static str)] {
    if debian.fresh_kernel { KERNELS } else { &[] }
}

const PREFLIGHT: &[&str] = &["cargo", "--quiet", "xtask", "preflight"];

/// The output of `preflight --json`.
struct Look {
    output: Output,
    blocking: Vec<(String, String)>,
    /// The commands that `--fix` would run.
    plan: Vec<String>,
}

impl Look {
    fn at(debian: &Debian, who: As) -> Self {
        let output = debian.run(who, &[PREFLIGHT, &["--json"]].concat());
        let json: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", message(&output)));
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let findings = json["findings"].as_array().unwrap().iter();
        let blocking = findings
            .filter(|finding| finding["severity"] == "blocks")
            .map(|finding| (text(&finding["id"]), text(&finding["sentence"])));
        let line = |command: &Value| {
            let words: Vec<_> = command.as_array().unwrap().iter().map(text).collect();
            words.join(" ")
        };
        let plan = json["fix"].as_array().unwrap().iter().map(line).collect();
        Self { blocking: blocking.collect(), output, plan }
    }

    fn lacks(&self, (id, word): (&str, &str)) -> bool {
        self.blocking.iter().any(|(found, sentence)| found == id && sentence.contains(word))
    }

    /// Checks the exit code (69), the expected findings, and that the error names each blocking finding.
    #[track_caller]
    fn assert_names_everything(&self, expected: &[(&str, &str)]) {
        let message = message(&self.output);
        assert_eq!(self.output.status.code(), Some(69), "{message}");
        for lack in expected {
            assert!(self.lacks(*lack), "{lack:?} is not found: {:?}", self.blocking);
        }
        let error = message.lines().find(|line| line.starts_with("error: ")).unwrap();
        for (_, sentence) in &self.blocking {
            assert!(error.contains(sentence.as_str()), "{sentence:?} is not named: {error}");
        }
    }
}

fn fix(debian: &Debian, who: As) -> Output {
    debian.run(who, &[PREFLIGHT, &["--fix", "--yes"]].concat())
}

/// Returns the commands that `--fix` ran.
fn ran(output: &Output) -> Vec<String> {
    message(output).lines().filter_map(|line| line.strip_prefix("$ ")).map(str::to_owned).collect()
}

/// Returns the packages in the command `apt-get install`.
fn packages(commands: &[String]) -> BTreeSet<&str> {
    let installs: Vec<_> =
        commands.iter().filter_map(|command| command.strip_prefix("apt-get install ")).collect();
    assert_eq!(installs.len(), 1, "one transaction: {commands:?}");
    installs[0].split(' ').filter(|word| !word.starts_with('-')).collect()
}

#[test]
fn debian_12_gets_ready() {
    gets_ready("bookworm");
}

#[test]
fn debian_13_gets_ready() {
    gets_ready("trixie");
}

fn gets_ready(suite: &str) {
    let debian = Debian::new(suite);
    // The alias builds `xtask` for the same target, so both users run this program.
    let built = debian.run(As::Root, &["cargo", "build", "--package", "xtask", "--target", "host-tuple"]);
    assert!(built.status.success(), "`xtask` needs more than Rust: {}", message(&built));
    debian.read(&["chown", "--recursive", "ordinary:", "/target", "/cargo"]);

    let before = Look::at(&debian, As::Root);
    before.assert_names_everything(&[LACKS, kernels(&debian), &[ROOTS]].concat());
    without_root(&debian);
    as_root(&debian);
    as_ordinary_user(&debian);
    can_fail(&debian);
}

/// Runs `--fix` as a user without sudo. It must do the part that needs no root, and print the commands for root.
fn without_root(debian: &Debian) {
    let before = Look::at(debian, As::Ordinary);
    before.assert_names_everything(&[LACKS, kernels(debian), USERS].concat());
    assert!(!before.lacks(ROOTS), "{:?}", before.blocking);
    let fixed = fix(debian, As::Ordinary);
    assert_eq!(fixed.status.code(), Some(69), "{}", message(&fixed));
    assert_eq!(ran(&fixed), [format!("rustup target add {}", fresh_target())]);
    let install = before.plan.iter().find(|command| command.starts_with("apt-get install ")).unwrap();
    let paste = format!("  what to do: run as root: apt-get update; {install}; then");
    assert!(message(&fixed).contains(&paste), "{}", message(&fixed));
    assert!(message(&fixed).contains("needs root"), "{}", message(&fixed));
}

/// Runs `--fix` as root. One transaction must install all packages. Other commands may follow only for changes that
/// packages do not make.
fn as_root(debian: &Debian) {
    let (sources, processes) = (debian.package_sources(), debian.processes());
    let before = Look::at(debian, As::Root);
    let fixed = fix(debian, As::Root);
    assert_eq!(fixed.status.code(), Some(0), "{}", message(&fixed));
    let commands = ran(&fixed);
    assert_eq!(commands[..before.plan.len()], before.plan, "the commands that ran differ from the plan");
    assert_eq!(packages(&commands), packages(&before.plan));
    let rest = &commands[before.plan.len()..];
    let registers =
        rest.iter().filter(|command| command.contains("binfmts") || command.contains("systemd-binfmt"));
    assert_eq!(registers.count(), usize::from(debian.fresh_kernel), "{rest:?}");

    let after = Look::at(debian, As::Root);
    assert_eq!(after.output.status.code(), Some(0), "{}", message(&after.output));
    assert_eq!((after.blocking, after.plan), (Vec::new(), Vec::new()));
    let plain = debian.run(As::Root, PREFLIGHT);
    assert_eq!(plain.status.code(), Some(0), "{}", message(&plain));
    let again = fix(debian, As::Root);
    assert_eq!(again.status.code(), Some(0), "{}", message(&again));
    assert_eq!(ran(&again), Vec::<String>::new());

    assert_eq!(debian.package_sources(), sources, "the sources of packages have changed");
    debian.assert_runs_only(&processes);
}

/// Checks that an ordinary user lacks only the tools for user namespaces after root's fix.
fn as_ordinary_user(debian: &Debian) {
    let before = Look::at(debian, As::Ordinary);
    before.assert_names_everything(USERS);
    assert_eq!(before.blocking.len(), USERS.len(), "{:?}", before.blocking);
    assert_eq!(packages(&before.plan), BTreeSet::from(["uidmap"]));
    for command in &before.plan {
        debian.read(&command.split(' ').collect::<Vec<_>>());
    }
    let after = debian.run(As::Ordinary, PREFLIGHT);
    assert_eq!(after.status.code(), Some(0), "{}", message(&after));
}

/// Checks that these checks can fail: this system is damaged on purpose.
fn can_fail(debian: &Debian) {
    let (sources, processes) = (debian.package_sources(), debian.processes());
    debian.read(&["touch", "/etc/apt/sources.list.d/another.list"]);
    assert_ne!(debian.package_sources(), sources);
    debian.read(&["sh", "-c", "sleep 300 > /dev/null 2>&1 & true"]);
    assert_ne!(debian.processes(), processes);
    // dpkg's records still have mcopy, so an installation does not restore the file.
    debian.read(&["rm", "/usr/bin/mcopy"]);
    let lost = Look::at(debian, As::Root);
    lost.assert_names_everything(&[("program", "mcopy")]);
    assert_eq!(packages(&lost.plan), BTreeSet::from(["mtools"]));
    let fixed = fix(debian, As::Root);
    assert_eq!(fixed.status.code(), Some(69), "{}", message(&fixed));
}
