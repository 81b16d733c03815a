//! Tests of a document that takes over from another one, and of the way back if it fails.

use std::time::Duration;

use agent_protocol::deployment::{ContainerSpec, Restart, StopSignal, Volume};
use agent_protocol::{DeviceStatus, Document, Phase};

use crate::device::{Device, document, generation, spec};
use crate::fleet::wait_until;

/// Returns a document whose container is on probation for this many seconds.
fn on_probation(seconds: u32, words: &[&str]) -> Document {
    document(ContainerSpec { probation_seconds: Some(seconds), ..spec(words) })
}

fn tells<'a>(words: &'a str) -> impl Fn(&DeviceStatus) -> bool + 'a {
    move |status| status.events.iter().any(|event| event.what.contains(words))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_fails_gives_the_place_back() {
    let mut device = Device::start("back").await;
    let (fleet, pod) = (&device.fleet, &device.pod);
    let good = fleet.put("web", &generation(1)).await;
    fleet.line("web", good, Phase::Running).await;
    let before = pod.running("web");
    // The container ends within its probation.
    let ends = fleet.put("web", &on_probation(30, &["exit", "3"])).await;
    let line = fleet.line("web", ends, Phase::RolledBack).await;
    let error = line.last_error.unwrap();
    let words = ["within its probation, with exit code 3", "its last output: words"];
    assert!(words.iter().all(|words| error.contains(words)), "{error}");
    assert_eq!(line.running_revision, Some(good));
    wait_until("the first container runs again", || pod.running("web") == before).await;
    assert_eq!(pod.containers().len(), 1, "the failed container is removed");
    assert_eq!(pod.containers()[0]["Names"][0], "iot-back.web");
    // The container does not start: runc cannot mount a volume on a file.
    let file = Volume { name: "data".into(), mount: "/program".into(), read_only: false };
    let mount = document(ContainerSpec { volumes: vec![file], ..spec(&[]) });
    let stuck = fleet.put("web", &mount).await;
    let line = fleet.line("web", stuck, Phase::RolledBack).await;
    assert!(line.last_error.as_ref().unwrap().contains("start the container"), "{line:?}");
    wait_until("the first container runs again", || pod.running("web") == before).await;
    // The container cannot be made. The first one is not even stopped.
    let started = pod.containers()[0]["StartedAt"].clone();
    let missing = ContainerSpec { image: "localhost/never-made:1".into(), ..spec(&[]) };
    let missing = fleet.put("web", &document(missing)).await;
    let line = fleet.line("web", missing, Phase::BackingOff).await;
    assert_eq!((line.running_revision, line.container.unwrap().state.as_str()), (Some(good), "running"));
    let killed = pod.running("web");
    pod.meddle(&["kill", &killed[0]]);
    wait_until("it is restarted meanwhile", || pod.running("web") == before).await;
    assert_ne!(pod.containers()[0]["StartedAt"], started);

    // A graceful stop of the agent leaves the container running, and the next agent knows what has failed.
    let ends = fleet.put("web", &on_probation(30, &["exit", "5"])).await;
    fleet.line("web", ends, Phase::RolledBack).await;
    wait_until("the first container runs again", || pod.running("web") == before).await;
    let started = pod.containers()[0]["StartedAt"].clone();
    device.agent.take().unwrap().stop();
    assert_eq!(device.pod.running("web"), before);
    device.up();
    let (fleet, pod) = (&device.fleet, &device.pod);
    let again = |status: &DeviceStatus| {
        tells("loaded 1 deployments")(status)
            && status.deployment("web").is_some_and(|line| line.phase == Phase::RolledBack)
    };
    fleet.status("rolled back by the agent before", again).await;
    assert_eq!(
        (pod.running("web"), &pod.containers()[0]["StartedAt"]),
        (before, &started),
        "no second trial"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_previous_container_is_kept_until_the_probation_is_over() {
    let device = Device::start("trial").await;
    let (fleet, pod) = (&device.fleet, &device.pod);
    let first =
        ContainerSpec { stop_signal: Some(StopSignal::Sigusr1), stop_seconds: Some(1), ..spec(&["stay"]) };
    let first = fleet.put("web", &document(first)).await;
    fleet.line("web", first, Phase::Running).await;
    let before = pod.running("web");
    let stop =
        pod.podman(&["inspect", "--format", "{{.Config.StopSignal}} {{.Config.StopTimeout}}", &before[0]]);
    assert_eq!(stop.trim(), "10 1");
    let second = fleet.put("web", &on_probation(4, &[])).await;
    fleet.line("web", second, Phase::Running).await;
    let containers = pod.containers();
    let mut states: Vec<_> = containers
        .iter()
        .map(|one| (one["Names"][0].as_str().unwrap(), one["State"].as_str().unwrap()))
        .collect();
    states.sort_unstable();
    assert_eq!(states, [("iot-trial.web", "running"), ("iot-trial.web.old", "exited")]);
    fleet
        .status("the end of the probation", tells(&format!("revision {second} has passed its probation")))
        .await;
    wait_until("the previous container is removed", || pod.containers().len() == 1).await;

    // A job that ends as it should has not failed.
    let job = ContainerSpec { restart: Restart::Never, probation_seconds: Some(30), ..spec(&["exit", "0"]) };
    let job = fleet.put("web", &document(job)).await;
    let line = fleet.line("web", job, Phase::Completed).await;
    assert_eq!((line.running_revision, line.container.unwrap().exit_code), (None, Some(0)));
    wait_until("the previous container is removed", || pod.containers().len() == 1).await;
}

/// After SIGKILLs at different moments of a takeover and of the way back, the first container runs again.
#[tokio::test(flavor = "multi_thread")]
async fn the_way_back_survives_kills_of_the_agent() {
    let mut device = Device::start("torn").await;
    let good = device.fleet.put("web", &generation(1)).await;
    device.fleet.line("web", good, Phase::Running).await;
    let before = device.pod.running("web");
    for (round, milliseconds) in [150, 400, 650, 900].into_iter().enumerate() {
        let code = (round + 3).to_string();
        let bad = device.fleet.put("web", &on_probation(30, &["exit", &code])).await;
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        device.kill();
        device.up();
        let line = device.fleet.line("web", bad, Phase::RolledBack).await;
        assert!(line.last_error.unwrap().contains(&format!("exit code {code}")));
        wait_until("the first container runs again", || device.pod.running("web") == before).await;
        assert_eq!(device.pod.containers().len(), 1);
    }
}

/// At a boot, podman may be slower than the bus: the first container does not run when a document arrives that cannot be
/// started.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_did_not_run_is_rolled_back_to() {
    let mut device = Device::start("asleep").await;
    let good = device.fleet.put("web", &generation(1)).await;
    device.fleet.line("web", good, Phase::Running).await;
    let before = device.pod.running("web");
    device.kill();
    device.pod.meddle(&["stop", "--time", "0", &before[0]]);
    device.pod.hang(true);
    let file = Volume { name: "data".into(), mount: "/program".into(), read_only: false };
    let stuck = device.fleet.put("web", &document(ContainerSpec { volumes: vec![file], ..spec(&[]) })).await;
    device.up();
    device.fleet.status("the document", |status| status.desired_revision >= stuck).await;
    device.pod.hang(false);
    let line = device.fleet.line("web", stuck, Phase::RolledBack).await;
    assert!(line.last_error.as_ref().unwrap().contains("start the container"), "{line:?}");
    wait_until("the first container runs again", || device.pod.running("web") == before).await;
}
