//! The agent against a real nats-server and a real podman: whatever happens, the desired state is reached in the end. Run by
//! `cargo xtask ci`, after a preflight.

#[path = "parts/fleet.rs"]
mod fleet;
#[path = "parts/pod.rs"]
mod pod;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use fleet::{Agent, Broker, Fleet, PATIENCE, users};
use iot_agent::protocol::deployment::{ContainerSpec, Deployment, Document, Limits, Restart, Volume};
use iot_agent::protocol::{ErrorCode, Phase, Reply};
use pod::{IMAGE, Pod};

/// A device with its bus and its podman.
struct Device {
    // Ended first.
    agent: Option<Agent>,
    broker: Broker,
    fleet: Fleet,
    pod: Pod,
    home: tempfile::TempDir,
}

impl Device {
    async fn start(name: &str) -> Self {
        let broker = Broker::start(&users(name));
        let fleet = Fleet::enter(&broker, name).await;
        let mut device =
            Self { broker, fleet, pod: Pod::start(), home: tempfile::tempdir().unwrap(), agent: None };
        write_config(&device, pod::archives());
        device.up();
        device
    }

    fn up(&mut self) {
        self.agent = Some(Agent::start(self.home.path()));
    }

    fn kill(&mut self) {
        self.agent.take().unwrap().kill();
    }
}

fn write_config(device: &Device, archives: &Path) {
    let home = device.home.path();
    let text = format!(
        "[agent]\ndevice_id = \"{name}\"\nheartbeat_seconds = 1\nstate_directory = \"{home}\"\nstatus_file = \"{home}/status.json\"\n\
         [credentials]\ntype = \"toml-shared\"\nusername = \"{name}\"\npassword = \"device-s3cret\"\n\
         [nats]\nurls = [\"nats://127.0.0.1:{port}\"]\n[podman]\nsocket = \"{socket}\"\nimage_archives = \"{archives}\"\n",
        name = device.fleet.device,
        home = home.display(),
        port = device.broker.port,
        socket = device.pod.socket().display(),
        archives = archives.display(),
    );
    let path = home.join("config.toml");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn spec(words: &[&str]) -> ContainerSpec {
    let limits = Limits { open_files: Some(256), ..Limits::default() };
    let command = words.iter().map(|word| (*word).to_owned()).collect();
    ContainerSpec { command, limits, ..ContainerSpec::of(IMAGE) }
}

fn document(spec: ContainerSpec) -> Document {
    Document::of(Deployment::PodmanContainer(spec))
}

/// A container that says which generation it is of.
fn generation(number: u32) -> Document {
    let mut spec = spec(&[]);
    spec.env.insert("GENERATION".into(), number.to_string());
    document(spec)
}

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
    assert!(after.len() == 1 && after != before, "another document, another container");
    assert!(pod.podman(&["logs", &after[0]]).contains("by the first"), "its volume stayed");

    fleet.delete("web").await;
    let line = fleet.line("web", second + 1, Phase::Removed).await;
    assert_eq!(line.container, None);
    assert!(pod.containers().is_empty());
    assert!(pod.podman(&["volume", "ls", "--quiet"]).contains("iot-web.data"), "a delete keeps volumes");

    fleet.purge("web").await;
    fleet.status("purged", |status| status.deployment("web").is_none()).await;
    assert_eq!(pod.podman(&["volume", "ls", "--quiet"]).trim(), "", "a purge does not");
}

/// Stopped, removed, renamed, doubled and paused by somebody else: back as desired each time; and what is not the agent's is left
/// alone.
#[tokio::test(flavor = "multi_thread")]
async fn what_happens_behind_its_back_is_put_right() {
    let device = Device::start("drift").await;
    let (fleet, pod) = (&device.fleet, &device.pod);
    pod.podman(&[
        "load",
        "--quiet",
        "--input",
        pod::archives().join("localhost_iot-agent-test_1.tar").to_str().unwrap(),
    ]);
    // podman(1) itself asks for the highest limits too.
    let run = ["run", "--detach", "--ulimit", "nofile=64:64", "--ulimit", "nproc=64:64"];
    let foreign = pod.podman(&[&run[..], &["--name", "foreign", IMAGE]].concat());
    let revision = fleet.put("web", &generation(1)).await;
    fleet.line("web", revision, Phase::Running).await;
    let ids = || pod.running("web");
    let settled = |what: &'static str, ids: Vec<String>| async move {
        let deadline = Instant::now() + PATIENCE;
        while pod.running("web").len() != 1 || pod.running("web") == ids {
            assert!(Instant::now() < deadline, "{what}: {:?}", pod.containers());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    for (what, arguments) in [
        ("stopped", &["stop", "--time", "0"][..]),
        ("killed", &["kill"]),
        ("removed", &["rm", "--force", "--time", "0"]),
    ] {
        let before = ids();
        pod.podman(&[arguments, &[before[0].as_str()]].concat());
        settled(what, if what == "removed" { before } else { Vec::new() }).await;
    }
    let id = ids()[0].clone();
    pod.podman(&["rename", &id, "mine-now"]);
    let deadline = Instant::now() + PATIENCE;
    while pod.podman(&["inspect", "--format", "{{.Name}}", &id]).trim() != "iot-web" {
        assert!(Instant::now() < deadline, "it keeps its wrong name");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let labels = pod.podman(&[
        "inspect",
        "--format",
        "{{range $k, $v := .Config.Labels}}--label {{$k}}={{$v}} {{end}}",
        &id,
    ]);
    let twin: Vec<&str> = run.into_iter().chain(labels.split_whitespace()).chain([IMAGE]).collect();
    pod.podman(&twin);
    let deadline = Instant::now() + PATIENCE;
    while pod.containers().len() != 2 {
        assert!(Instant::now() < deadline, "the twin stays: {:?}", pod.containers());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(pod.podman(&["ps", "--quiet", "--no-trunc"]).contains(foreign.trim()), "the foreign one runs on");
    let told = |status: &iot_agent::protocol::DeviceStatus| {
        ["is gone, and is made again", "gets iot-web back", "1 container removed"]
            .iter()
            .all(|words| status.events.iter().any(|event| event.what.contains(words)))
    };
    fleet.status("word of it", told).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_bus_the_disk_says_what_to_run() {
    let mut device = Device::start("offline").await;
    let revision = device.fleet.put("web", &generation(1)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    device.kill();
    device.broker.down();
    // As after a power cut: no container runs; here none is there any more.
    device.pod.podman(&["rm", "--force", "--all", "--time", "0"]);
    device.up();
    let deadline = Instant::now() + PATIENCE;
    while device.pod.running("web").len() != 1 {
        assert!(Instant::now() < deadline, "it is not brought up from the disk");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let status = iot_agent::status::describe(&device.home.path().join("status.json")).unwrap();
    assert!(!status.1 && status.0.contains("bus: not connected"), "{}", status.0);
    let before = device.pod.running("web");
    device.broker.up();
    let revision = device.fleet.put("web", &generation(2)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    assert_ne!(device.pod.running("web"), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_state_is_set_aside_told_and_rebuilt() {
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
    let told = |status: &iot_agent::protocol::DeviceStatus| {
        status.events.iter().any(|event| event.what.contains("state.corrupt"))
            && status.deployment("web").is_some_and(|line| line.phase == Phase::Running)
    };
    device.fleet.status("the corrupt state", told).await;
    assert_eq!(
        device.pod.running("web"),
        before,
        "what ran goes on: nothing was an orphan while nothing was known"
    );
    assert!(state.exists() && device.home.path().join("state.corrupt").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_run_is_told_and_nothing_crashes() {
    let device = Device::start("bad").await;
    let fleet = &device.fleet;
    let good = fleet.put("good", &generation(1)).await;
    let table = [
        ("no-json", "{".to_owned(), Phase::Refused, "no JSON"),
        (
            "no-kind",
            r#"{"version":1,"kind":"wasm","spec":{}}"#.to_owned(),
            Phase::Refused,
            "known: podman-container",
        ),
        (
            "no-version",
            r#"{"version":9,"kind":"podman-container"}"#.to_owned(),
            Phase::Refused,
            "version 9 is unknown",
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
    // What ran is stopped when its document cannot be run any more, and is back with one that can.
    let refused = fleet.put_text("good", r#"{"version":2}"#).await;
    fleet.line("good", refused, Phase::Refused).await;
    assert!(device.pod.running("good").is_empty());
    let again = fleet.put("good", &generation(2)).await;
    fleet.line("good", again, Phase::Running).await;
    // An image that comes later is found without being told of.
    let revision = fleet.put("late", &document(ContainerSpec::of("localhost/late:1"))).await;
    fleet.line("late", revision, Phase::BackingOff).await;
    device.pod.podman(&["tag", IMAGE, "localhost/late:1"]);
    fleet.line("late", revision, Phase::Running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_loop_slows_down_and_writes_no_storm() {
    let device = Device::start("crash").await;
    let fleet = &device.fleet;
    fleet.status("first status", |_| true).await;
    let (before, _) = fleet.latest().await.unwrap();
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
    let again = |status: &iot_agent::protocol::DeviceStatus| {
        status.deployment("loop").is_some_and(|line| line.restarts >= 3 && line.phase == Phase::BackingOff)
    };
    let status = fleet.status("three restarts", again).await;
    let line = status.deployment("loop").unwrap();
    assert_eq!(line.desired_revision, revision);
    assert!(line.last_error.as_ref().unwrap().contains("exit code 3"), "{line:?}");
    tokio::time::sleep(Duration::from_secs(20).saturating_sub(started.elapsed())).await;
    let (after, status) = fleet.latest().await.unwrap();
    let elapsed = started.elapsed().as_secs();
    // Each write takes a revision; the three Puts are in another stream.
    assert!(after - before <= elapsed / 2 + 2, "{} statuses in {elapsed} s", after - before);
    assert!(status.deployment("loop").unwrap().restarts <= 6, "{status:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_are_answered_with_typed_errors() {
    let mut device = Device::start("desk").await;
    let fleet = &device.fleet;
    let revision = fleet.put("web", &generation(7)).await;
    fleet.line("web", revision, Phase::Running).await;
    let Reply::Pong { device_id, .. } = fleet.ask("ping", "").await.unwrap() else { panic!() };
    assert_eq!(device_id, "desk");
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
        let Reply::Error { code: told, .. } = fleet.ask(command, payload).await.unwrap() else { panic!() };
        assert_eq!(told, code, "{payload}");
    }
    let Reply::UnknownCommand { known, .. } = fleet.ask("reboot", "").await.unwrap() else { panic!() };
    assert!(known.contains(&"logs".to_owned()));
    device.pod.stop_service();
    let Reply::Error { code, .. } = fleet.ask("logs", r#"{"deployment":"web"}"#).await.unwrap() else {
        panic!()
    };
    assert_eq!(code, ErrorCode::Podman);
    device.pod.start_service();
    // An offline device is told from a slow one: nobody is subscribed.
    device.agent.take().unwrap().stop();
    let error = fleet.ask("ping", "").await.unwrap_err();
    assert_eq!(error.kind(), async_nats::client::RequestErrorKind::NoResponders);
}

/// Twenty restarts in a row, then away for a while with a change made meanwhile by the fleet's next broker.
#[tokio::test(flavor = "multi_thread")]
async fn the_broker_comes_and_goes() {
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
    assert_eq!(device.pod.running("web"), before, "it runs on without a bus");
    device.broker.up();
    let revision = device.fleet.put("web", &generation(99)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    assert_eq!(device.pod.containers().len(), 1);
}

/// How often something is repeated; `cargo xtask soak --agent` asks for more than a gate has time for.
fn repetitions(gate: u32, soak: u32) -> u32 {
    if std::env::var_os("IOT_AGENT_SOAK").is_some() { soak } else { gate }
}

fn seconds_away() -> u64 {
    u64::from(repetitions(15, 180))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_deployments_are_listed() {
    let device = Device::start("many").await;
    let fleet = &device.fleet;
    let revision = fleet.put("web", &generation(1)).await;
    for number in 0..999 {
        fleet.put_text(&format!("d{number}"), r#"{"version":1,"kind":"later","spec":{}}"#).await;
    }
    let all = |status: &iot_agent::protocol::DeviceStatus| {
        status.deployments.len() == 1000
            && status.deployments.iter().filter(|line| line.phase == Phase::Refused).count() == 999
    };
    let status = fleet.status("all thousand", all).await;
    assert_eq!(status.deployments_omitted, 0);
    fleet.line("web", revision, Phase::Running).await;
    let started = Instant::now();
    let last = fleet.put("web", &generation(2)).await;
    fleet.line("web", last, Phase::Running).await;
    assert!(
        started.elapsed() < Duration::from_secs(15),
        "among a thousand, one change took {:?}",
        started.elapsed()
    );
}

/// Ready once, alive again and again, and told when it stops; podman that hangs is not the agent's own trouble.
#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_told() {
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
    device.fleet.status("a status while podman hangs", |status| status.sequence > 2).await;
    device.pod.hang(false);
    agent.stop();
    while !heard().contains("STOPPING=1") {}
}

/// kill -9 at random moments while documents change: in the end there is what is desired, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_random_moments_it_gets_there_in_the_end() {
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
        let found = iot_agent::store::Store::new(device.home.path(), "killed").load().unwrap();
        assert_eq!(found.problem, None, "round {round}");
        device.up();
    }
    let end = device.fleet.put("end", &generation(1)).await;
    device.fleet.line("end", end, Phase::Running).await;
    let reached = |status: &iot_agent::protocol::DeviceStatus| {
        status.desired_revision > last
            && names.iter().zip(desired).all(|(name, desired)| {
                let phase = status.deployment(name).map(|line| line.phase);
                if desired {
                    phase == Some(Phase::Running)
                } else {
                    matches!(phase, None | Some(Phase::Removed))
                }
            })
    };
    device.fleet.status("what is desired", reached).await;
    for (name, desired) in names.iter().zip(desired) {
        assert_eq!(device.pod.running(name).len(), usize::from(desired), "{name}");
    }
    let wanted = desired.iter().filter(|desired| **desired).count() + 1;
    assert_eq!(device.pod.containers().len(), wanted, "{:#?}", device.pod.containers());
}

fn rand_seed() -> u64 {
    let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0) | 1;
    eprintln!("seed {seed}");
    seed
}

/// xorshift64: enough for moments.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}
