//! Tests an instance, a machine that is kept, from `vm up` to `vm rm`.

use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;
use xtask_core::cache::Cache;
use xtask_core::fs::mark;
use xtask_core::limits;

use super::{Warm, turn};
use crate::scratch::{XTASK_VM, assert_code, message, signal, wait_until};

/// In this test, an instance is made, entered, cut off from power, booted from its own disk, shut down and removed.
#[test]
fn an_instance_is_made_in_seconds_and_worked_in() {
    let warm = turn();
    let up = warm
        .scratch
        .run(XTASK_VM, &["vm", "up", "dev", "--arch", "aarch64", "--image", "debian-12", "--json"]);
    assert_code(&up, 0);
    let machine: serde_json::Value = serde_json::from_slice(&up.stdout).unwrap();
    assert_eq!(machine["name"], "dev");
    let users = xtask_core::runs::users_of(&Cache::at(&warm.scratch.cache()), &warm.snapshot());
    assert_eq!(
        users,
        [machine["id"].as_str().unwrap()],
        "the snapshot is not recorded as used by the instance"
    );
    let again = warm.vm(&["up", "dev", "--arch", "aarch64"]);
    assert!(message(&again).contains("a machine of this name exists"), "{}", message(&again));

    let asked = warm.vm(&["exec", "--", "sh", "-c", "uname -m; echo kept > here; sync here; exit 7"]);
    assert_code(&asked, 7);
    assert_eq!(String::from_utf8_lossy(&asked.stdout), "aarch64\n");
    looked_at(&warm);
    assert_code(&warm.vm(&["power-cut", "dev"]), 0);
    let off = warm.vm(&["exec", "true"]);
    assert_code(&off, 69);
    assert!(message(&off).contains("vm start dev"), "{}", message(&off));

    let started = warm.vm(&["start", "dev"]);
    assert_code(&started, 0);
    let asked = warm.vm(&["exec", "--", "cat", "here"]);
    assert_eq!(String::from_utf8_lossy(&asked.stdout), "kept\n", "{}", message(&asked));
    assert!(message(&warm.vm(&["console", "dev", "--no-follow"])).contains("Linux version"));
    attached(&warm);
    // The guest shuts itself down while no command watches it. `vm start` must boot it even so.
    let boot_id = || warm.vm(&["exec", "--", "cat", "/proc/sys/kernel/random/boot_id"]).stdout;
    let before = boot_id();
    warm.vm(&["exec", "--", "sudo", "systemctl", "poweroff"]);
    wait_until("the guest shuts down", limits::SHUTDOWN, || {
        message(&warm.vm(&["console", "dev", "--no-follow"])).contains("reboot: Power down")
    });
    assert_code(&warm.vm(&["start", "dev"]), 0);
    let after = boot_id();
    assert!(!before.is_empty() && !after.is_empty() && before != after, "the guest has not booted again");
    assert_code(&warm.vm(&["exec", "--", "cat", "here"]), 0);
    assert_code(&warm.vm(&["stop", "dev"]), 0);
    let listed = warm.vm(&["list"]);
    assert!(message(&listed).contains("off"), "{}", message(&listed));
    assert_code(&warm.vm(&["gc"]), 0);
    assert_code(&warm.vm(&["rm", "dev"]), 0);
    assert_eq!(message(&warm.vm(&["list"])), "");
}

/// Checks the commands that enter and list the instance. Also checks that `vm gc` collects a dead run but not the
/// instance.
fn looked_at(warm: &Warm) {
    let json = |arguments: &[&str]| {
        let output = warm.vm(arguments);
        assert_code(&output, 0);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let entered = warm.vm(&["ssh", "dev", "--", "echo", "$HOME and  it's"]);
    assert_code(&entered, 0);
    assert!(message(&entered).contains("$HOME and  it's"), "{}", message(&entered));
    let journal = warm.vm(&["logs", "dev", "--", "--unit=ssh.service", "--output=json", "--lines=1"]);
    assert_code(&journal, 0);
    assert!(String::from_utf8_lossy(&journal.stdout).contains("\"_BOOT_ID\""), "{}", message(&journal));
    let running = |name: &str| {
        let listed = json(&["list", "--json"]);
        let machines = listed["machines"].as_array().unwrap();
        machines.len() == 1 && machines[0]["name"] == name && machines[0]["running"] == true
    };
    assert!(running("dev"));
    let dead = warm.scratch.cache().join("runs/0101-000000-dead");
    std::fs::create_dir_all(dead.join("w")).unwrap();
    std::fs::write(dead.join("lock"), "").unwrap();
    mark(&dead).unwrap();
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

/// Checks that an attached terminal shows the earlier output, sends input and shows the answer. Also checks that a
/// second terminal cannot attach.
fn attached(warm: &Warm) {
    let path = warm.scratch.path().join("attached");
    let mut child = warm
        .scratch
        .xtask_vm(&["vm", "console", "dev"])
        .stdin(Stdio::piped())
        .stdout(std::fs::File::create(&path).unwrap())
        .spawn()
        .unwrap();
    let until = |wanted: &str| {
        wait_until(&format!("{wanted:?} on the console"), Duration::from_secs(90), || {
            String::from_utf8_lossy(&std::fs::read(&path).unwrap()).contains(wanted)
        });
    };
    until("Linux version");
    until(" login: ");
    let second = warm.scratch.run(XTASK_VM, &["vm", "console", "dev"]);
    assert_code(&second, 69);
    assert!(message(&second).contains("another terminal is attached"), "{}", message(&second));
    child.stdin.as_mut().unwrap().write_all(b"nobody-of-this-name\n").unwrap();
    until("nobody-of-this-name");
    until("Password: ");
    signal(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let log = warm.vm(&["console", "dev", "--no-follow"]);
    assert!(
        message(&log).contains("nobody-of-this-name"),
        "the log lacks the output that went to another terminal"
    );
}
