//! What `vm gc --connect` collects, and what it leaves alone although it carries a record of ours.

use xtask_core::cache::Cache;
use xtask_core::runs::RunDir;
use xtask_core::runs::owner::Owner;

use super::namespaces::Testbed;
use crate::scratch::{Scratch, message};

/// Returns the record of a run that has ended.
fn record_of_the_dead(scratch: &Scratch) -> Owner {
    let (run, _) = RunDir::create(&Cache::at(&scratch.cache()), || Ok(())).unwrap();
    let owner = Owner::of(&run).unwrap();
    let path = run.path().to_owned();
    drop(run);
    std::fs::remove_dir_all(path).unwrap();
    owner
}

fn domain(name: &str, owner: &Owner) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><metadata>{}</metadata><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='pc'>hvm</type></os></domain>",
        owner.element_in_domain()
    )
}

#[test]
fn the_copy_of_a_domain_is_left_alone_and_a_dead_one_is_collected() {
    let (testbed, scratch) = (Testbed::open(), Scratch::new());
    let owner = record_of_the_dead(&scratch);
    // A tool that copies a domain copies its metadata, too.
    testbed.system().define("define", &domain("users-clone", &owner));
    testbed.system().run(&["start users-clone --paused"]);
    let gc = || {
        let command = scratch.xtask_vm(&["vm", "gc", "--connect", "qemu:///system"]);
        message(&testbed.here(&command).output().unwrap())
    };
    let left = gc();
    assert!(left.contains("users-clone") && left.contains("cannot be collected"), "{left}");
    let listed = || testbed.system().run(&["list --all --name"]);
    assert!(listed().contains("users-clone"), "{}", listed());
    testbed.system().define("define", &domain(&owner.domain(), &owner));
    // A managed save image must not keep the definition.
    testbed.system().run(&[&format!("start {} --paused", owner.domain())]);
    testbed.system().run(&[&format!("managedsave {}", owner.domain())]);
    let collected = gc();
    assert!(collected.contains(&owner.domain()), "{collected}");
    assert!(!listed().contains(&owner.domain()) && listed().contains("users-clone"), "{}", listed());
}
