//! Tests of the parts of a reading that the agent believes.

use super::*;

const CREATED: i64 = 1_000;

fn update(name: &str, revision: u64, operation: Operation) -> Update {
    Update { name: name.into(), revision, operation }
}

fn put(name: &str, revision: u64) -> Update {
    update(name, revision, Operation::Put("{}".into()))
}

fn reading<const N: usize>(created: i64, last_sequence: u64, updates: [Update; N]) -> Change {
    Change::Snapshot(Stream { created, last_sequence }, updates.into())
}

/// Returns a state with the deployments `web` at revision 90 and `gone`, deleted at revision 91.
fn known() -> Desired {
    let mut desired = Desired::default();
    let gone = update("gone", 91, Operation::Delete);
    assert!(desired.take(reading(CREATED, 100, [put("web", 90), gone])));
    assert_eq!((desired.revision, desired.stream), (91, Some(CREATED)));
    desired
}

fn state_of(desired: &Desired, name: &str) -> (u64, Operation, Option<Orphaned>) {
    let entry = &desired.deployments[name];
    (entry.revision, entry.operation.clone(), entry.orphaned)
}

fn document() -> Operation {
    Operation::Put("{}".into())
}

#[test]
fn a_reading_of_the_known_stream_is_believed_except_for_what_it_lacks() {
    let mut desired = known();
    let gone = update("gone", 91, Operation::Delete);
    assert!(!desired.take(reading(CREATED, 120, [put("web", 90), gone])), "the same again");
    assert!(desired.take(reading(CREATED, 120, [])), "an emptied bucket");
    assert_eq!(state_of(&desired, "web"), (90, document(), Some(Orphaned::Missing)));
    assert!(desired.deployments["web"].why_orphaned().unwrap().contains("has lost its entry"));
    assert_eq!(desired.deployments["gone"].why_orphaned(), None, "it does not run");
    assert_eq!(desired.revision, 91, "the stream has not gone back");
    assert!(!desired.take(reading(CREATED, 130, [])), "nothing new");
    assert!(desired.take(Change::Update(put("web", 90))), "half of the reading came later");
    assert_eq!(state_of(&desired, "web"), (90, document(), None));
    for operation in [Operation::Delete, Operation::Purge] {
        for change in [
            Change::Update(update("web", 131, operation.clone())),
            reading(CREATED, 131, [update("web", 131, operation.clone())]),
        ] {
            let mut desired = desired.clone();
            desired.take(reading(CREATED, 130, []));
            assert!(desired.take(change));
            assert_eq!(state_of(&desired, "web"), (131, operation.clone(), None));
        }
    }
}

#[test]
fn a_purge_is_carried_out_once() {
    let mut desired = known();
    let purge = || update("web", 101, Operation::Purge);
    assert!(desired.take(Change::Update(purge())));
    assert_eq!(state_of(&desired, "web"), (101, Operation::Purge, None));
    desired.forget("web");
    desired.take(reading(CREATED, 101, [purge()]));
    assert!(!desired.deployments.contains_key("web"));
    assert!(!desired.take(reading(CREATED, 101, [purge()])), "nothing new");
    // A later Purge of another key may have to delete the volumes of a lost state.
    assert!(desired.take(reading(CREATED, 102, [purge(), update("db", 102, Operation::Purge)])));
    assert_eq!(state_of(&desired, "db"), (102, Operation::Purge, None));
    assert!(desired.take(reading(CREATED, 103, [put("web", 103)])));
    assert_eq!(state_of(&desired, "web"), (103, document(), None));
}

/// The volumes may be those of a deployment that was put again after the backup that was restored.
#[test]
fn without_a_state_a_purge_keeps_the_volumes() {
    let purge = |revision| update("web", revision, Operation::Purge);
    let mut desired = Desired::default();
    assert!(desired.take(reading(CREATED, 10, [purge(9), put("db", 10)])));
    assert_eq!(state_of(&desired, "web"), (9, Operation::Delete, None));
    assert!(!desired.take(reading(CREATED, 10, [purge(9), put("db", 10)])), "nothing new");
    assert!(desired.take(Change::Update(purge(11))));
    assert_eq!(state_of(&desired, "web"), (11, Operation::Purge, None));
    // The bucket was empty at the first reading, and a backup was restored later. Or the entry comes after the reading.
    for change in [reading(CREATED, 30, [purge(9), put("db", 10)]), Change::Update(purge(9))] {
        let mut desired = Desired::default();
        desired.take(reading(CREATED, 20, []));
        desired.take(change);
        assert_eq!(state_of(&desired, "web"), (9, Operation::Delete, None));
    }
}

/// The volumes of a deployment that was deleted and forgotten are as safe as those of a known one.
#[test]
fn a_deletion_is_carried_out_once_and_its_volumes_stay() {
    let forgotten = || {
        let mut desired = known();
        desired.forget("gone");
        assert!(!desired.deployments.contains_key("gone"));
        desired
    };
    let marker = |revision, operation| update("gone", revision, operation);
    let mut desired = forgotten();
    assert!(!desired.take(reading(CREATED, 100, [put("web", 90), marker(91, Operation::Delete)])));
    assert!(!desired.take(Change::Update(marker(91, Operation::Delete))));
    assert_eq!(desired.revision, 91, "it stays acknowledged");
    let stored = serde_json::to_vec(&desired).unwrap();
    assert_eq!(serde_json::from_slice::<Desired>(&stored).unwrap(), desired);
    assert!(desired.take(Change::Update(marker(101, Operation::Purge))));
    assert_eq!(state_of(&desired, "gone"), (101, Operation::Purge, None));
    // The stream goes back to a time when the deployment was purged, or was there.
    for old in [marker(20, Operation::Purge), marker(20, Operation::Delete)] {
        let mut desired = forgotten();
        for _ in 0..2 {
            desired.take(reading(CREATED, 50, [put("web", 10), old.clone()]));
            assert!(!desired.deployments.contains_key("gone"), "{old:?}");
        }
        desired.take(Change::Update(marker(52, Operation::Purge)));
        assert_eq!(state_of(&desired, "gone"), (52, Operation::Delete, None));
    }
    let mut desired = forgotten();
    desired.take(reading(CREATED, 50, [put("web", 10), put("gone", 20)]));
    assert_eq!(state_of(&desired, "gone"), (20, document(), None), "a Put is applied");
    for (revision, operation) in [(52, Operation::Delete), (92, Operation::Purge)] {
        assert!(desired.take(Change::Update(marker(revision, Operation::Purge))));
        assert_eq!(state_of(&desired, "gone"), (revision, operation, None));
    }
    // A new stream deletes only what it deletes after its first reading.
    let mut desired = forgotten();
    let old = marker(4, Operation::Purge);
    for _ in 0..2 {
        desired.take(reading(CREATED + 1, 200, [put("web", 3), old.clone()]));
        assert!(!desired.deployments.contains_key("gone"));
    }
    assert!(desired.take(Change::Update(marker(201, Operation::Purge))));
    assert_eq!(state_of(&desired, "gone"), (201, Operation::Purge, None));
}

#[test]
fn only_the_newest_entry_of_a_key_counts() {
    let mut desired = known();
    let purge = update("web", 95, Operation::Purge);
    desired.take(reading(CREATED, 120, [put("web", 90), put("web", 99), purge]));
    assert_eq!(state_of(&desired, "web"), (99, document(), None));
}

/// A backup was made while the deployment was purged. Later the deployment was put again, and filled its volume.
#[test]
fn an_old_deletion_of_a_restored_backup_removes_nothing() {
    for operation in [Operation::Delete, Operation::Purge] {
        let mut desired = known();
        assert!(desired.take(reading(CREATED, 50, [update("web", 10, operation.clone())])));
        assert_eq!(state_of(&desired, "web"), (90, document(), Some(Orphaned::Older)));
        assert!(desired.deployments["web"].why_orphaned().unwrap().contains("above revision 90"));
        // A replica that lags behind catches up.
        assert!(desired.take(Change::Update(update("web", 60, operation.clone()))), "acknowledged");
        assert_eq!(state_of(&desired, "web"), (90, document(), Some(Orphaned::Older)));
        assert!(!desired.take(reading(CREATED, 60, [update("web", 60, operation.clone())])));
        assert!(desired.take(Change::Update(update("web", 101, operation.clone()))));
        assert_eq!(state_of(&desired, "web"), (101, operation, None));
    }
}

#[test]
fn a_put_of_an_older_stream_is_applied_and_its_purge_keeps_the_volumes() {
    let mut desired = known();
    desired.take(reading(CREATED, 50, [put("web", 20)]));
    assert_eq!((state_of(&desired, "web"), desired.revision), ((20, document(), None), 20));
    let mut orphan = known();
    orphan.take(reading(CREATED, 50, []));
    assert!(orphan.take(Change::Update(put("web", 51))));
    for mut desired in [desired, orphan] {
        let purge = update("web", 52, Operation::Purge);
        assert!(desired.take(Change::Update(purge.clone())));
        assert_eq!(state_of(&desired, "web"), (52, Operation::Delete, None));
        assert!(!desired.take(Change::Update(purge.clone())));
        assert!(!desired.take(reading(CREATED, 52, [purge])), "it is the entry that was applied");
        assert!(desired.take(Change::Update(update("web", 92, Operation::Purge))));
        assert_eq!(state_of(&desired, "web"), (92, Operation::Purge, None));
    }
}

#[test]
fn a_new_stream_deletes_only_what_it_deletes_after_its_first_reading() {
    for operation in [Operation::Delete, Operation::Purge] {
        let mut desired = known();
        desired.take(Change::Update(put("kept", 99)));
        let marker = update("web", 2, operation.clone());
        let stranger = update("stranger", 4, Operation::Purge);
        assert!(desired.take(reading(CREATED + 1, 200, [marker.clone(), put("kept", 3), stranger])));
        assert_eq!((desired.revision, desired.stream), (4, Some(CREATED + 1)));
        assert_eq!(state_of(&desired, "web"), (200, document(), Some(Orphaned::Recreated)));
        assert_eq!(state_of(&desired, "kept"), (3, document(), None));
        assert!(!desired.deployments.contains_key("stranger"));
        let stored = serde_json::to_vec(&desired).unwrap();
        assert_eq!(serde_json::from_slice::<Desired>(&stored).unwrap(), desired);
        assert!(!desired.take(reading(CREATED + 1, 200, [marker, put("kept", 3)])));
        for name in ["web", "kept"] {
            assert!(desired.take(Change::Update(update(name, 201, operation.clone()))), "{name}");
            assert_eq!(state_of(&desired, name), (201, operation.clone(), None));
        }
        // The stream counts from 1 again, so this Put has a lower revision than the known deletion.
        assert!(desired.take(Change::Update(put("gone", 150))));
        assert_eq!(state_of(&desired, "gone"), (150, document(), None));
    }
}

#[test]
fn a_state_without_an_identity_adopts_the_first_stream() {
    let mut desired = Desired { stream: None, ..known() };
    desired.take(reading(CREATED, 100, [update("web", 95, Operation::Purge)]));
    assert_eq!(state_of(&desired, "web"), (95, Operation::Purge, None), "purged while the device was off");
    let mut desired = Desired { stream: None, ..known() };
    desired.take(reading(CREATED, 3, [update("web", 2, Operation::Purge)]));
    assert_eq!(state_of(&desired, "web"), (90, document(), Some(Orphaned::Older)));
}
