//! Tests an instance, a machine that is kept, from `vm up` to `vm rm`.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;
use xtask_core::cache::Cache;
use xtask_core::fs::mark;
use xtask_core::host::network::may_supervise;
use xtask_core::limits;

use super::super::{Warm, turn};
use crate::scratch::{XTASK, XTASK_VM, assert_code, message, signal, wait_until};

/// In this test, an instance is made and entered. The instance shuts itself down, loses its power while it boots, boots
/// from its own disk, and is shut down and removed.
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
    assert_code(&again, 2);
    assert!(message(&again).contains("a machine of this name exists"), "{}", message(&again));

    let line = "uname -m; cat /etc/apt/sources.list.d/*; echo kept > here; sync here; exit 255";
    let asked = warm.vm(&["exec", "--", "sh", "-c", line]);
    assert_code(&asked, 255);
    let output = String::from_utf8_lossy(&asked.stdout);
    assert!(output.starts_with("aarch64\ndeb http"), "{output}");
    looked_at(&warm);
    reaches_other_hosts(&warm);
    ended_by_a_signal(&warm);
    shut_down_by_itself(&warm);
    cut_off_while_it_boots(&warm);

    assert_code(&warm.vm(&["start", "dev"]), 0);
    reaches_other_hosts(&warm);
    let asked = warm.vm(&["exec", "--", "cat", "here"]);
    assert_eq!(String::from_utf8_lossy(&asked.stdout), "kept\n", "{}", message(&asked));
    attached(&warm);
    assert_code(&warm.vm(&["stop", "dev"]), 0);
    is_off(&warm);
    assert_code(&warm.vm(&["gc"]), 0);
    assert_code(&warm.vm(&["rm", "dev"]), 0);
    assert_eq!(message(&warm.vm(&["list"])), "there is no machine; make one with cargo xtask vm up\n");
}

/// Checks that no command claims that the instance runs.
#[track_caller]
fn is_off(warm: &Warm) {
    let listed = warm.vm(&["list"]);
    assert!(message(&listed).starts_with("dev                  off "), "{}", message(&listed));
    for command in [["exec", "true"], ["power-cut", "dev"]] {
        let off = warm.vm(&command);
        assert_code(&off, 69);
        assert!(message(&off).contains("vm start dev"), "{}", message(&off));
    }
}

/// Checks that the guest reaches a port of another host, and no port of this host's loopback, even during a download.
/// This host's own address takes the place of the other host.
fn reaches_other_hosts(warm: &Warm) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect("192.0.2.1:9").expect("this host has no route");
    let address = socket.local_addr().unwrap().ip();
    let listeners =
        [address, Ipv4Addr::LOCALHOST.into()].map(|address| TcpListener::bind((address, 0)).unwrap());
    let [other, own] = listeners.each_ref().map(|listener| listener.local_addr().unwrap().port());
    let [server, _own] = listeners;
    std::thread::spawn(move || {
        for client in server.incoming().map_while(Result::ok) {
            std::thread::spawn(move || while (&client).write_all(&[0; 1 << 16]).is_ok() {});
        }
    });
    let line = format!(
        "exec 4<> /dev/tcp/{address}/{other} && {{ head -c 20000000 <&4 > /dev/null & }} && \
         for _ in $(seq 100); do {{ :; }} 3<> /dev/tcp/10.0.2.2/{own} && echo own; done; wait && echo other; true"
    );
    let asked = warm.vm(&["exec", "--", "bash", "-c", &line]);
    assert_code(&asked, 0);
    // Without a supervisor, Landlock refuses both ports.
    let expected = if may_supervise() { "other\n" } else { "" };
    assert_eq!(String::from_utf8_lossy(&asked.stdout), expected, "{}", message(&asked));
}

/// Checks that a signal that ends `vm exec` also ends the command in the guest.
fn ended_by_a_signal(warm: &Warm) {
    let line = "echo begun; exec sleep 987654";
    let mut child = warm.scratch.command(XTASK, &["vm", "exec", "--", "sh", "-c", line]);
    let mut child = child.stdout(Stdio::piped()).spawn().unwrap();
    let mut begun = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    signal(&child, Signal::TERM);
    assert!(!child.wait().unwrap().success());
    let gone = "while pgrep -f '[9]87654'; do sleep 0.2; done";
    assert_code(&warm.vm(&["exec", "--", "timeout", "60", "sh", "-c", gone]), 0);
}

/// The guest shuts itself down while a console is attached. QEMU keeps running.
fn shut_down_by_itself(warm: &Warm) {
    let path = warm.scratch.path().join("shut-down");
    let output = std::fs::File::create(&path).unwrap();
    let mut console = warm.scratch.xtask_vm(&["vm", "console", "dev"]);
    // The console ends when its input ends.
    let mut console =
        console.stdin(Stdio::piped()).stdout(output.try_clone().unwrap()).stderr(output).spawn().unwrap();
    warm.vm(&["exec", "--", "sudo", "systemctl", "poweroff"]);
    wait_until("the console ends", limits::SHUTDOWN, || console.try_wait().unwrap().is_some());
    let output = String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
    assert!(output.contains("dev is off"), "{output}");
    is_off(warm);
}

/// `vm start` boots a guest that has shut itself down. This command is killed while the guest boots, and QEMU keeps
/// running. Then the power is cut.
fn cut_off_while_it_boots(warm: &Warm) {
    let boots = || message(&warm.vm(&["console", "dev", "--no-follow"])).matches("Linux version").count();
    let before = boots();
    let mut start = warm.scratch.xtask_vm(&["vm", "start", "dev"]).spawn().unwrap();
    wait_until("the guest boots", limits::SHUTDOWN, || boots() > before);
    start.kill().unwrap();
    start.wait().unwrap();
    assert_code(&warm.vm(&["power-cut", "dev"]), 0);
    is_off(warm);
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
