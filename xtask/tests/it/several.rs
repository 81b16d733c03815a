//! Tests several smokes of one call: the table, the exit code, a host that cannot run them, Ctrl-C, and the end of the
//! smokes if their parent is killed. No smoke boots a machine: each image is no image, or its server never answers.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use xtask_core::error::Verdict;
use xtask_core::fs::directories;
use xtask_core::report::{Phase, Report};

use crate::scratch::{Scratch, XTASK, XTASK_VM, assert_code, command, message, signal, wait_until};

/// The limit of a wait; it is long because the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A call with two smokes of guests of this host's architecture. One processor for each guest lets both run at the same
/// time on a host with two processors. The agent is a program of this host, which no guest ever runs.
fn two(scratch: &Scratch, images: [&str; 2]) -> Command {
    let [first, second] = images;
    let mut command = scratch.xtask_vm(&["smoke", "--arch", std::env::consts::ARCH, "--vcpus", "1"]);
    command.args(["--image", first, "--image", second, "--unverified", "--agent", "/bin/true"]);
    command.current_dir(scratch.path());
    command
}

/// Returns the rows of the table in the messages of a call, without its head and its reasons.
fn rows(message: &str) -> Vec<&str> {
    let table = message.lines().skip_while(|line| !line.starts_with("arch "));
    table.skip(1).filter(|line| !line.starts_with(' ')).collect()
}

#[test]
fn the_table_names_both_smokes_and_why_they_failed() {
    let scratch = Scratch::new();
    for name in ["a.raw", "b.raw"] {
        std::fs::write(scratch.path().join(name), "no image").unwrap();
    }
    let output = two(&scratch, ["./a.raw", "./b.raw"]).args(["--report", "reports"]).output().unwrap();
    let message = message(&output);
    assert_code(&output, 69);
    assert!(output.stdout.is_empty(), "stdout is for results: {message}");
    let rows = rows(&message);
    assert_eq!(rows.len(), 2, "{message}");
    for (row, name) in rows.iter().zip(["a.raw", "b.raw"]) {
        let directory = format!("reports/{}-{name}", std::env::consts::ARCH);
        for words in [name, "this machine", "UNAVAILABLE", &format!("{directory}/report.html")] {
            assert!(row.contains(words), "{row}");
        }
        let report = Report::read(&scratch.path().join(&directory)).unwrap();
        assert_eq!((report.exit_code, report.failure.unwrap().phase), (69, Phase::Image));
        // Each line of a smoke begins with the name of the smoke.
        let told = format!("{}/{name}: error: image: use the image ", std::env::consts::ARCH);
        assert!(message.lines().any(|line| line.starts_with(&told)), "{message}");
        let reason = format!("{name}: it is neither qcow2 nor a disk with partitions");
        assert!(message.lines().any(|line| line.starts_with("    image: ") && line.ends_with(&reason)));
    }
}

#[test]
fn a_failure_of_the_agent_is_the_exit_code_of_the_call() {
    let scratch = Scratch::new();
    let other = if cfg!(target_arch = "x86_64") { "aarch64" } else { "x86_64" };
    let one = [
        "smoke",
        "-q",
        "--arch",
        other,
        "--image",
        "debian-12",
        "--image",
        "debian-13",
        "--agent",
        "/bin/true",
    ];
    let output = scratch.run(XTASK_VM, &one);
    assert_code(&output, 1);
    let message = message(&output);
    let rows = rows(&message);
    assert!(rows.len() == 2 && rows.iter().all(|row| row.contains("FAILED")), "{message}");
    // The path of the agent is resolved, and /bin may be a link.
    assert!(message.contains("    build: check the agent /"), "{message}");
}

#[test]
fn a_host_that_cannot_run_them_ends_the_call_before_any_smoke() {
    let scratch = Scratch::new();
    let uri = "qemu+unix:///system?socket=/nonexistent";
    for name in ["a.raw", "b.raw"] {
        std::fs::write(scratch.path().join(name), "no image").unwrap();
    }
    let output = two(&scratch, ["./a.raw", "./b.raw"]).args(["--host", uri]).output().unwrap();
    assert_code(&output, 69);
    let message = message(&output);
    for words in ["none was started", uri, "its socket is missing", "what to do: ", "libvirtd.socket"] {
        assert!(message.contains(words), "{message}");
    }
    assert!(!scratch.cache().join("runs").exists(), "a smoke was started: {message}");
}

#[test]
fn what_only_a_single_smoke_has_is_refused_at_once() {
    let two = ["smoke", "--arch", "aarch64", "--arch", "x86_64"];
    for (more, words) in [
        (&["--keep"][..], "--keep is a flag of a single smoke"),
        (&["--agent", XTASK], "--agent names an executable for one architecture"),
        (&["--image", "debian-13-16k"], "exists only for aarch64"),
        (&["--arch", "aarch64"], "--arch aarch64 is given twice"),
    ] {
        for program in [XTASK, XTASK_VM] {
            let output = command(program, &[&two, more].concat()).output().unwrap();
            assert_code(&output, 2);
            assert!(message(&output).contains(words), "{}", message(&output));
        }
    }
}

/// A call whose smokes both wait for a server that accepts connections and never answers.
struct Waiting {
    scratch: Scratch,
    call: Child,
    _connections: Vec<TcpStream>,
}

impl Waiting {
    fn start() -> Self {
        let scratch = Scratch::new();
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        server.set_nonblocking(true).unwrap();
        let image = |name: &str| format!("https://{}/{name}.img", server.local_addr().unwrap());
        let mut call = two(&scratch, [&image("a"), &image("b")]);
        let mut call = call.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut connections = Vec::new();
        wait_until("both smokes ask for their image", PATIENCE, || {
            assert_eq!(call.try_wait().unwrap(), None, "the call ended before its smokes asked");
            connections.extend(server.accept().map(|(connection, _)| connection));
            connections.len() == 2
        });
        Self { scratch, call, _connections: connections }
    }

    fn has_tidied_up(&self) -> bool {
        let runs = directories(&self.scratch.cache().join("runs"));
        let verdict = |run: &Path| Report::read(run).ok().map(|report| report.verdict);
        runs.len() == 2
            && runs.iter().all(|run| verdict(run) == Some(Verdict::Interrupted) && !run.join("w").exists())
    }
}

#[test]
fn ctrl_c_reaches_every_smoke() {
    let waiting = Waiting::start();
    signal(&waiting.call, Signal::INT);
    let Waiting { scratch, call, _connections } = waiting;
    let output = call.wait_with_output().unwrap();
    assert_code(&output, 130);
    let message = message(&output);
    let rows = rows(&message);
    assert!(rows.len() == 2 && rows.iter().all(|row| row.contains("INTERRUPTED")), "{message}");
    let runs = directories(&scratch.cache().join("runs"));
    assert!(runs.len() == 2 && runs.iter().all(|run| !run.join("w").exists()), "{runs:?}: {message}");
}

#[test]
fn the_smokes_of_a_killed_call_tidy_up_and_end() {
    let mut waiting = Waiting::start();
    waiting.call.kill().unwrap();
    waiting.call.wait().unwrap();
    wait_until("both smokes have tidied up", PATIENCE, || waiting.has_tidied_up());
}
