//! Tests of the life of a deployment: it is created, changed, deleted, purged, disturbed and refused, with a
//! bus and without one.

use std::path::PathBuf;

use agent_protocol::deployment::{ContainerSpec, Volume};
use agent_protocol::{ErrorCode, Phase, Reply};
use serde_json::Value;

use crate::device::{Device, document, generation, spec};
use crate::fleet::wait_until;
use crate::pod::{self, IMAGE};

#[tokio::test(flavor = "multi_thread")]
async fn create_change_delete_and_purge() {
    let device = Device::start("life").await;
    let (fleet, pod) = (&device.fleet, &device.pod);
    let data = Volume { name: "data".into(), mount: "/data".into(), read_only: false };
    let with_data = |words| document(ContainerSpec { volumes: vec![data.clone()], ..spec(words) });
    let first = fleet.put("web", &with_data(&["write"])).await;
    let line = fleet.line("web", first, Phase::Running).await;
    let before = pod.running("web");
    assert_eq!(before.len(), 1);
    assert!(before[0].starts_with(&line.container.unwrap().id));

    let second = fleet.put("web", &with_data(&["read"])).await;
    fleet.line("web", second, Phase::Running).await;
    let after = pod.running("web");
    assert!(after.len() == 1 && after != before, "a changed document gets a new container");
    assert!(pod.podman(&["logs", &after[0]]).contains("by the first"), "its volume stayed");

    fleet.delete("web").await;
    fleet.gone("web", second + 1).await;
    assert!(pod.containers().is_empty());
    assert!(pod.podman(&["volume", "ls", "--quiet"]).contains("iot-life.web.data"), "a delete keeps volumes");

    fleet.purge("web").await;
    fleet.gone("web", second + 2).await;
    assert_eq!(pod.podman(&["volume", "ls", "--quiet"]).trim(), "", "a purge deletes volumes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_does_not_stop_delays_no_other() {
    let mut device = Device::start("beside").await;
    let fleet = &device.fleet;
    let stays = fleet.put("a-stays", &document(spec(&["stay"]))).await;
    let quick = fleet.put("quick", &generation(1)).await;
    fleet.line("a-stays", stays, Phase::Running).await;
    fleet.line("quick", quick, Phase::Running).await;
    let (before, stayed) = (device.pod.running("quick"), device.pod.running("a-stays"));
    // The agent is stopped meanwhile, so that it gets both changes at once.
    device.agent.take().unwrap().kill();
    let stays = fleet.put("a-stays", &generation(2)).await;
    let quick = fleet.put("quick", &generation(2)).await;
    device.up();
    let (fleet, pod) = (&device.fleet, &device.pod);
    fleet.line("a-stays", stays, Phase::Running).await;
    fleet.line("quick", quick, Phase::Running).await;
    // podman waits 10 s before it kills the old container of a-stays. The new one is started only after that.
    let containers = pod.containers();
    let started = |name: &str| {
        let own = |container: &&Value| container["Labels"]["io.iot-agent.deployment"] == name;
        containers.iter().find(own).unwrap()["StartedAt"].as_i64().unwrap()
    };
    assert!(started("quick") < started("a-stays"), "it waited for the other container: {containers:#?}");
    assert_ne!(pod.running("quick"), before);
    assert_ne!(pod.running("a-stays"), stayed);
}

/// If podman ends while it stops a container, the container keeps running in the state `stopping`.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_left_in_the_middle_of_a_stop_is_ended() {
    let mut device = Device::start("halfway").await;
    let revision = device.fleet.put("web", &document(spec(&["stay"]))).await;
    device.fleet.line("web", revision, Phase::Running).await;
    let process = PathBuf::from(format!("/proc/{}", device.pod.containers()[0]["Pid"]));
    device.fleet.delete("web").await;
    wait_until("stopping", || device.pod.containers()[0]["State"] == "stopping").await;
    device.pod.stop_service();
    assert!(process.exists());
    device.pod.start_service();
    device.fleet.gone("web", revision + 1).await;
    assert!(!process.exists(), "podman has forgotten the container, but its process still runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_by_others_are_reverted() {
    let device = Device::start("drift").await;
    let (fleet, pod) = (&device.fleet, &device.pod);
    pod.podman(&[
        "load",
        "--quiet",
        "--input",
        pod::archives().join("localhost_iot-agent-test_1.tar").to_str().unwrap(),
    ]);
    // Without the `--ulimit` options, podman(1) would request the highest possible limits, as podman's
    // service does.
    let run = ["run", "--detach", "--ulimit", "nofile=64:64", "--ulimit", "nproc=64:64"];
    let foreign = pod.podman(&[&run[..], &["--name", "foreign", IMAGE]].concat());
    let revision = fleet.put("web", &generation(1)).await;
    fleet.line("web", revision, Phase::Running).await;
    let ids = || pod.running("web");
    for (what, arguments) in [
        ("stopped", &["stop", "--time", "0"][..]),
        ("killed", &["kill"]),
        ("removed", &["rm", "--force", "--time", "0"]),
    ] {
        let before = ids();
        pod.meddle(&[arguments, &[before[0].as_str()]].concat());
        let replaced = if what == "removed" { before } else { Vec::new() };
        wait_until(what, || ids().len() == 1 && ids() != replaced).await;
    }
    let id = ids()[0].clone();
    pod.podman(&["rename", &id, "mine-now"]);
    wait_until("renamed", || {
        pod.podman(&["inspect", "--format", "{{.Name}}", &id]).trim() == "iot-drift.web"
    })
    .await;
    let labels = pod.podman(&[
        "inspect",
        "--format",
        "{{range $k, $v := .Config.Labels}}--label {{$k}}={{$v}} {{end}}",
        &id,
    ]);
    let twin: Vec<&str> = run.into_iter().chain(labels.split_whitespace()).chain([IMAGE]).collect();
    pod.podman(&twin);
    wait_until("duplicated", || pod.containers().len() == 2).await;
    assert!(
        pod.podman(&["ps", "--quiet", "--no-trunc"]).contains(foreign.trim()),
        "the foreign container still runs"
    );
    let reported = |status: &agent_protocol::DeviceStatus| {
        [
            "its container is gone; creating it again",
            "renaming it back to iot-drift.web",
            "removed 1 container",
            "leaving 1 container of others alone: foreign",
        ]
        .iter()
        .all(|words| status.events.iter().any(|event| event.what.contains(words)))
    };
    fleet.status("the events", reported).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_bus_the_state_on_disk_is_run() {
    let mut device = Device::start("offline").await;
    let revision = device.fleet.put("web", &generation(1)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    device.kill();
    device.broker.down();
    // This is like a power cut after which the containers are gone as well.
    device.pod.podman(&["rm", "--force", "--all", "--time", "0"]);
    device.up();
    wait_until("the deployment on disk", || device.pod.running("web").len() == 1).await;
    let status = iot_agent::status_report::describe(&device.home.path().join("status.json")).unwrap();
    assert!(!status.1 && status.0.contains("bus: not connected"), "{}", status.0);
    let before = device.pod.running("web");
    device.broker.up();
    let revision = device.fleet.put("web", &generation(2)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    assert_ne!(device.pod.running("web"), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_state_is_reported_and_rebuilt() {
    let mut device = Device::start("corrupt").await;
    let revision = device.fleet.put("web", &generation(1)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    let before = device.pod.running("web");
    device.kill();
    let state = device.home.path().join("state");
    let mut bytes = std::fs::read(&state).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&state, bytes).unwrap();
    device.up();
    let reported = |status: &agent_protocol::DeviceStatus| {
        status.events.iter().any(|event| event.what.contains("state.corrupt"))
            && status.deployment("web").is_some_and(|line| line.phase == Phase::Running)
    };
    device.fleet.status("the corrupt state", reported).await;
    assert_eq!(device.pod.running("web"), before, "without a known state, no container counts as an orphan");
    assert!(state.exists() && device.home.path().join("state.corrupt").exists());
}

/// The agent does not know the document of the container any more, and cannot run the new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_document_leaves_a_container_alone_whose_state_is_lost() {
    let mut device = Device::start("forgetful").await;
    let revision = device.fleet.put("web", &generation(1)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    let before = device.pod.running("web");
    device.kill();
    for name in ["state", "state.old"] {
        std::fs::remove_file(device.home.path().join(name)).unwrap();
    }
    let refused = device.fleet.put_text("web", "{}").await;
    device.up();
    let is_seen = |status: &agent_protocol::DeviceStatus| {
        let line = status.deployment("web").filter(|line| line.desired_revision == refused);
        line.is_some_and(|line| line.phase == Phase::Refused && line.container.is_some())
    };
    device.fleet.status("the refused document", is_seen).await;
    assert_eq!(device.pod.running("web"), before);
    let revision = device.fleet.put("web", &generation(2)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    assert_eq!(device.pod.containers().len(), 1);
    device.fleet.delete("web").await;
    wait_until("no container", || device.pod.containers().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_deployments_are_reported() {
    let device = Device::start("bad").await;
    let fleet = &device.fleet;
    let good = fleet.put("good", &generation(1)).await;
    let table = [
        ("no-json", "{".to_owned(), Phase::Refused, "not JSON"),
        (
            "no-kind",
            r#"{"version":1,"kind":"wasm","spec":{}}"#.to_owned(),
            Phase::Refused,
            "kind: expected \"podman-container\"",
        ),
        (
            "no-version",
            r#"{"version":9,"kind":"podman-container"}"#.to_owned(),
            Phase::Refused,
            "version: expected the whole number 1",
        ),
        (
            "no-image",
            String::from_utf8(document(ContainerSpec::of("localhost/never-made:1")).to_bytes()).unwrap(),
            Phase::BackingOff,
            "localhost/never-made:1",
        ),
    ];
    for (name, text, phase, words) in &table {
        let revision = fleet.put_text(name, text).await;
        let line = fleet.line(name, revision, *phase).await;
        let error = line.last_error.unwrap();
        assert!(error.contains(words), "{name}: {error:?} does not say {words:?}");
    }
    fleet.put_text("a.b", "{}").await;
    fleet
        .status("a refused name", |status| {
            status.deployment("a.b").is_some_and(|line| line.phase == Phase::Refused)
        })
        .await;
    fleet.line("good", good, Phase::Running).await;
    // An invalid document leaves the running container alone, and a valid one replaces it.
    let before = device.pod.running("good");
    let refused = fleet.put_text("good", r#"{"version":2}"#).await;
    let line = fleet.line("good", refused, Phase::Refused).await;
    assert_eq!((line.running_revision, line.container.unwrap().state.as_str()), (Some(good), "running"));
    assert!(line.last_error.unwrap().contains("version: expected the whole number 1"));
    assert_eq!(device.pod.running("good"), before);
    let again = fleet.put("good", &generation(2)).await;
    let line = fleet.line("good", again, Phase::Running).await;
    assert_eq!(line.running_revision, None);
    assert_ne!(device.pod.running("good"), before);
    // The agent notices an image that appears later.
    let revision = fleet.put("late", &document(ContainerSpec::of("localhost/late:1"))).await;
    fleet.line("late", revision, Phase::BackingOff).await;
    device.pod.podman(&["tag", IMAGE, "localhost/late:1"]);
    fleet.line("late", revision, Phase::Running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_are_answered_with_typed_errors() {
    let mut device = Device::start("commands").await;
    let fleet = &device.fleet;
    let revision = fleet.put("web", &generation(7)).await;
    fleet.line("web", revision, Phase::Running).await;
    let Reply::Pong { device_id, .. } = fleet.ask("ping", "").await.unwrap() else { panic!() };
    assert_eq!(device_id, "commands");
    let Reply::Status { status } = fleet.ask("status", "").await.unwrap() else { panic!() };
    assert_eq!(status.deployment("web").unwrap().phase, Phase::Running);
    let Reply::Logs { lines, truncated, .. } = fleet.ask("logs", r#"{"deployment":"web"}"#).await.unwrap()
    else {
        panic!()
    };
    assert!(!truncated && lines[0].contains("generation 7"), "{lines:?}");
    for (command, payload, code) in [
        ("logs", "", ErrorCode::BadRequest),
        ("logs", r#"{"deployment":"web","since":1}"#, ErrorCode::BadRequest),
        ("logs", r#"{"deployment":"nothing"}"#, ErrorCode::NoSuchDeployment),
    ] {
        let Reply::Error { code: reported, .. } = fleet.ask(command, payload).await.unwrap() else {
            panic!()
        };
        assert_eq!(reported, code, "{payload}");
    }
    let Reply::UnknownCommand { known, .. } = fleet.ask("reboot", "").await.unwrap() else { panic!() };
    assert!(known.contains(&"logs".to_owned()));
    device.pod.stop_service();
    let Reply::Error { code, .. } = fleet.ask("logs", r#"{"deployment":"web"}"#).await.unwrap() else {
        panic!()
    };
    assert_eq!(code, ErrorCode::Podman);
    device.pod.start_service();
    // Without a subscriber, the broker answers at once. This distinguishes an offline device from a slow one.
    device.agent.take().unwrap().stop();
    // The broker notices the end of the connection a moment after the end of the agent.
    let no_responders = async || {
        let answer = fleet.ask("ping", "").await;
        answer.is_err_and(|error| error.kind() == async_nats::client::RequestErrorKind::NoResponders)
    };
    let deadline = tokio::time::Instant::now() + crate::fleet::PATIENCE;
    while !no_responders().await {
        assert!(tokio::time::Instant::now() < deadline, "the broker delivers the request to nobody");
    }
}
