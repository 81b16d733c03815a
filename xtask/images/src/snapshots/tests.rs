//! The life of a snapshot from its creation to its deletion, with files that no machine made.

use xtask_core::error::{Failure, Kind};
use xtask_core::limits;
use xtask_core::snapshot::{DISK, FILES, FORMAT, SEED};

use super::*;

fn ingredients(cache: &Cache) -> Ingredients {
    let digest = Algorithm::Sha256.of(b"x");
    Ingredients {
        format: FORMAT,
        image: digest.clone(),
        image_path: cache.root().join("disk"),
        seed: digest.clone(),
        domain: digest.clone(),
        firmware_code: digest.clone(),
        firmware_vars: digest.clone(),
        emulator: digest,
        qemu: "7.2.22".to_owned(),
        libvirt: "9.0.0".to_owned(),
        payload_bytes: 1,
    }
}

/// Makes a snapshot whose files contain their own names.
fn made(cache: &Cache, key: &str, run: &str) -> Snapshot {
    let beside = cache.root().join("made");
    make_private_dir(&beside).unwrap();
    make_private_dir(&cache.snapshots()).unwrap();
    for name in FILES.iter().chain(&["user_key"]) {
        std::fs::write(beside.join(name), name).unwrap();
    }
    std::fs::write(cache.root().join("disk"), "x").unwrap();
    let snapshot = SnapshotManifest {
        ingredients: ingredients(cache),
        image: "debian-12".to_owned(),
        arch: xtask_core::arch::VmArchitecture::Aarch64,
        uuid: String::new(),
        made_at: "2026-11-24T10:00:00Z".to_owned(),
        made_by: run.to_owned(),
        files: BTreeMap::new(),
    };
    keep(cache, key, (&beside, &FILES), snapshot).unwrap()
}

#[test]
fn a_snapshot_is_found_until_it_is_bad_and_deleted_when_nothing_lies_on_it() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path());
    let ui = Ui::quiet();
    // The key contains a dot, like that of ubuntu-24.04.
    let key = "ubuntu-24.04-aarch64-0123";
    let look = |wanted: &Ingredients| find(&cache, key, wanted, &ui).unwrap();
    assert!(look(&ingredients(&cache)).is_none());
    let first = made(&cache, key, "1124-100000-0001");
    assert!(!first.file("user_key").exists(), "nothing else is in a snapshot");
    let other = made(&cache, "debian-12-aarch64-0123", "1124-100000-0002");
    assert_eq!(look(&ingredients(&cache)).unwrap().directory, first.directory);
    first.check().unwrap();

    // An instance (a machine that was kept) uses the snapshot.
    let work = cache.runs().join("1124-100000-0003/w");
    std::fs::create_dir_all(&work).unwrap();
    std::fs::write(work.join("frozen"), first.directory.as_os_str().as_encoded_bytes()).unwrap();
    std::fs::set_permissions(first.file("ram.save"), Permissions::from_mode(0o600)).unwrap();
    std::fs::write(first.file("ram.save"), "ram.sale").unwrap();
    let error = first.check().unwrap_err();
    assert!(Kind::Host.is(&error) && error.to_string().contains("was changed in ram.save"), "{error:#}");
    assert!(look(&ingredients(&cache)).is_none(), "bad");
    assert!(first.directory.exists(), "it is not deleted under a machine");
    let second = made(&cache, key, "1124-100000-0004");
    assert_eq!(look(&ingredients(&cache)).unwrap().directory, second.directory);

    std::fs::remove_dir_all(work).unwrap();
    assert_eq!(look(&ingredients(&cache)).unwrap().directory, second.directory);
    assert!(!first.directory.exists(), "nothing lies on it any more");
    // Make what a killed deletion leaves, and a snapshot of another version.
    std::fs::rename(&second.directory, second.directory.with_file_name(format!("{key}.x{DELETING}")))
        .unwrap();
    make_private_dir(&cache.snapshots().join(format!("{key}.y"))).unwrap();
    assert!(look(&ingredients(&cache)).is_none());
    let left: Vec<_> = all(&cache).iter().map(Found::name).collect();
    assert_eq!(left, [other.name()], "a name of another form is not listed, and not deleted");
    assert_eq!(all(&cache)[0].key(), "debian-12-aarch64-0123");
    // This snapshot has the same key, but other ingredients.
    let another = Ingredients { qemu: "10".to_owned(), ..ingredients(&cache) };
    assert!(find(&cache, "debian-12-aarch64-0123", &another, &ui).unwrap().is_none());
    assert!(all(&cache).is_empty());
}

#[test]
fn a_file_that_is_gone_is_this_hosts_fault() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path());
    let kept = made(&cache, "debian-12-aarch64-0123", "1124-100000-0001");
    std::fs::remove_file(kept.file("nvram.fd")).unwrap();
    let error = kept.check().unwrap_err();
    assert!(Kind::Host.is(&error), "{error:#}");
    // An instance boots with its own UEFI variables, and from the snapshot's disk.
    kept.check_what_boots().unwrap();
    std::fs::set_permissions(kept.file(DISK), Permissions::from_mode(0o600)).unwrap();
    std::fs::write(kept.file(DISK), "another").unwrap();
    let error = kept.check_what_boots().unwrap_err();
    assert!(error.to_string().contains("was changed in disk.qcow2"), "{error:#}");
}

#[test]
fn what_is_touched_while_a_run_uses_it_is_noticed_after_it_was_hashed() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path());
    let kept = made(&cache, "debian-12-aarch64-0123", "1124-100000-0001");
    let verified = |then: &dyn Fn()| {
        let verification = kept.verify();
        while !verification.is_finished() {
            std::thread::sleep(limits::CHILD_POLL);
        }
        then();
        verification.conclude()
    };
    verified(&|| ()).unwrap();
    // Writes the same content again, and sets the modification time back.
    let rewrite = |path: &Path| {
        let modified = path.metadata().unwrap().modified().unwrap();
        let content = std::fs::read(path).unwrap();
        std::fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
        std::fs::write(path, content).unwrap();
        File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
    };
    let error = verified(&|| rewrite(&directory.path().join("disk"))).unwrap_err();
    assert!(Kind::Host.is(&error) && error.to_string().contains("of the snapshot"), "{error:#}");
    assert!(!kept.file(BAD).exists());
    let error = verified(&|| rewrite(&kept.file(SEED))).unwrap_err();
    assert!(Kind::Host.is(&error) && error.to_string().contains("changed in seed.img"), "{error:#}");
    assert!(kept.file(BAD).exists());
}

#[test]
fn a_snapshot_that_does_not_restore_is_not_used_again() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path());
    let ui = Ui::quiet();
    let key = "debian-12-aarch64-0123";
    let kept = made(&cache, key, "1124-100000-0001");
    let is_there = || find(&cache, key, &ingredients(&cache), &ui).unwrap().is_some();
    let error = kept.does_not_restore(Failure::interrupted().into());
    assert!(Kind::Interrupted.is(&error) && is_there(), "{error:#}");
    let no_memory = "cannot set up guest memory 'pc.ram': Cannot allocate memory";
    let error = kept.does_not_restore(anyhow::anyhow!(no_memory).context("restore the machine"));
    assert_eq!(xtask_core::error::code(&error), 69, "{error:#}");
    let remedy = xtask_core::error::hint(&error).unwrap();
    assert!(
        remedy.contains("--memory") && is_there(),
        "the host lacks memory, and the snapshot stays: {remedy}"
    );
    let error = kept.does_not_restore(Failure::guest("no sign of the restored guest", "a slow host").into());
    assert_eq!(xtask_core::error::code(&error), 69, "it says nothing about the agent: {error:#}");
    assert!(!is_there() && !kept.directory.exists());
}

#[test]
fn an_image_that_was_changed_below_its_snapshot_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path());
    let kept = made(&cache, "debian-12-aarch64-0123", "1124-100000-0001");
    kept.check().unwrap();
    std::fs::write(directory.path().join("disk"), "y").unwrap();
    for error in [kept.check().unwrap_err(), kept.check_what_boots().unwrap_err()] {
        assert!(Kind::Host.is(&error), "{error:#}");
        assert!(error.to_string().contains("of the snapshot"), "{error:#}");
    }
    assert!(!kept.file(BAD).exists(), "the snapshot's own files are what they were");
    std::fs::remove_file(directory.path().join("disk")).unwrap();
    assert!(Kind::Host.is(&kept.check().unwrap_err()));
}

#[test]
fn the_wait_for_another_runs_snapshot_ends() {
    let directory = tempfile::tempdir().unwrap();
    let cache = Cache::at(directory.path());
    let ui = Ui::quiet();
    let lock = |limit| lock(&cache, "key", limit, &ui);
    let held = lock(Duration::ZERO).unwrap();
    let error = lock(limits::RETRY).unwrap_err();
    assert!(Kind::Host.is(&error) && error.to_string().contains("key.lock"), "{error:#}");
    drop(held);
    lock(Duration::ZERO).unwrap();
}
