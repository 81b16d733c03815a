//! Tests the testbed itself: each way into it, each breakage, and the comparison of the things of others.

use std::io::BufRead as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Pid;

use super::namespaces::{done, processes_in};
use super::{MUTE_NETWORK, SSH, SSH_TO_NOBODY, TINY_POOL, Testbed};
use crate::connection::Described;
use crate::scratch::{Scratch, XTASK_VM, command, message, wait_until};

const FIVE_SECONDS: Duration = Duration::from_secs(5);

/// Asks preflight about a libvirt of the testbed. `way` is one of the ways into the testbed.
fn preflight(way: impl Fn(&Command) -> Command, uri: &str) -> Described {
    let scratch = Scratch::new();
    Described::of(&way(&scratch.xtask_vm(&["preflight", "--json", "--connect", uri])).output().unwrap())
}

/// Returns sentence and evidence of the only fault, which must have this id.
fn fault(described: &Described, id: &str) -> String {
    assert_eq!(
        described.faults().iter().map(|(id, _)| *id).collect::<Vec<_>>(),
        [id],
        "{}",
        described.message
    );
    let [sentence, evidence, _] = described.one(id);
    format!("{sentence}: {evidence}")
}

/// Runs a command on the client, and returns its exit code and output.
fn beside(testbed: &Testbed, program: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let output = testbed.beside(&command(program, arguments)).output().unwrap();
    (output.status.code(), message(&output))
}

#[test]
fn the_host_is_sound_from_itself_and_from_its_client() {
    let testbed = Testbed::open();
    for described in [
        preflight(|command| testbed.here(command), "qemu:///system"),
        preflight(|command| testbed.beside(command), SSH),
    ] {
        assert_eq!(described.faults(), [], "{}", described.message);
    }
    // The client has no libvirt of its own.
    let own = preflight(|command| testbed.beside(command), "qemu:///system");
    assert!(fault(&own, "connect-daemon").contains("its socket is missing"), "{}", own.message);
}

#[test]
fn a_session_of_an_ordinary_user_is_sound() {
    let testbed = Testbed::open();
    let blocking = || {
        let asked = command(XTASK_VM, &["preflight", "--json", "--connect", "qemu:///session"]);
        let described = Described::of(&testbed.as_user(&asked).output().unwrap());
        let blocking = described.faults().into_iter().filter(|(_, how)| *how == "blocks");
        blocking.map(|(id, _)| id.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(blocking(), ["connect-pool-missing"]);
    testbed.session().add_session_pool();
    assert_eq!(blocking(), Vec::<String>::new());
    let owner = done(&mut testbed.as_user(&command("sh", &["-c", "id -u; id -G; echo $HOME"])));
    let home = testbed.home().display().to_string();
    assert_eq!(owner.split_whitespace().collect::<Vec<_>>(), ["65534", "65534", &home]);
    // The user may not use the system's libvirtd.
    let refused = testbed.as_user(&command("virsh", &["-c", "qemu:///system", "list"])).output().unwrap();
    assert!(message(&refused).contains("Permission denied"), "{}", message(&refused));
}

#[test]
fn ssh_forwards_in_both_directions() {
    let testbed = Testbed::open();
    let (code, said) = beside(&testbed, "ssh", &["root@10.77.0.2", "true"]);
    assert_eq!((code, said.as_str()), (Some(0), ""));
    // sshd greets each connection (RFC 4253, 4.2).
    let local = "exec 3<>/dev/tcp/127.0.0.1/7001; head -c 4 <&3";
    let script = format!(
        "ssh -f -N -o ExitOnForwardFailure=yes -L 7001:10.77.0.2:22 -R 7002:10.77.0.2:22 root@10.77.0.2 </dev/null >/dev/null 2>&1
         {local}; ssh root@10.77.0.2 \"bash -c '{}'\"",
        local.replace("7001", "7002")
    );
    let (code, said) = beside(&testbed, "bash", &["-euc", &script]);
    assert_eq!((code, said.as_str()), (Some(0), "SSH-SSH-"));
}

#[test]
fn a_port_is_forwarded_to_guests_only_if_sshd_permits_it() {
    let testbed = Testbed::open();
    let forward = "ssh -o ExitOnForwardFailure=yes -R 192.168.122.1:7003:10.77.0.2:22 root@10.77.0.2 \
                   \"bash -c 'exec 3<>/dev/tcp/192.168.122.1/7003; head -c 4 <&3'\"";
    let (_, refused) = beside(&testbed, "bash", &["-euc", forward]);
    assert!(!refused.contains("SSH-"), "{refused}");
    testbed.allow_gateway_ports();
    let (code, said) = beside(&testbed, "bash", &["-euc", forward]);
    assert_eq!((code, said.as_str()), (Some(0), "SSH-"));
}

#[test]
fn a_client_reaches_two_hosts() {
    let (first, second) = (Testbed::open(), Testbed::open());
    second.system().run(&["vol-create-as default only-there 1M"]);
    let uri = first.connect(&second);
    let volumes = |uri| beside(&first, "virsh", &["--quiet", "--connect", uri, "vol-list", "default"]);
    let (code, there) = volumes(uri);
    assert_eq!((code, there.contains("only-there")), (Some(0), true), "{there}");
    let (code, here) = volumes(SSH);
    assert_eq!((code, here.contains("only-there")), (Some(0), false), "{here}");
}

#[test]
fn the_programs_of_the_testbed_see_this_checkout() {
    let testbed = Testbed::open();
    let scratch = Scratch::new();
    for way in [Testbed::here, Testbed::beside] {
        let mut cargo = command("cargo", &["locate-project", "--message-format", "plain"]);
        let found = done(&mut way(&testbed, cargo.current_dir(env!("CARGO_MANIFEST_DIR"))));
        assert!(found.trim().ends_with("xtask/Cargo.toml"), "{found}");
        let cache = done(&mut way(&testbed, &scratch.command("sh", &["-c", "cd $IOT_XTASK_CACHE && pwd"])));
        assert_eq!(cache.trim(), scratch.cache().display().to_string());
    }
    // A program keeps the pid that its parent knows.
    let mut child = testbed.here(&command("sh", &["-c", "echo $$"])).stdout(Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stdout.unwrap(), &mut said).unwrap();
    assert_eq!(said.trim(), pid.to_string());
}

#[test]
fn a_volume_is_on_a_disk() {
    let testbed = Testbed::open();
    testbed.system().run(&["vol-create-as default direct 1M"]);
    let write = ["if=/dev/zero", "of=/var/lib/libvirt/images/direct", "bs=4096", "count=1", "oflag=direct"];
    done(&mut testbed.here(&command("dd", &write)));
    assert!(testbed.images().join("direct").exists());
}

/// The network card's firmware asks for an address. A guest without a disk needs no other program for this.
#[test]
fn a_guest_gets_a_lease_until_dhcp_is_silent() {
    let testbed = Testbed::open();
    testbed.add_mute_network();
    let guest = |name: &str, network: &str| {
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='network'/></os><devices>\
             <interface type='network'><source network='{network}'/><model type='virtio'/></interface>\
             </devices></domain>"
        );
        testbed.system().define("create", &xml);
    };
    guest("with-lease", "default");
    guest("without-lease", MUTE_NETWORK);
    let leases = |network: &str| testbed.system().run(&[&format!("net-dhcp-leases {network}")]);
    wait_until("the guest has a lease", Duration::from_secs(60), || {
        leases("default").contains("192.168.122.")
    });
    let bridge = done(&mut testbed.here(&command("ip", &["neighbour", "show", "dev", "virbr0"])));
    assert!(bridge.contains("192.168.122."), "the guest and the host see each other: {bridge}");
    assert_eq!(leases(MUTE_NETWORK).trim(), "");

    testbed.silence_dhcp();
    assert!(testbed.system().run(&["net-info default"]).contains("Active:"));
    let listening = done(&mut testbed.here(&command("sh", &["-c", "cat /proc/net/udp"])));
    // 67 is the port of a DHCP server.
    assert!(!listening.contains(":0043 "), "{listening}");
}

#[test]
fn logins_are_refused_and_accepted_again() {
    let testbed = Testbed::open();
    let by_wrong_key = format!("{SSH}?keyfile={}", testbed.path().join("client/home/.ssh/wrong").display());
    testbed.refuse_logins();
    for uri in [SSH, &by_wrong_key] {
        let described = preflight(|command| testbed.beside(command), uri);
        let fault = fault(&described, "connect-ssh");
        assert!(fault.contains("without a password") && fault.contains("Permission denied"), "{fault}");
    }
    testbed.accept_logins();
    let described = preflight(|command| testbed.beside(command), SSH);
    assert_eq!(described.faults(), [], "{}", described.message);
}

#[test]
fn nobody_answers_at_the_address_without_a_host() {
    let testbed = Testbed::open();
    let described = preflight(|command| testbed.beside(command), SSH_TO_NOBODY);
    let fault = fault(&described, "connect-ssh");
    assert!(fault.contains("No route to host"), "{fault}");
    let refused = preflight(|command| testbed.beside(command), "qemu+ssh://root@10.77.0.2:23/system");
    assert!(refused.message.contains("no sshd answers"), "{}", refused.message);
}

#[test]
fn an_ssh_session_is_dropped() {
    let testbed = Testbed::open();
    let mut ssh = testbed.beside(&command("ssh", &["root@10.77.0.2", "echo in; sleep 1000"]));
    let mut child = ssh.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 3];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
    assert_eq!(testbed.drop_ssh_sessions(), 1);
    wait_until("the client is told of the end", FIVE_SECONDS, || child.try_wait().unwrap().is_some());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(255), "{}", message(&output));
    assert_eq!(testbed.drop_ssh_sessions(), 0);
    assert_eq!(beside(&testbed, "ssh", &["root@10.77.0.2", "true"]).0, Some(0), "sshd goes on");
}

#[test]
fn a_link_is_cut_and_mended() {
    let testbed = Testbed::open();
    let mut ssh = testbed.beside(&command("ssh", &["root@10.77.0.2", "echo in; read line; echo out"]));
    let mut child = ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 3];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
    testbed.cut_link();
    let (code, said) = beside(&testbed, "ssh", &["-o", "ConnectTimeout=1", "root@10.77.0.2", "true"]);
    assert_eq!(code, Some(255), "{said}");
    assert_eq!(child.try_wait().unwrap(), None, "ssh is not told of a cut");
    testbed.mend_link();
    // TCP sends the line again when the link is up.
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"\n").unwrap();
    wait_until("the session goes on", Duration::from_secs(15), || child.try_wait().unwrap().is_some());
    let output = child.wait_with_output().unwrap();
    assert_eq!(message(&output), "out\n");
}

#[test]
fn a_stopped_network_is_seen() {
    let testbed = Testbed::open();
    testbed.stop_network();
    for described in [
        preflight(|command| testbed.here(command), "qemu:///system"),
        preflight(|command| testbed.beside(command), SSH),
    ] {
        fault(&described, "connect-network-inactive");
    }
}

#[test]
fn a_pool_is_full() {
    let testbed = Testbed::open();
    testbed.add_tiny_pool();
    let image = testbed.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(80 << 20).unwrap();
    testbed.system().run(&[&format!("vol-create-as {TINY_POOL} big 80M --allocation 0")]);
    let full = testbed.system().try_run(&[&format!("vol-upload big {} --pool {TINY_POOL}", image.display())]);
    assert!(message(&full).contains("No space left on device"), "{}", message(&full));
}

#[test]
fn a_fingerprint_changes_with_each_thing_of_others() {
    let testbed = Testbed::open();
    let system = testbed.system();
    system.add_foreign();
    let before = system.fingerprint();
    assert_eq!(before, system.fingerprint());
    let changed = |lines: &[&str]| {
        let before = system.fingerprint();
        system.run(lines);
        let after = system.fingerprint();
        let differ = |(name, text): &(&String, &String)| before.get(*name) != Some(*text);
        after.iter().filter(differ).map(|(name, _)| name.clone()).collect::<Vec<_>>().join("; ")
    };
    let content = testbed.path().join("other");
    std::fs::write(&content, "other").unwrap();
    let upload = format!("vol-upload foreign.img {} --pool default", content.display());
    for (lines, property) in [
        (["resume foreign-on", "suspend foreign-on"].as_slice(), ""),
        (&["resume foreign-on"], "domain foreign-on: domstate --reason"),
        (&["desc foreign-off --config other"], "domain foreign-off: dumpxml"),
        (&["net-destroy foreign-net"], "network foreign-net: net-info"),
        (&["net-autostart default --disable"], "network default: net-info"),
        (&[&upload], "volume default/foreign.img: sha256"),
        (&["vol-create-as default more 1M"], "volume default/more: sha256"),
    ] {
        let changed = changed(lines);
        assert!(changed.contains(property), "{lines:?}: {changed}");
    }
    system.run(&["vol-delete more default"]);
    assert_ne!(before, system.fingerprint());
}

#[test]
fn our_things_are_listed_and_leave_the_fingerprint_alone() {
    let testbed = Testbed::open();
    for libvirt in [testbed.system(), testbed.session()] {
        libvirt.add_foreign();
        let before = libvirt.fingerprint();
        assert_eq!(libvirt.ours(), Vec::<String>::new());
        let xml = "<domain type='qemu'><name>mine</name><metadata><m:run xmlns:m='urn:iot-xtask'>1</m:run></metadata>\
            <memory unit='MiB'>32</memory><os><type arch='x86_64' machine='pc'>hvm</type></os></domain>";
        libvirt.define("define", xml);
        libvirt.run(&["vol-create-as default iot-xtask-1-disk 1M"]);
        assert_eq!(libvirt.ours(), ["domain mine", "volume default/iot-xtask-1-disk"]);
        assert_eq!(libvirt.fingerprint(), before);
    }
}

#[test]
fn nothing_is_left_of_a_testbed() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let failed = std::thread::spawn(move || {
        let testbed = Testbed::open();
        testbed.session().add_foreign();
        let networks = testbed.networks().to_vec();
        sender.send((testbed.path().to_owned(), processes_in(&networks).len(), networks)).unwrap();
        panic!("a test that fails, as planned");
    });
    let (path, running, networks) = receiver.recv().unwrap();
    assert!(failed.join().is_err());
    assert!(
        running >= 9,
        "two shells, sshd, dnsmasq, virtlogd, two libvirtds, a QEMU and the client: {running}"
    );
    assert_eq!(processes_in(&networks), Vec::<Pid>::new());
    assert!(!path.exists());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(path.to_str().unwrap()), "{mounts}");
}

/// Starts this test program again, in which a test opens a testbed and waits, and kills the program.
#[test]
fn a_killed_test_leaves_no_process() {
    let name = "testbed::itself::a_testbed_for_the_test_that_is_killed";
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", name, "--ignored", "--nocapture", "--test-threads", "1"]);
    let mut child = again.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let line = lines.find(|line| line.starts_with(OPENED)).unwrap();
    let mut words = line.split_whitespace().skip(1).map(PathBuf::from);
    let directory = words.next().unwrap();
    let networks: Vec<_> = words.collect();
    assert!(processes_in(&networks).len() >= 9, "{line}");
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("the testbed ends", FIVE_SECONDS, || processes_in(&networks).is_empty());
    std::fs::remove_dir_all(directory).unwrap();
}

const OPENED: &str = "opened:";

#[test]
#[ignore = "waits to be killed by another test"]
fn a_testbed_for_the_test_that_is_killed() {
    let testbed = Testbed::open();
    testbed.session().add_foreign();
    let networks: Vec<_> = testbed.networks().iter().map(|network| network.display().to_string()).collect();
    println!("\n{OPENED} {} {}", testbed.path().display(), networks.join(" "));
    loop {
        std::thread::park();
    }
}
