//! Tests of the next step, for each state of the containers.

use super::*;
use crate::desired::{DesiredEntry, Operation};
use crate::succession::{Accepted, Previous};
use agent_protocol::{ContainerSpec, Refusal};

fn target(restart: Restart) -> Target {
    let spec = ContainerSpec { restart, ..ContainerSpec::of("localhost/a:1") };
    Target::Run { spec, digest: "d1".into(), image: None }
}

fn listed(id: &str, digest: &str, state: &str, exit_code: i32) -> ListedContainer {
    ListedContainer {
        image_id: "i1".into(),
        id: id.into(),
        names: vec!["iot-pi-7.web".into()],
        state: state.into(),
        exit_code,
        labels: [(DIGEST_LABEL.to_owned(), digest.to_owned())].into(),
        ports: Vec::new(),
    }
}

fn deployment(target: &Target, containers: &[ListedContainer]) -> ManagedDeployment {
    let entry = DesiredEntry::after(None, 1, Operation::Delete, target.clone());
    ManagedDeployment { containers: containers.to_vec(), ..ManagedDeployment::new("web", &entry) }
}

fn step(target: &Target, containers: &[ListedContainer], applied: Option<&Applied>) -> Step {
    let managed = ManagedDeployment { applied: applied.cloned(), ..deployment(target, containers) };
    next(&device(), &managed)
}

fn device() -> DeviceIdentity {
    DeviceIdentity { device_id: "pi-7".into(), boot_id: "boot-2".into() }
}

fn applied(container: &str, digest: &str, boot: &str) -> Applied {
    Applied {
        digest: digest.into(),
        container: container.into(),
        boot_id: boot.into(),
        completed: false,
        unproven: false,
        stopped: false,
    }
}

fn keep(id: &str) -> Step {
    Step::Keep(id.into())
}

fn roll_back(exit_code: i32) -> Step {
    Step::RollBack { id: "b".into(), exit_code }
}

fn rename(id: &str, to: &str) -> Step {
    Step::Rename { id: id.into(), to: to.into() }
}

fn named(name: &str, container: ListedContainer) -> ListedContainer {
    ListedContainer { names: vec![name.into()], ..container }
}

#[test]
fn every_state_has_a_next_step() {
    let run = target(Restart::Always);
    let start = |id: &str, ended| Step::Start { id: id.into(), ended };
    let table: Vec<(Vec<ListedContainer>, Step)> = vec![
        (vec![], Step::Make),
        (vec![listed("a", "d1", "running", 0)], keep("a")),
        (vec![listed("a", "d0", "running", 0)], Step::Make),
        (vec![listed("a", "d1", "created", 0)], start("a", None)),
        (vec![listed("a", "d1", "exited", 0)], start("a", Some(0))),
        (vec![listed("a", "d1", "exited", 3)], start("a", Some(3))),
        (vec![listed("a", "d1", "paused", 0)], Step::Unpause("a".into())),
        (vec![listed("a", "d1", "stopping", 0)], Step::Wait),
        (vec![listed("a", "d1", "unknown", 0)], Step::Make),
        (
            vec![
                listed("a", "d1", "exited", 0),
                listed("b", "d1", "running", 0),
                listed("c", "d0", "running", 0),
            ],
            Step::Remove(vec!["a".into(), "c".into()]),
        ),
        (vec![named("mine", listed("a", "d1", "running", 0))], rename("a", "iot-pi-7.web")),
        (
            vec![ListedContainer { names: vec![], ..listed("a", "d1", "running", 0) }],
            rename("a", "iot-pi-7.web"),
        ),
        (
            vec![named("mine", listed("a", "d1", "exited", 0)), listed("b", "d1", "exited", 0)],
            Step::Remove(vec!["a".into()]),
        ),
    ];
    for (containers, expected) in table {
        assert_eq!(step(&run, &containers, None), expected, "{containers:?}");
    }
}

#[test]
fn containers_of_other_targets_are_removed() {
    let running = [listed("a", "d1", "running", 0)];
    let refused = || Target::Refused(Refusal("no".into()));
    for target in [Target::Removed, Target::Purged, refused()] {
        let record = applied("a", "d1", "boot-2");
        assert_eq!(step(&target, &running, Some(&record)), Step::Remove(vec!["a".into()]));
        assert_eq!(step(&target, &[], None), Step::Gone);
    }
    for target in [Target::Removed, Target::Purged] {
        assert_eq!(step(&target, &running, None), Step::Remove(vec!["a".into()]));
    }
    assert_eq!(step(&refused(), &running, None), Step::Gone, "the state with its document was lost");
}

#[test]
fn a_container_that_ended_follows_its_restart_policy() {
    let done = Applied { completed: true, ..applied("a", "d1", "boot-1") };
    let (this_boot, cut_off) = (applied("a", "d1", "boot-2"), applied("a", "d1", "boot-1"));
    let table = [
        (Restart::Always, 0, Some(&done), false),
        (Restart::OnFailure, 0, Some(&this_boot), true),
        (Restart::OnFailure, 1, Some(&this_boot), false),
        (Restart::OnFailure, 0, Some(&cut_off), false),
        (Restart::OnFailure, 0, Some(&done), true),
        (Restart::OnFailure, 1, Some(&done), true),
        (Restart::OnFailure, 0, None, false),
        (Restart::Never, 1, Some(&this_boot), true),
        (Restart::Never, 0, Some(&done), true),
        (Restart::Never, 0, None, true),
    ];
    for (restart, exit_code, applied, stays) in table {
        let step = step(&target(restart), &[listed("a", "d1", "exited", exit_code)], applied);
        let expected = if stays {
            Step::Complete("a".into())
        } else {
            Step::Start { id: "a".into(), ended: Some(exit_code) }
        };
        assert_eq!(step, expected, "{restart:?} {exit_code} {applied:?}");
    }
}

/// A container with the policy `never` is started at most once.
#[test]
fn a_container_that_a_power_cut_has_ended_is_lost() {
    let (cut_off, this_boot) = (applied("a", "d1", "boot-1"), applied("a", "d1", "boot-2"));
    for state in ["created", "exited"] {
        let container = [listed("a", "d1", state, 0)];
        let lost = Step::Lost("a".into());
        assert_eq!(step(&target(Restart::Never), &container, Some(&cut_off)), lost, "{state}");
        assert_ne!(step(&target(Restart::Never), &container, Some(&this_boot)), lost, "{state}");
        assert_ne!(step(&target(Restart::Always), &container, Some(&cut_off)), lost, "{state}");
    }
}

#[test]
fn a_new_document_takes_over_step_by_step() {
    let old = |state: &str| listed("a", "d0", state, 0);
    let new = |state: &str| named("iot-pi-7.web.new", listed("b", "d1", state, 0));
    let took =
        |state: &str, code| vec![named("iot-pi-7.web.old", old("exited")), listed("b", "d1", state, code)];
    let start = |ended| Step::Start { id: "b".into(), ended };
    let table = [
        (vec![old("running")], Step::Make),
        (vec![old("running"), new("created")], Step::Retire("a".into())),
        (vec![old("stopping"), new("created")], Step::Retire("a".into())),
        (vec![old("paused"), new("created")], Step::Unpause("a".into())),
        (vec![old("exited"), new("created")], rename("a", "iot-pi-7.web.old")),
        (vec![old("exited"), new("running")], rename("a", "iot-pi-7.web.old")),
        (vec![named("iot-pi-7.web.old", old("exited")), new("created")], rename("b", "iot-pi-7.web")),
        (took("created", 0), start(None)),
        (took("running", 0), keep("b")),
        (took("exited", 3), roll_back(3)),
        (vec![listed("b", "d1", "exited", 3)], roll_back(3)),
        (vec![old("running"), listed("b", "d1", "running", 0)], Step::Retire("a".into())),
        (
            vec![old("running"), new("created"), listed("c", "d9", "running", 0)],
            Step::Remove(vec!["c".into()]),
        ),
    ];
    for (containers, expected) in table {
        let (found, _) = takeover(&containers, Restart::Always, |_| {});
        assert_eq!(found, expected, "{containers:?}");
    }
}

#[test]
fn the_end_of_a_new_container_is_judged_by_its_policy_and_by_the_boot() {
    let took = |code| {
        vec![named("iot-pi-7.web.old", listed("a", "d0", "exited", 0)), listed("b", "d1", "exited", code)]
    };
    let complete = Step::Complete("b".into());
    for (restart, code, expected) in [
        (Restart::Always, 0, roll_back(0)),
        (Restart::OnFailure, 1, roll_back(1)),
        (Restart::OnFailure, 0, complete.clone()),
        (Restart::Never, 4, roll_back(4)),
        (Restart::Never, 0, complete),
    ] {
        assert_eq!(takeover(&took(code), restart, |_| {}).0, expected, "{restart:?} {code}");
    }
    let earlier = |managed: &mut ManagedDeployment| {
        managed.applied.as_mut().unwrap().boot_id = "boot-1".into();
    };
    let again = Step::Start { id: "b".into(), ended: Some(137) };
    assert_eq!(takeover(&took(137), Restart::Always, earlier).0, again, "a power cut is no failure");
}

#[test]
fn a_container_that_never_worked_gets_no_place_back() {
    let containers = |state: &str| [listed("a", "d0", state, 0), listed("b", "d1", "created", 0)];
    let unproven = |managed: &mut ManagedDeployment| {
        managed.previous.as_mut().unwrap().applied.unproven = true;
    };
    assert_eq!(takeover(&containers("exited"), Restart::Always, unproven).0, Step::DropPrevious);
    assert_eq!(takeover(&containers("running"), Restart::Always, unproven).0, Step::Retire("a".into()));
    let stopped = |managed: &mut ManagedDeployment| {
        unproven(managed);
        managed.previous.as_mut().unwrap().applied.stopped = true;
    };
    let step = takeover(&containers("exited"), Restart::Always, stopped).0;
    assert_eq!(step, rename("a", "iot-pi-7.web.old"));
}

#[test]
fn the_previous_document_runs_until_the_new_container_is_made() {
    let (_, managed) = takeover(&[listed("a", "d0", "exited", 5)], Restart::Always, |_| {});
    let previous = managed.waiting_previous().unwrap();
    assert_eq!(next(&device(), &previous), Step::Start { id: "a".into(), ended: Some(5) });
    let (_, managed) = takeover(&[listed("b", "d1", "created", 0)], Restart::Always, |_| {});
    assert_eq!(managed.waiting_previous(), None);
}

/// A container that the agent has stopped for its successor is started again, whatever its policy says.
#[test]
fn a_container_that_gets_its_place_back_is_started() {
    let stopped = Applied { stopped: true, ..applied("a", "d1", "boot-2") };
    let cut_off = Applied { boot_id: "boot-1".into(), ..stopped.clone() };
    for restart in [Restart::Always, Restart::OnFailure, Restart::Never] {
        let old = named("iot-pi-7.web.old", listed("a", "d1", "exited", 0));
        let failed = listed("b", "d2", "exited", 3);
        assert_eq!(
            step(&target(restart), &[old.clone(), failed], Some(&stopped)),
            Step::Remove(vec!["b".into()])
        );
        assert_eq!(step(&target(restart), &[old], Some(&stopped)), rename("a", "iot-pi-7.web"));
        for (state, record) in [("exited", &stopped), ("exited", &cut_off), ("created", &cut_off)] {
            let start = Step::Start { id: "a".into(), ended: None };
            assert_eq!(step(&target(restart), &[listed("a", "d1", state, 0)], Some(record)), start);
        }
    }
}

/// Returns the next step of a deployment whose document `d1` follows the proven document `d0`.
fn takeover(
    containers: &[ListedContainer],
    restart: Restart,
    change: impl FnOnce(&mut ManagedDeployment),
) -> (Step, ManagedDeployment) {
    let spec = ContainerSpec::of("localhost/a:0");
    let accepted = Accepted {
        revision: 0,
        document: String::new(),
        image: None,
        target: Target::Run { spec, digest: "d0".into(), image: None },
    };
    let mut managed = ManagedDeployment {
        applied: Some(Applied { unproven: true, ..applied("b", "d1", "boot-2") }),
        previous: Some(Previous { accepted, applied: applied("a", "d0", "boot-2") }),
        ..deployment(&target(restart), containers)
    };
    change(&mut managed);
    (next(&device(), &managed), managed)
}

#[test]
fn the_names_of_the_agents_containers_are_recognised() {
    for (name, is_own) in [
        ("iot-pi-7.web", true),
        ("iot-pi-7.web.new", true),
        ("iot-pi-7.old.old", true),
        ("iot-pi-7.web.data", false),
        ("iot-pi-7.", false),
        ("iot-pi-70.web", false),
        ("web", false),
    ] {
        assert_eq!(is_container_name("pi-7", name), is_own, "{name}");
    }
}

#[test]
fn the_names_of_the_agents_volumes_are_recognised() {
    for (name, deployment) in [
        ("iot-pi-7.web.data", Some("web")),
        ("iot-pi-7.web", None),
        ("iot-pi-7.web.data.x", None),
        ("iot-pi-70.web.data", None),
        ("5f5f5f", None),
    ] {
        assert_eq!(deployment_of_volume("pi-7", name), deployment, "{name}");
    }
}
