//! Errors of a libvirt that cannot run a guest. Each has a message and a remedy of its own, exit code 69, and leaves
//! nothing.

use std::process::Command;
use std::time::{Duration, Instant};

use super::breakage::TINY_POOL;
use super::namespaces::{SSH, SSH_TO_NOBODY, Testbed};
use crate::scratch::{Scratch, assert_code, message};

/// Runs a smoke on a libvirt, which must end soon with exit code 69. Returns what it says.
#[track_caller]
fn refused(enter: impl FnOnce(&Command) -> Command, scratch: &Scratch, arguments: &[&str]) -> String {
    let mut command = scratch.xtask_vm(&["smoke", "--arch", "aarch64", "--image", "debian-12"]);
    command.args(arguments);
    let begun = Instant::now();
    let output = enter(&command).output().unwrap();
    assert_code(&output, 69);
    let message = message(&output);
    assert!(begun.elapsed() < Duration::from_secs(120), "it took {:?}: {message}", begun.elapsed());
    assert!(message.contains("what to do: "), "no remedy: {message}");
    message
}

#[track_caller]
fn says(message: &str, words: &[&str]) {
    for words in words {
        assert!(message.contains(words), "{message:?} does not say {words:?}");
    }
}

#[test]
fn a_host_that_is_away_and_a_login_that_is_refused_are_told_apart() {
    let (testbed, scratch) = (Testbed::open(), Scratch::with_images());
    let away = refused(|command| testbed.beside(command), &scratch, &["--connect", SSH_TO_NOBODY]);
    says(&away, &["10.77.0.9"]);
    testbed.refuse_logins();
    let refused = refused(|command| testbed.beside(command), &scratch, &["--connect", SSH]);
    says(&refused, &["does not accept this user", "ssh-copy-id root@10.77.0.2"]);
    assert_ne!(away, refused);
}

#[test]
fn a_network_or_a_pool_that_cannot_be_used_is_named() {
    let (testbed, scratch) = (Testbed::open(), Scratch::with_images());
    let before = testbed.system().fingerprint();
    let here = |arguments: &[&str]| {
        refused(
            |command| testbed.here(command),
            &scratch,
            &[&["--connect", "qemu:///system"], arguments].concat(),
        )
    };
    says(&here(&["--network", "nat:lab"]), &["there is no network lab", "net-list --all"]);
    says(&here(&["--pool", "lab"]), &["there is no storage pool lab", "pool-define-as lab"]);
    testbed.stop_network();
    says(&here(&["--network", "nat"]), &["the network default is not active", "net-start default"]);
    testbed.system().run(&["net-start default"]);
    assert_eq!(before, testbed.system().fingerprint());
    testbed.add_tiny_pool();
    says(&here(&["--pool", TINY_POOL]), &["free in the storage pool tiny", "--pool NAME"]);
    assert!(testbed.system().ours().is_empty());
}
