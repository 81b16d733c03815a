//! Tests a machine on a libvirt daemon, from `vm up` to `vm rm`. It is one machine, because each boot takes minutes. It is
//! on another host, because ssh is then needed to kill its QEMU and to enter it.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use xtask_core::fs::directories;

use super::namespaces::{SSH, SSH_TO_NOBODY};
use super::smokes::{Stand, Way};
use crate::scratch::{XTASK, XTASK_VM, assert_code, message, wait_until};

impl Stand {
    /// Runs `vm` on the client.
    fn vm(&self, arguments: &[&str]) -> Output {
        let program = match arguments {
            ["exec", ..] | ["console", "--no-follow"] => XTASK,
            _ => XTASK_VM,
        };
        self.testbed.beside(&self.scratch.command(program, &[&["vm"], arguments].concat())).output().unwrap()
    }

    #[track_caller]
    fn vm_succeeds(&self, arguments: &[&str]) -> String {
        let output = self.vm(arguments);
        assert_code(&output, 0);
        println!("vm {arguments:?}: {}", message(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn vm_fails(&self, arguments: &[&str], words: &str) {
        let output = self.vm(arguments);
        assert_code(&output, 69);
        assert!(message(&output).contains(words), "{}", message(&output));
    }

    /// Returns the path of the only machine's record.
    fn record(&self) -> PathBuf {
        let [run] = &directories(&self.scratch.cache().join("runs"))[..] else { panic!("one run") };
        run.join("kept")
    }

    /// Returns the only machine as `vm list --json` describes it.
    fn listed(&self) -> Value {
        let mut list: Value = serde_json::from_str(&self.vm_succeeds(&["list", "--json"])).unwrap();
        list["machines"][0].take()
    }
}

#[test]
fn a_machine_is_made_worked_in_and_removed() {
    let stand = Stand::new(Way::Ssh);
    let up = ["up", "dev", "--arch", "aarch64", "--image", "debian-12", "--connect", SSH, "--json"];
    let made: Value = serde_json::from_str(&stand.vm_succeeds(&up)).unwrap();
    assert_eq!(made["daemon"]["uri"], SSH);
    let first_port = made["daemon"]["route"]["port"].clone();
    assert_eq!(stand.listed()["running"], true);
    let listed = stand.vm_succeeds(&["list"]);
    let is_described =
        listed.starts_with("dev                  running ") && listed.ends_with(&format!(" on {SSH}\n"));
    assert!(is_described, "{listed}");
    let wrote = stand.vm_succeeds(&["exec", "--", "sh", "-c", "uname -m; echo kept > here; sync here"]);
    assert_eq!(wrote, "aarch64\n");
    stand.the_daemon_is_away();

    let cut = stand.vm(&["power-cut", "dev"]);
    assert_code(&cut, 0);
    assert!(!message(&cut).contains("warning"), "QEMU is killed: {}", message(&cut));
    assert_eq!(stand.listed()["running"], false);
    for command in [&["power-cut", "dev"][..], &["exec", "true"]] {
        stand.vm_fails(command, "vm start dev");
    }
    stand.testbed.system().run(&["pool-destroy default"]);
    stand.vm_fails(&["start", "dev"], "start dev");
    stand.testbed.system().run(&["pool-start default"]);
    stand.vm_succeeds(&["start", "dev"]);
    stand.vm_succeeds(&["start", "dev"]);
    let machine = stand.listed();
    assert_ne!(machine["daemon"]["route"]["port"], first_port, "QEMU's port is another one");
    assert_eq!(stand.vm_succeeds(&["exec", "--", "cat", "here"]), "kept\n");
    stand.is_attached_until_it_stops();
    assert_eq!(stand.listed()["running"], false);
    let shown = stand.vm_succeeds(&["console", "--no-follow"]);
    assert!(shown.matches(" login: ").count() >= 2, "the log has both boots: {shown}");

    stand.gc_leaves_what_is_used();
    stand.vm_succeeds(&["rm", "dev"]);
    stand.assert_nothing_left();
    assert!(directories(&stand.scratch.cache().join("runs")).is_empty());
    let image = stand.testbed.system().ours();
    assert_eq!(image.len(), 1, "{image:?}");
    stand.vm_succeeds(&["gc", "--connect", SSH, "--images"]);
    assert_eq!(stand.testbed.system().ours(), Vec::<String>::new());
    stand.assert_nothing_left();
}

/// A machine that was restored on a daemon of this host boots from its own disk, which lies over that of the snapshot.
#[test]
fn a_restored_machine_boots_again() {
    let stand = Stand::new(Way::Here);
    let succeeds = |program, arguments: &[&str]| {
        let command = stand.scratch.command(program, &[&["vm"], arguments].concat());
        let output = stand.testbed.here(&command).output().unwrap();
        println!("vm {arguments:?}: {}", message(&output));
        assert_code(&output, 0);
        message(&output)
    };
    let up = ["--arch", "aarch64", "--image", "debian-12", "--connect", "qemu:///system"];
    let made = succeeds(XTASK_VM, &[&["up", "first"], &up[..]].concat());
    assert!(made.contains("made a snapshot"), "{made}");
    let restored = succeeds(XTASK_VM, &[&["up", "second"], &up[..]].concat());
    assert!(restored.contains("restored in"), "{restored}");
    succeeds(XTASK, &["exec", "-m", "second", "--", "sh", "-c", "echo kept > here; sync here"]);
    let images = || stand.testbed.system().ours().iter().filter(|name| name.contains("-image-")).count();
    succeeds(XTASK_VM, &["gc", "--connect", "qemu:///system", "--images"]);
    assert_eq!(images(), 2, "both machines use the image and the disk of the snapshot");
    succeeds(XTASK_VM, &["rm", "first"]);
    succeeds(XTASK_VM, &["power-cut", "second"]);
    succeeds(XTASK_VM, &["start", "second"]);
    assert!(succeeds(XTASK, &["exec", "-m", "second", "--", "cat", "here"]).contains("kept"));
    succeeds(XTASK_VM, &["rm", "second"]);
    stand.assert_nothing_left();
    succeeds(XTASK_VM, &["gc", "--connect", "qemu:///system", "--images"]);
    assert_eq!(images(), 0);
}

impl Stand {
    /// If the daemon cannot be reached, the machine is listed, and is not removed.
    fn the_daemon_is_away(&self) {
        let path = self.record();
        let record = std::fs::read(&path).unwrap();
        let mut changed: Value = serde_json::from_slice(&record).unwrap();
        changed["daemon"]["uri"] = json!(SSH_TO_NOBODY);
        std::fs::write(&path, changed.to_string()).unwrap();
        let listed = self.vm(&["list"]);
        assert_code(&listed, 0);
        let words = message(&listed);
        assert!(
            words.starts_with("dev                  unknown ") && words.contains(SSH_TO_NOBODY),
            "{words}"
        );
        assert!(words.contains("warning: the state of dev is unknown: "), "{words}");
        assert_eq!(self.listed()["running"], Value::Null);
        self.vm_fails(&["rm", "dev"], "nothing was deleted on this host");
        assert!(path.exists() && path.with_file_name("w").exists());
        std::fs::write(&path, record).unwrap();
        assert_eq!(self.listed()["running"], true);
    }

    /// The console shows the answer to a key, and ends when `vm stop` has shut the guest down. A second one is refused.
    fn is_attached_until_it_stops(&self) {
        let path = self.scratch.path().join("console");
        let output = std::fs::File::create(&path).unwrap();
        let mut console = self.testbed.beside(&self.scratch.xtask_vm(&["vm", "console", "dev"]));
        console.stdin(Stdio::piped()).stdout(output.try_clone().unwrap()).stderr(output);
        let mut console = console.spawn().unwrap();
        let shown = || String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
        let minute = Duration::from_secs(60);
        wait_until("the console shows the log", minute, || shown().contains(" login: "));
        let before = shown().matches(" login: ").count();
        wait_until("the guest answers a key", 2 * minute, || {
            console.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
            std::thread::sleep(Duration::from_secs(2));
            shown().matches(" login: ").count() > before
        });
        self.vm_fails(&["console", "dev"], "another terminal is attached");
        self.vm_succeeds(&["stop", "dev"]);
        wait_until("the console ends with the guest", minute, || console.try_wait().unwrap().is_some());
        assert!(shown().ends_with("dev is off; boot it with cargo xtask vm start dev\n"), "{}", shown());
    }

    /// `vm gc` touches neither the machine nor its image.
    fn gc_leaves_what_is_used(&self) {
        let before = self.testbed.system().ours();
        assert_eq!(before.iter().filter(|name| name.contains("iot-xtask-image-")).count(), 1, "{before:?}");
        for flags in [&["--dry-run"][..], &[]] {
            let arguments = [&["gc", "--connect", SSH, "--images", "--json"], flags].concat();
            let outcome: Value = serde_json::from_str(&self.vm_succeeds(&arguments)).unwrap();
            assert_eq!((&outcome["domains"], &outcome["images"]), (&json!([]), &json!([])));
        }
        assert_eq!(self.testbed.system().ours(), before);
    }
}
