//! Tests of long or large scenarios (crash loops, an unreliable broker, a thousand deployments, kills at
//! random moments), and of the watchdog.

use std::time::{Duration, Instant};

use agent_protocol::Phase;
use agent_protocol::deployment::{ContainerSpec, Restart};
use futures_util::StreamExt as _;

use crate::device::{Device, document, generation, spec};
use crate::fleet::{Agent, PATIENCE};

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_loop_slows_down_and_sends_few_statuses() {
    let device = Device::start("crash").await;
    let fleet = &device.fleet;
    fleet.status("first status", |_| true).await;
    let mut statuses = fleet.client.subscribe("$KV.agent-status.crash").await.unwrap();
    let started = Instant::now();
    let revision = fleet.put("loop", &document(spec(&["exit", "3"]))).await;
    let once =
        fleet.put("once", &document(ContainerSpec { restart: Restart::Never, ..spec(&["exit", "4"]) })).await;
    let fine = fleet
        .put("fine", &document(ContainerSpec { restart: Restart::OnFailure, ..spec(&["exit", "0"]) }))
        .await;
    for (name, revision, code) in [("once", once, 4), ("fine", fine, 0)] {
        let line = fleet.line(name, revision, Phase::Completed).await;
        assert_eq!((line.container.unwrap().exit_code, line.restarts), (Some(code), 0), "{name}");
    }
    let again = |status: &agent_protocol::DeviceStatus| {
        status.deployment("loop").is_some_and(|line| line.restarts >= 3 && line.phase == Phase::BackingOff)
    };
    let status = fleet.status("three restarts", again).await;
    let line = status.deployment("loop").unwrap();
    assert_eq!(line.desired_revision, revision);
    assert!(line.last_error.as_ref().unwrap().contains("exit code 3"), "{line:?}");
    tokio::time::sleep(Duration::from_secs(20).saturating_sub(started.elapsed())).await;
    let (_, status) = fleet.latest().await.unwrap();
    let elapsed = started.elapsed().as_secs();
    let mut count = 0;
    while let Ok(Some(_)) = tokio::time::timeout(Duration::from_millis(100), statuses.next()).await {
        count += 1;
    }
    assert!((3..=elapsed * 2 / 5 + 6).contains(&count), "{count} statuses in {elapsed} s");
    assert!(status.deployment("loop").unwrap().restarts <= 6, "{status:#?}");
}

/// Restarts the broker twenty times, then stops it for a while.
#[tokio::test(flavor = "multi_thread")]
async fn the_broker_restarts_repeatedly() {
    let mut device = Device::start("flaky").await;
    let mut revision = device.fleet.put("web", &generation(0)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    for number in 1..=20 {
        device.broker.down();
        device.broker.up();
        revision = device.fleet.put("web", &generation(number)).await;
        let deadline = Instant::now() + PATIENCE;
        while device.fleet.latest().await.is_none_or(|(_, status)| status.desired_revision < revision) {
            assert!(Instant::now() < deadline, "restart {number}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    device.fleet.line("web", revision, Phase::Running).await;
    let before = device.pod.running("web");
    device.broker.down();
    tokio::time::sleep(Duration::from_secs(seconds_away())).await;
    assert_eq!(device.pod.running("web"), before, "the container runs without a bus");
    device.broker.up();
    let revision = device.fleet.put("web", &generation(99)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    assert_eq!(device.pod.containers().len(), 1);
}

/// Returns the number of repetitions: `soak` if `cargo xtask soak --agent` runs the tests, otherwise `gate`.
fn repetitions(gate: u32, soak: u32) -> u32 {
    if std::env::var_os("IOT_AGENT_SOAK").is_some() { soak } else { gate }
}

fn seconds_away() -> u64 {
    u64::from(repetitions(15, 180))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_deployments_are_reported() {
    let device = Device::start("many").await;
    let fleet = &device.fleet;
    let revision = fleet.put("web", &generation(1)).await;
    for number in 0..999 {
        fleet.put_text(&format!("d{number}"), r#"{"version":1,"kind":"later","spec":{}}"#).await;
    }
    let all = |status: &agent_protocol::DeviceStatus| {
        status.deployments.len() == 1000
            && status.deployments.iter().filter(|line| line.phase == Phase::Refused).count() == 999
    };
    let status = fleet.status("all thousand", all).await;
    assert_eq!(status.deployments_omitted, 0);
    fleet.line("web", revision, Phase::Running).await;
    let last = fleet.put("web", &generation(2)).await;
    fleet.line("web", last, Phase::Running).await;
}

/// Names that are used once, as those of jobs, leave nothing in the state and in the status.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_names_that_are_deleted_leave_no_trace() {
    let device = Device::start_with("jobs", 2).await;
    let fleet = &device.fleet;
    let revision = fleet.put("web", &generation(1)).await;
    fleet.line("web", revision, Phase::Running).await;
    let sizes = async || {
        let status = fleet.latest().await.unwrap().1;
        let state = std::fs::metadata(device.home.path().join("state")).unwrap().len();
        (status.deployments.len(), state)
    };
    let (_, before) = sizes().await;
    for number in 0..1000 {
        fleet.put_text(&format!("job-{number}"), r#"{"version":1,"kind":"later","spec":{}}"#).await;
    }
    for number in 0..1000 {
        fleet.delete(&format!("job-{number}")).await;
    }
    fleet.gone("job-999", revision + 2000).await;
    fleet.status("no job", |status| status.deployments.len() == 1).await;
    // Each reading contains all the markers.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (lines, after) = sizes().await;
    assert_eq!(lines, 1);
    assert!(after < before + 100, "the state has grown from {before} to {after} bytes");
}

/// The agent notifies systemd that it is ready, alive and stopping. A podman that hangs does not count as a
/// hanging agent.
#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_notified() {
    let mut device = Device::start("notify").await;
    device.agent.take().unwrap().stop();
    let path = device.home.path().join("notify.sock");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let heard = || {
        let mut buffer = [0; 256];
        let count = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    };
    let environment = [("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "900000")];
    let agent = Agent::start_with(device.home.path(), &environment);
    assert!(heard().contains("READY=1"));
    device.pod.hang(true);
    for _ in 0..5 {
        assert!(heard().contains("WATCHDOG=1"));
    }
    device.fleet.heartbeat("a heartbeat while podman hangs", |heartbeat| heartbeat.sequence > 2).await;
    device.pod.hang(false);
    agent.stop();
    while !heard().contains("STOPPING=1") {}
}

/// After SIGKILLs at random moments while documents change, exactly the desired containers exist.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_converges_after_kills_at_random_moments() {
    let mut device = Device::start("killed").await;
    let names = ["a", "b", "c"];
    let (mut desired, mut last) = ([false; 3], 0);
    let mut random = rand_seed();
    for round in 0..repetitions(8, 100) {
        for (which, name) in names.iter().enumerate() {
            match next(&mut random) % 4 {
                0 => {
                    last = device.fleet.put(name, &generation(round)).await;
                    desired[which] = true;
                }
                1 if desired[which] => {
                    device.fleet.delete(name).await;
                    desired[which] = false;
                }
                2 if desired[which] => {
                    device.fleet.purge(name).await;
                    desired[which] = false;
                }
                _ => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(next(&mut random) % 2500)).await;
        device.kill();
        let (_, problem) = iot_agent::store::Store::new(device.home.path(), "killed").load();
        assert_eq!(problem, None, "round {round}");
        device.up();
    }
    let end = device.fleet.put("end", &generation(1)).await;
    device.fleet.line("end", end, Phase::Running).await;
    let reached = |status: &agent_protocol::DeviceStatus| {
        status.desired_revision > last
            && names.iter().zip(desired).all(|(name, desired)| {
                let phase = status.deployment(name).map(|line| line.phase);
                if desired { phase == Some(Phase::Running) } else { phase.is_none() }
            })
    };
    device.fleet.status("the desired state", reached).await;
    for (name, desired) in names.iter().zip(desired) {
        assert_eq!(device.pod.running(name).len(), usize::from(desired), "{name}");
    }
    let wanted = desired.iter().filter(|desired| **desired).count() + 1;
    assert_eq!(device.pod.containers().len(), wanted, "{:#?}", device.pod.containers());
}

/// Returns a random seed, or the one of the variable IOT_AGENT_SEED, which repeats a test.
pub(crate) fn rand_seed() -> u64 {
    let given = std::env::var("IOT_AGENT_SEED").ok().map(|seed| seed.parse().unwrap());
    let random = || std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0);
    // From 0, xorshift64 makes only 0.
    let seed = given.unwrap_or_else(random) | 1;
    eprintln!("seed {seed}");
    seed
}

/// Returns the next number of xorshift64, which is sufficient for random delays.
pub(crate) fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}
