//! The traffic of an idle device, counted at the socket between the agent and the broker.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent_protocol::status::{MAX_EVENTS, MAX_EVENTS_TEXT, MAX_TEXT};
use agent_protocol::{DeviceStatus, Phase};

use crate::device::{Device, generation, password_login, secret, write_config};
use crate::fleet::{self, Agent, Broker, Fleet, wait_until};

/// The acceleration of the test: the intervals of its configuration are so many times shorter than the defaults.
const FASTER: u32 = 30;
const DAY: f64 = 24.0 * 3600.0;
/// The most bytes that a device may send in 24 idle hours, and the most that it may receive.
const LIMIT: f64 = 2e6;
/// The agent pings the broker at this interval, which the test does not shorten.
const PING_SECONDS: f64 = 10.0;

#[derive(Debug, Clone, Copy, Default)]
struct Traffic {
    sent: u64,
    received: u64,
}

/// A proxy in front of the broker that counts the bytes of all connections.
struct Meter {
    port: u16,
    counted: Arc<Mutex<Traffic>>,
}

impl Meter {
    fn start(broker: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let counted = Arc::new(Mutex::new(Traffic::default()));
        let total = Arc::clone(&counted);
        std::thread::spawn(move || {
            for agent in listener.incoming().flatten() {
                let broker = TcpStream::connect(("127.0.0.1", broker)).unwrap();
                let (agent_out, broker_out) = (agent.try_clone().unwrap(), broker.try_clone().unwrap());
                let (sent, received) = (Arc::clone(&total), Arc::clone(&total));
                std::thread::spawn(move || {
                    copy(agent, broker_out, |count| sent.lock().unwrap().sent += count)
                });
                std::thread::spawn(move || {
                    copy(broker, agent_out, |count| received.lock().unwrap().received += count);
                });
            }
        });
        Self { port, counted }
    }

    fn read(&self) -> Traffic {
        *self.counted.lock().unwrap()
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, count: impl Fn(u64)) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        count(length as u64);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    // The other side may have closed the connection already.
    drop(to.shutdown(Shutdown::Both));
}

/// Returns the bytes of one day, if `bytes` were counted in so many seconds of the accelerated test.
fn per_day(bytes: u64, seconds: f64) -> f64 {
    // The pings are not accelerated, so the product with the acceleration contains too few of them.
    let missing_pings = (DAY - DAY / f64::from(FASTER)) / PING_SECONDS * "PING\r\n".len() as f64;
    bytes as f64 * DAY / (seconds * f64::from(FASTER)) + missing_pings
}

/// Waits until another status is stored.
async fn next_status(fleet: &Fleet) -> u64 {
    let before = fleet.latest().await.unwrap().1.sequence;
    fleet.status("the next status", |status| status.sequence > before).await.sequence
}

/// Returns a document whose image does not exist.
fn absent(number: usize) -> String {
    format!(r#"{{"version":1,"kind":"podman-container","spec":{{"image":"localhost/absent:{number}"}}}}"#)
}

/// The device runs three deployments, and its list of events is full.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_day_costs_at_most_two_megabytes() {
    let mut device = Device::start("idle").await;
    device.agent.take().unwrap().stop();
    let meter = Meter::start(device.broker.server.port);
    let path = device.home.path().join("config.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replace(&device.broker.url(), &format!("nats://127.0.0.1:{}", meter.port)).replace(
        "resync_seconds = 600",
        &format!("resync_seconds = {0}\nstatus_seconds = {0}", 600 / FASTER),
    );
    assert!(text.contains("heartbeat_seconds = 1\n") && text.contains("status_seconds = 20\n"), "{text}");
    secret(device.home.path(), "config.toml", &text);
    device.up();
    let fleet = &device.fleet;
    for name in ["first", "second", "third"] {
        let mut last = 0;
        for number in 0..5 {
            last = fleet.put(name, &generation(number)).await;
        }
        fleet.line(name, last, Phase::Running).await;
    }
    for number in 0..MAX_EVENTS {
        fleet.put_text(&format!("absent-{number}"), &absent(number)).await;
    }
    let is_full = |status: &DeviceStatus| {
        let text: usize = status.events.iter().map(|event| event.what.len()).sum();
        status.events.len() == MAX_EVENTS || text > MAX_EVENTS_TEXT - MAX_TEXT
    };
    fleet.status("a full list of events", is_full).await;
    for number in 0..MAX_EVENTS {
        fleet.delete(&format!("absent-{number}")).await;
    }
    fleet.status("the three deployments", |status| status.deployments.len() == 3).await;
    wait_until("the agent's start", || meter.read().received > 0).await;

    next_status(fleet).await;
    let first = next_status(fleet).await;
    let (begun, before) = (Instant::now(), meter.read());
    let mut last = first;
    for _ in 0..3 {
        last = next_status(fleet).await;
    }
    let (seconds, after) = (begun.elapsed().as_secs_f64(), meter.read());
    let [sent, received] =
        [after.sent - before.sent, after.received - before.received].map(|bytes| per_day(bytes, seconds));
    let status = fleet.latest().await.unwrap().1;
    let size = serde_json::to_vec(&status).unwrap().len();
    eprintln!(
        "{sent:.0} bytes sent and {received:.0} received in 24 hours; a status has {size} bytes and {} events; {} documents in {seconds:.1} s",
        status.events.len(),
        last - first
    );
    assert!(last - first >= 45, "the heartbeats are missing: {} documents in {seconds} s", last - first);
    assert!(sent <= LIMIT, "an idle device sends {sent:.0} bytes in 24 hours");
    assert!(received <= LIMIT, "an idle device receives {received:.0} bytes in 24 hours");
}

/// The brokers of earlier agents do not allow a device to store heartbeats.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_refuses_heartbeats_keeps_the_device() {
    const DEVICE: &str = "without-beats";
    let heartbeat = format!("\"$KV.agent-status.{DEVICE}.heartbeat\", ");
    let users = fleet::users(DEVICE);
    assert!(users.contains(&heartbeat), "{users}");
    let broker = Broker::start(&users.replace(&heartbeat, ""));
    let fleet = Fleet::enter(&broker, DEVICE).await;
    let home = tempfile::tempdir().unwrap();
    let podman = format!("socket = {:?}", home.path().join("podman.sock"));
    let nats = format!("urls = [{:?}]", broker.url());
    write_config(home.path(), DEVICE, &password_login(DEVICE), &nats, &podman);
    let agent = Agent::start(home.path());
    let lost = || agent.log().matches("has not stored a Heartbeat").count();
    wait_until("three heartbeats are lost", || lost() == 3).await;
    let revision = fleet.put("web", &generation(1)).await;
    fleet.status("the deployment", |status| status.desired_revision >= revision).await;
    tokio::time::sleep(Duration::from_secs(15)).await;
    assert_eq!(lost(), 3, "heartbeats are as rare as statuses");
    assert_eq!(agent.log().matches("connected to the bus").count(), 1, "{}", agent.log());
}
