//! Whole smokes on the libvirts of the testbed: on the host itself, over ssh and of an ordinary user, with both networks.
//! Everything on the host that is not ours must be as it was. `cargo xtask soak --all` runs these tests.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use xtask_core::cache::Cache;
use xtask_core::fs::directories;
use xtask_core::processes::processes_naming;
use xtask_core::report::{Phase, Report};
use xtask_core::snapshot::{BAD, RAM};

use super::breakage::MUTE_NETWORK;
use super::foreign::Fingerprint;
use super::namespaces::{SSH, Testbed, USER};
use super::virsh::Virsh;
use crate::scratch::{Scratch, XTASK_INSPECT, assert_code, command, message, random, wait_until};

/// A testbed with things of others, and a cache for the smokes in it.
pub(super) struct Stand {
    pub(super) testbed: Testbed,
    pub(super) scratch: Scratch,
    before: Fingerprint,
    is_session: bool,
}

/// The way to the libvirt of a smoke.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Way {
    /// The host's libvirtd, on the host.
    Here,
    /// The host's libvirtd, over ssh.
    Ssh,
    /// The libvirtd of an ordinary user on the host.
    Session,
}

impl Way {
    fn uri(self) -> &'static str {
        match self {
            Self::Here => "qemu:///system",
            Self::Ssh => SSH,
            Self::Session => "qemu:///session",
        }
    }
}

impl Stand {
    pub(super) fn new(way: Way) -> Self {
        let (testbed, scratch) = (Testbed::open(), Scratch::with_images());
        let is_session = way == Way::Session;
        if is_session {
            let images = scratch.cache().join("images");
            std::fs::remove_file(&images).unwrap();
            std::fs::create_dir(&images).unwrap();
            let known = directories(&Cache::from_env().unwrap().images());
            let image = known.iter().find(|path| path.to_string_lossy().contains("debian-12-aarch64"));
            let image = image.expect("a smoke has built the image before");
            copy(std::slice::from_ref(image), &images);
            std::os::unix::fs::chown(scratch.path(), Some(USER), None).unwrap();
            let chown = Command::new("chown").args(["--recursive", "65534"]).arg(scratch.cache()).status();
            assert!(chown.unwrap().success());
        }
        let stand = Self { testbed, scratch, before: Fingerprint::new(), is_session };
        stand.virsh().add_foreign();
        Self { before: stand.virsh().fingerprint(), ..stand }
    }

    pub(super) fn virsh(&self) -> Virsh<'_> {
        if self.is_session { self.testbed.session() } else { self.testbed.system() }
    }

    /// Returns a command that runs a smoke of the built agent.
    pub(super) fn smoke(&self, way: Way, arch: &str, arguments: &[&str]) -> Command {
        let mut command = self.scratch.xtask_vm(&["smoke", "--arch", arch, "--image", "debian-12"]);
        command.args(["--connect", way.uri(), "--agent"]).arg(self.agent(arch)).args(arguments);
        match way {
            Way::Here => self.testbed.here(&command),
            Way::Ssh => self.testbed.beside(&command),
            Way::Session => self.testbed.as_user(&command),
        }
    }

    /// Starts a smoke for aarch64, and waits until its guest runs.
    fn booting(&self, way: Way, arguments: &[&str]) -> Child {
        let mut command = self.smoke(way, "aarch64", arguments);
        let smoke = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        wait_until("the guest runs", Duration::from_secs(120), || {
            let running = self.virsh().try_run(&["list --name"]);
            String::from_utf8_lossy(&running.stdout).contains("iot-xtask")
        });
        smoke
    }

    /// Builds the agent, and returns a copy that each user may read.
    fn agent(&self, arch: &str) -> PathBuf {
        let built = Command::new(XTASK_INSPECT).args(["build", "--arch", arch]).output().unwrap();
        assert_code(&built, 0);
        let copied = self.testbed.path().join("iot-agent");
        copy(&[String::from_utf8(built.stdout).unwrap().trim().into()], &copied);
        copied
    }

    /// Checks that the host is as it was, and that no process and no file of the run is left.
    pub(super) fn assert_nothing_left(&self) {
        let after = self.virsh().fingerprint();
        assert_eq!(self.before, after, "things of others have changed");
        let left = self.virsh().ours();
        let left: Vec<_> = left.iter().filter(|name| !name.contains("iot-xtask-image-")).collect();
        assert!(left.is_empty(), "left on the host: {left:?}");
        let runs = Cache::at(&self.scratch.cache()).runs();
        assert_eq!(processes_naming(&runs), Vec::<Pid>::new());
        for run in directories(&runs) {
            assert!(!run.join("w").exists(), "{} is left", run.display());
        }
    }

    /// Returns the report of a finished smoke.
    pub(super) fn report(&self, output: &Output) -> Report {
        let message = message(output);
        let path = message.lines().find_map(|line| line.strip_prefix("report: "));
        let path = PathBuf::from(path.unwrap_or_else(|| panic!("{message}")));
        Report::read(path.parent().unwrap()).unwrap()
    }

    fn verifies(&self, way: Way, arch: &str, arguments: &[&str]) -> Report {
        let output = self.smoke(way, arch, arguments).output().unwrap();
        println!("{}", message(&output));
        assert_code(&output, 0);
        let report = self.report(&output);
        let cut = report.events.iter().find(|event| event.text.contains("the power was cut")).unwrap();
        // On the host itself, the pids of the daemons belong to another process namespace, so the smoke does not find QEMU.
        // Over ssh, root of that host sends SIGKILL to QEMU, and in a session, the user does.
        assert_eq!(cut.text == "the power was cut", way != Way::Here, "{}", cut.text);
        report
    }
}

fn copy(from: &[PathBuf], to: &std::path::Path) {
    let copied = Command::new("cp").arg("-a").args(from).arg(to).status().unwrap();
    assert!(copied.success());
}

#[test]
fn on_the_systems_libvirt_with_both_networks() {
    let stand = Stand::new(Way::Here);
    for network in ["nat", "user"] {
        stand.verifies(Way::Here, "aarch64", &["--network", network]);
        stand.assert_nothing_left();
    }
}

#[test]
fn over_ssh_with_both_networks() {
    let stand = Stand::new(Way::Ssh);
    for network in ["nat", "user"] {
        stand.verifies(Way::Ssh, "aarch64", &["--network", network]);
        stand.assert_nothing_left();
    }
}

#[test]
fn over_ssh_for_x86_64() {
    let stand = Stand::new(Way::Ssh);
    stand.verifies(Way::Ssh, "x86_64", &["--network", "nat"]);
    stand.assert_nothing_left();
}

#[test]
fn on_the_libvirt_of_an_ordinary_user() {
    let stand = Stand::new(Way::Session);
    stand.verifies(Way::Session, "aarch64", &[]);
    stand.assert_nothing_left();
}

/// Returns the key and the maker of the snapshot from which the machine of a smoke was restored.
fn snapshot(report: &Report) -> (&str, &str) {
    let snapshot = report.snapshot.as_ref().expect("a warm smoke");
    (&snapshot.key, &snapshot.made_by)
}

#[test]
fn smokes_share_a_snapshot_on_a_daemon_of_this_host() {
    for way in [Way::Here, Way::Session] {
        let stand = Stand::new(way);
        stand.verifies(way, "aarch64", &[]);
        // Both smokes run at the same time.
        let other = stand.booting(way, &["--until", "join"]);
        let made = stand.verifies(way, "aarch64", &[]);
        let output = other.wait_with_output().unwrap();
        println!("{}", message(&output));
        assert_code(&output, 0);
        let other = stand.report(&output);
        assert_eq!(snapshot(&other), snapshot(&made));
        assert!(made.snapshot.is_some_and(|snapshot| snapshot.clock_step_seconds.is_some()));
        stand.assert_nothing_left();
        let cold = stand.smoke(way, "aarch64", &["--cold", "--until", "join"]).output().unwrap();
        assert_code(&cold, 0);
        assert!(stand.report(&cold).snapshot.is_none());
    }
}

#[test]
fn a_damaged_memory_on_a_daemon_is_the_hosts_fault() {
    let stand = Stand::new(Way::Here);
    let smoke = || stand.smoke(Way::Here, "aarch64", &["--until", "join"]).output().unwrap();
    assert_code(&smoke(), 0);
    let [snapshot] = directories(&stand.scratch.cache().join("snapshots")).try_into().unwrap();
    let path = snapshot.join(RAM);
    let memory = std::fs::read(&path).unwrap();
    let write = |memory: &[u8]| {
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, memory).unwrap();
    };
    let mut other = memory.clone();
    *other.last_mut().unwrap() ^= 1;
    for (damaged, is_restored) in [(&other[..], true), (&memory[..memory.len() / 2], false)] {
        write(damaged);
        let output = smoke();
        println!("{}", message(&output));
        assert_code(&output, 69);
        assert!(message(&output).contains("was changed in ram.save"), "{}", message(&output));
        assert_eq!(message(&output).contains("join       ok"), is_restored, "{}", message(&output));
        std::fs::remove_file(snapshot.join(BAD)).unwrap();
        stand.assert_nothing_left();
    }
    write(&memory);
    // Without its disk on the daemon, the snapshot uploads it again.
    let gc = stand.scratch.xtask_vm(&["vm", "gc", "--connect", Way::Here.uri(), "--images"]);
    assert_code(&stand.testbed.here(&gc).output().unwrap(), 0);
    assert_eq!(stand.virsh().ours(), Vec::<String>::new());
    let output = smoke();
    assert_code(&output, 0);
    assert_eq!(stand.report(&output).snapshot.unwrap().key, snapshot.file_name().unwrap().to_string_lossy());
}

/// Kills a smoke at a random moment of its first minutes. The next smoke must collect what it has left.
fn kill_one(stand: &Stand, way: Way, round: u32) {
    const WINDOW: u64 = 150_000;
    let after =
        Duration::from_millis(random(&format!("round {round}: kill after (modulo {WINDOW} ms)")) % WINDOW);
    let mut smoke: Child = stand
        .smoke(way, "aarch64", &["--network", if round.is_multiple_of(2) { "nat" } else { "user" }])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(after);
    kill_process(Pid::from_child(&smoke), Signal::KILL).unwrap();
    smoke.wait().unwrap();
    println!("round {round}: killed after {after:?}; left {:?}", stand.virsh().ours());
}

/// `IOT_KILLS` is the number of kills for each way.
#[test]
fn killed_smokes_leave_nothing_that_the_next_one_does_not_collect() {
    let kills: u32 = std::env::var("IOT_KILLS").map_or(10, |text| text.parse().unwrap());
    for way in [Way::Here, Way::Ssh] {
        let stand = Stand::new(way);
        for round in 0..kills {
            kill_one(&stand, way, round);
        }
        let output = stand.smoke(way, "aarch64", &["--until", "join"]).output().unwrap();
        println!("{}", message(&output));
        assert_code(&output, 0);
        stand.assert_nothing_left();
    }
}

/// Planted faults that do not need the embedded driver are found on a daemon, too.
#[test]
fn a_planted_fault_is_found_on_a_daemon() {
    let stand = Stand::new(Way::Here);
    for (fault, phase) in [
        ("other-digest", Phase::Join),
        ("broker-refuses", Phase::Join),
        ("no-fsync", Phase::PowerCut),
        ("ignores-deletes", Phase::Workload),
        ("stale-boot-id", Phase::Rejoin),
        ("unit-not-enabled", Phase::Rejoin),
        ("kernel-panic", Phase::Boot),
        ("kill-qemu", Phase::Boot),
    ] {
        let output =
            stand.smoke(Way::Here, "aarch64", &["--sabotage", fault, "--network", "nat"]).output().unwrap();
        println!("{}", message(&output));
        assert_code(&output, 1);
        assert_eq!(stand.report(&output).failure.unwrap().phase, phase, "{fault}");
        stand.assert_nothing_left();
    }
}

/// If the connection ends in the middle of a smoke, this is a failure of the host, and the smoke tidies up over a new
/// connection.
#[test]
fn an_ssh_that_drops_is_the_hosts_fault_and_leaves_nothing() {
    let stand = Stand::new(Way::Ssh);
    let smoke = stand.booting(Way::Ssh, &["--network", "nat"]);
    assert!(stand.testbed.drop_ssh_sessions() > 0);
    let output = smoke.wait_with_output().unwrap();
    assert_code(&output, 69);
    let message = message(&output);
    assert!(message.contains("the connection to qemu+ssh://root@10.77.0.2/system ended"), "{message}");
    assert!(message.contains("what to do: "), "{message}");
    stand.assert_nothing_left();
}

/// A host that is no longer reached ends a smoke by itself, and the next smoke collects what was left.
#[test]
fn a_link_that_is_cut_is_noticed_and_what_was_left_is_collected() {
    let stand = Stand::new(Way::Ssh);
    let smoke = stand.booting(Way::Ssh, &[]);
    std::thread::sleep(Duration::from_secs(10));
    stand.testbed.cut_link();
    let cut = Instant::now();
    let output = smoke.wait_with_output().unwrap();
    assert_code(&output, 69);
    let message = message(&output);
    assert!(cut.elapsed() < Duration::from_secs(150), "it took {:?}: {message}", cut.elapsed());
    assert!(message.contains("cargo xtask vm gc --connect"), "{message}");
    stand.testbed.mend_link();
    let command = stand.scratch.xtask_vm(&["vm", "gc", "--connect", SSH]);
    assert_code(&stand.testbed.beside(&command).output().unwrap(), 0);
    stand.assert_nothing_left();
}

/// The end of QEMU by the host says nothing about the agent.
#[test]
fn a_qemu_that_the_daemons_host_kills_is_that_hosts_fault() {
    let stand = Stand::new(Way::Here);
    let smoke = stand.booting(Way::Here, &[]);
    std::thread::sleep(Duration::from_secs(10));
    let kill = "kill -KILL $(cat /run/libvirt/qemu/iot-xtask-*.pid)";
    let killed = stand.testbed.daemons(&command("sh", &["-euc", kill])).output().unwrap();
    assert_code(&killed, 0);
    let output = smoke.wait_with_output().unwrap();
    assert_code(&output, 69);
    let message = message(&output);
    assert!(message.contains("on the daemon's host while waiting for"), "{message}");
    stand.assert_nothing_left();
}

/// The guest boots, but gets no address. The limits are scaled down, because the test waits for one of them.
#[test]
fn a_lease_that_never_comes_is_the_hosts_fault() {
    let stand = Stand::new(Way::Here);
    stand.testbed.add_mute_network();
    let network = format!("nat:{MUTE_NETWORK}");
    let arguments = ["--network", network.as_str(), "--timeout-scale", "0.5"];
    let output = stand.smoke(Way::Here, "aarch64", &arguments).output().unwrap();
    assert_code(&output, 69);
    let message = message(&output);
    for words in ["the network nat:mute has leased no address", "--network user"] {
        assert!(message.contains(words), "{message}");
    }
    let left = stand.virsh().ours();
    assert!(left.iter().all(|name| name.contains("iot-xtask-image-")), "{left:?}");
}

/// Two smokes of one call run on two hosts at the same time, and one table shows both.
#[test]
fn two_smokes_of_one_call_are_spread_over_two_hosts() {
    let stand = Stand::new(Way::Ssh);
    let second = Testbed::open();
    let other = stand.testbed.connect(&second);
    let mut command = stand.scratch.xtask_vm(&["smoke", "--arch", "aarch64", "--arch", "x86_64"]);
    command.args(["--image", "debian-12", "--until", "join", "--host", SSH, "--host", other]);
    let output = stand.testbed.beside(&command).output().unwrap();
    let message = message(&output);
    println!("{message}");
    assert_code(&output, 0);
    let rows: Vec<_> =
        message.lines().filter(|line| line.contains("VERIFIED ") && line.contains("debian-12")).collect();
    let on = |host: &str| rows.iter().any(|row| row.contains(host));
    assert!(on(SSH) && on(other), "{message}");
    stand.assert_nothing_left();
    let left = second.system().ours();
    assert!(left.iter().all(|name| name.contains("iot-xtask-image-")), "{left:?}");
}
