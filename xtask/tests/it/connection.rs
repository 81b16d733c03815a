//! Tests `preflight --connect` with a real libvirtd in its own namespaces, with sockets on which no process listens or
//! answers, with an ssh that fails, and with libvirt's mock driver.

pub(crate) mod daemon;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::Value;
use xtask_core::limits;
use xtask_core::processes::processes_naming;

use self::daemon::{Daemon, Network, root, script};
use crate::scratch::{XTASK, XTASK_VM, command, message, signal, wait_until};

/// The output of preflight about one libvirt.
pub(crate) struct Described {
    code: Option<i32>,
    pub(crate) message: String,
    findings: Vec<Value>,
}

impl Described {
    pub(crate) fn of(output: &Output) -> Self {
        let message = message(output);
        let json: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {message}"));
        let mut findings = json["findings"].as_array().unwrap().clone();
        findings.retain(|finding| finding["id"].as_str().unwrap().starts_with("connect-"));
        Self { code: output.status.code(), message, findings }
    }

    /// Returns id and severity of each finding that degrades or blocks.
    pub(crate) fn faults(&self) -> Vec<(&str, &str)> {
        let word = |finding: &'_ Value, key| finding[key].as_str().map(str::to_owned).unwrap();
        let faults = self.findings.iter().filter(|finding| word(finding, "severity") != "informs");
        faults
            .map(|finding| (finding["id"].as_str().unwrap(), finding["severity"].as_str().unwrap()))
            .collect()
    }

    /// Returns sentence, evidence and remedy of the only finding with this `id`.
    pub(crate) fn one(&self, id: &str) -> [String; 3] {
        let found: Vec<_> = self.findings.iter().filter(|finding| finding["id"] == id).collect();
        let [finding] = found.as_slice() else { panic!("{id}: {:?}", self.findings) };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        [text(&finding["sentence"]), text(&finding["evidence"]), text(&finding["remedy"]["manual"])]
    }
}

fn preflight(uri: &str) -> Command {
    command(XTASK_VM, &["preflight", "--json", "--connect", uri])
}

fn describe(uri: &str) -> Described {
    Described::of(&preflight(uri).output().unwrap())
}

/// Checks the output for a libvirt that cannot be asked. The exit code must be 69. There must be one finding, with
/// these words in its sentence, in its evidence, and in a remedy that the user carries out.
fn assert_refused(uri: &str, id: &str, sentence: &str, evidence: &str, remedy: &str) {
    let described = describe(uri);
    assert_eq!(
        (described.code, described.faults()),
        (Some(69), vec![(id, "blocks")]),
        "{}",
        described.message
    );
    let [is, seen, to_do] = described.one(id);
    assert!(
        is.contains(sentence) && seen.contains(evidence) && to_do.contains(remedy),
        "{is}: {seen}: {to_do}"
    );
    assert!(described.message.contains(&is), "the last words do not name it: {}", described.message);
}

#[test]
fn a_daemon_is_described_and_its_missing_network_found() {
    let daemon = Daemon::start(Network::Absent, "0700");
    let described = describe(&daemon.uri());
    assert_eq!(
        (described.code, described.faults()),
        (Some(0), vec![("connect-network-missing", "degrades")]),
        "{}",
        described.message
    );
    let [host, _, _] = described.one("connect-host");
    assert!(host.contains(" CPUs, ") && host.contains("; libvirt ") && host.contains(", QEMU "), "{host}");
    let offers: Vec<_> =
        described.findings.iter().filter(|finding| finding["id"] == "connect-offer").collect();
    assert_eq!(offers.len(), 2, "one for each architecture");
    assert!(
        offers[1]["sentence"].as_str().unwrap().contains("aarch64 guests: emulated; machine type virt-"),
        "{offers:?}"
    );
    assert!(
        offers[1]["evidence"].as_str().unwrap().contains("qemu-system-aarch64, /usr/share/"),
        "{offers:?}"
    );
    let [_, _, remedy] = described.one("connect-network-missing");
    assert!(remedy.contains(&format!("virsh --connect '{}' net-define", daemon.uri())), "{remedy}");
}

#[test]
fn a_network_that_is_not_started_is_told_from_one_that_is() {
    let daemon = Daemon::start(Network::Defined, "0700");
    let told_of = describe(&daemon.uri());
    assert_eq!(told_of.faults(), [("connect-network-inactive", "degrades")], "{}", told_of.message);
    let [_, seen, remedy] = told_of.one("connect-network-inactive");
    assert_eq!(seen, "autostart: no");
    assert!(
        remedy.contains("net-start default && virsh") && remedy.ends_with("net-autostart default"),
        "{remedy}"
    );
    drop(daemon);

    let daemon = Daemon::start(Network::Autostarted, "0700");
    let told_of = describe(&daemon.uri());
    assert_eq!((told_of.code, told_of.faults()), (Some(0), vec![]), "{}", told_of.message);
}

#[test]
fn what_is_asked_of_the_guest_is_held_against_the_host() {
    let daemon = Daemon::start(Network::Autostarted, "0700");
    let asked = |flags: &[&str]| {
        let described = Described::of(&preflight(&daemon.uri()).args(flags).output().unwrap());
        described.faults().into_iter().map(|(id, severity)| format!("{id} {severity}")).collect::<Vec<_>>()
    };
    let arm = ["--arch", "aarch64"];
    let with = |more: &[&'static str]| asked(&[&arm, more].concat());
    assert_eq!(with(&["--cpu", "pi5"]), Vec::<String>::new());
    assert_eq!(with(&["--cpu", "z80"]), ["connect-cpu blocks"]);
    assert_eq!(with(&["--memory", "65536"]), ["connect-memory blocks"], "on a host with less than 64 GiB");
    // No host of this project runs guests of the other architecture with KVM.
    let other = if cfg!(target_arch = "x86_64") { "aarch64" } else { "x86_64" };
    assert_eq!(asked(&["--arch", other, "--accel", "kvm"]), ["connect-accel blocks"]);
}

#[test]
fn a_socket_that_only_lets_one_look_is_found() {
    let daemon = Daemon::start(Network::Autostarted, "0700");
    let described = describe(&daemon.read_only_uri());
    assert_eq!(
        (described.code, described.faults()),
        (Some(69), vec![("connect-permission", "blocks")]),
        "{}",
        described.message
    );
    let [sentence, evidence, remedy] = described.one("connect-permission");
    assert!(sentence.ends_with("this user has read-only access and cannot start guests"), "{sentence}");
    assert!(
        evidence.contains("read only access prevents") && remedy.contains("without -ro"),
        "{evidence}: {remedy}"
    );
    assert_eq!(described.one("connect-host").len(), 3, "the host is described in any case");
}

/// If this test runs as root, preflight runs as another user. This user may read every file, because the test's files
/// may belong to root, but may write none.
#[test]
fn a_user_whom_the_socket_refuses_is_told_what_to_do() {
    let daemon = Daemon::start(Network::Absent, "0000");
    let plain = preflight(&daemon.uri());
    let cache = tempfile::tempdir().unwrap();
    let mut command = Command::new(if root() { "setpriv" } else { "env" });
    if root() {
        command.args(["--reuid", "nobody", "--clear-groups", "--inh-caps=+dac_read_search"]);
        command.arg("--ambient-caps=+dac_read_search");
    }
    command.arg(plain.get_program()).args(plain.get_args()).stdin(Stdio::null());
    let described = Described::of(&command.env("IOT_XTASK_CACHE", cache.path()).output().unwrap());
    assert_eq!(
        (described.code, described.faults()),
        (Some(69), vec![("connect-permission", "blocks")]),
        "{}",
        described.message
    );
    let [sentence, evidence, remedy] = described.one("connect-permission");
    assert!(sentence.ends_with("this user may not open its socket"), "{sentence}");
    assert!(evidence.contains("Permission denied"), "{evidence}");
    assert!(remedy.contains("usermod --append --groups libvirt") && remedy.contains("polkit"), "{remedy}");
}

#[test]
fn no_daemon_a_dead_one_and_one_that_hangs_up_are_three_things() {
    let directory = tempfile::tempdir().unwrap();
    let uri = |name: &str| format!("qemu+unix:///system?socket={}", directory.path().join(name).display());
    let start = "systemctl enable --now libvirtd.socket";
    assert_refused(&uri("none"), "connect-daemon", "its socket is missing", "No such file", start);

    drop(UnixListener::bind(directory.path().join("dead")).unwrap());
    assert_refused(&uri("dead"), "connect-daemon", "nothing listens", "Connection refused", start);

    let listener = UnixListener::bind(directory.path().join("rude")).unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    assert_refused(&uri("rude"), "connect-daemon", "closed it", "", "journalctl");
}

#[test]
fn a_daemon_that_says_nothing_is_waited_for_and_then_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mute");
    let listener = UnixListener::bind(&path).unwrap();
    let uri = format!("qemu+unix:///system?socket={}", path.display());
    let started = Instant::now();
    let words = format!("did not answer within {} s", limits::CONNECTION.as_secs());
    assert_refused(&uri, "connect-silent", &words, "request: open the connection", "virsh --connect");
    assert!(started.elapsed() >= limits::CONNECTION, "{:?}", started.elapsed());
    drop(listener);
}

#[test]
fn ctrl_c_ends_the_wait_for_a_daemon_that_says_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mute");
    let listener = UnixListener::bind(&path).unwrap();
    let uri = format!("qemu+unix:///system?socket={}", path.display());
    let mut child = preflight(&uri).stderr(Stdio::null()).spawn().unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut mute = None;
    wait_until("preflight connects", Duration::from_secs(60), || {
        assert_eq!(child.try_wait().unwrap(), None, "preflight ended before it connected");
        mute = listener.accept().ok();
        mute.is_some()
    });
    signal(&child, Signal::INT);
    // Without the signal, preflight would wait until its limit and exit with 69.
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// A shell command that waits until libvirt has written to its ssh. If ssh ends before that, libvirt gets a broken
/// pipe and drops the message of ssh.
const WRITTEN_TO: &str = "head -c 1 >/dev/null";

#[test]
fn what_ssh_says_is_passed_on_and_a_mute_ssh_is_ended() {
    let directory = tempfile::tempdir().unwrap();
    let by = |program: &Path| format!("qemu+ssh://me@far/system?command={}", program.display());
    let log = directory.path().join("arguments");
    let message = "ssh: connect to host far port 22: Connection refused";
    let ssh = script(
        directory.path(),
        &format!("echo \"$@\" >{}; {WRITTEN_TO}; echo '{message}' >&2; exit 255", log.display()),
    );
    assert_refused(&by(&ssh), "connect-ssh", "no sshd answers on that host", message, "ssh me@far true");
    let arguments = std::fs::read_to_string(log).unwrap();
    assert!(arguments.contains("BatchMode=yes"), "ssh must not prompt: {arguments}");

    let message = "me@far: Permission denied (publickey).";
    let ssh = script(directory.path(), &format!("{WRITTEN_TO}; echo '{message}' >&2; exit 255"));
    assert_refused(&by(&ssh), "connect-ssh", "without a password", message, "ssh-copy-id me@far");

    // The wait below finds the process by its path in this directory.
    let sleep = directory.path().join("sleep");
    std::os::unix::fs::symlink(xtask_core::host::tools::find("sleep").unwrap(), &sleep).unwrap();
    let ssh = script(directory.path(), &format!("exec {} 1000", sleep.display()));
    assert_refused(&by(&ssh), "connect-silent", "did not answer", "open the connection", "virsh --connect");
    wait_until("the mute ssh ends", Duration::from_secs(60), || {
        processes_naming(directory.path()).is_empty()
    });
}

#[test]
fn a_daemon_behind_ssh_is_described_by_its_own_words() {
    let daemon = Daemon::start(Network::Defined, "0700");
    let uri = format!("qemu+ssh://me@far/system?command={}", daemon.fake_ssh().display());
    let described = describe(&uri);
    assert_eq!(
        (described.code, described.faults()),
        (Some(0), vec![("connect-network-inactive", "degrades")]),
        "{}",
        described.message
    );
    let [_, _, remedy] = described.one("connect-network-inactive");
    assert!(remedy.starts_with(&format!("virsh --connect '{uri}' net-start default")), "{remedy}");
}

#[test]
fn libvirts_mock_driver_is_asked_for_what_it_has() {
    let described = describe("test:///default");
    assert_eq!(described.code, Some(69), "{}", described.message);
    let expected = [
        ("connect-arch", "blocks"),
        ("connect-arch", "blocks"),
        ("connect-pool-missing", "blocks"),
        ("connect-memory", "degrades"),
        ("connect-network-autostart", "degrades"),
    ];
    assert_eq!(described.faults(), expected, "{}", described.message);
    let [host, _, _] = described.one("connect-host");
    assert!(host.contains("i686, 16 CPUs, 3.0 GiB of memory"), "{host}");
}

#[test]
fn what_is_no_uri_is_a_usage_error() {
    for binary in [XTASK, XTASK_VM] {
        for uri in ["xen:///system", "qemu+ssh:///system", "system", "qemu:///embed"] {
            let output = command(binary, &["preflight", "--connect", uri]).output().unwrap();
            let message = message(&output);
            assert_eq!(output.status.code(), Some(2), "{message}");
            assert!(message.contains("--connect") && output.stdout.is_empty(), "{message}");
        }
    }
}

#[test]
fn the_tests_daemon_ends_with_a_test_that_fails() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let failed = std::thread::spawn(move || {
        let daemon = Daemon::start(Network::Absent, "0700");
        sender.send((daemon.path().to_owned(), processes_naming(daemon.path()).len())).unwrap();
        panic!("a test that fails, as planned");
    });
    let (path, running) = receiver.recv().unwrap();
    assert!(failed.join().is_err());
    assert!(running >= 1, "libvirtd names the directory");
    assert_eq!(processes_naming(&path), Vec::<Pid>::new());
    assert!(!path.exists());
}
