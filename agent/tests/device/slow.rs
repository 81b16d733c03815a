//! Tests of file operations that take very long, as on a slow or busy card. A FIFO takes the place of a file:
//! open(2) blocks until another process opens the other end.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_protocol::{DeviceStatus, Phase, Reply};

use crate::device::{Device, generation};
use crate::fleet::{Agent, PATIENCE};

/// The interval of the watchdog, in which the agent notifies systemd three times. It is a tenth of the interval in the
/// agent's unit.
const WATCHDOG: Duration = Duration::from_secs(3);
/// The time for which a file operation blocks.
const BLOCKED: Duration = Duration::from_secs(7);

/// A file whose next operation blocks.
struct Blocked(PathBuf);

impl Blocked {
    fn new(path: PathBuf) -> Self {
        let made = std::process::Command::new("mkfifo").arg("--mode=0600").arg(&path).status().unwrap();
        assert!(made.success(), "{}", path.display());
        Self(path)
    }

    /// Ends the operation. If the agent syncs the file, it gets an error, because a FIFO cannot be synced.
    fn end(self) {
        // Opened for reading and writing, a FIFO does not block.
        let both = std::fs::File::options().read(true).write(true).open(&self.0).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        // The agent may have renamed the FIFO.
        drop(std::fs::remove_file(&self.0));
        drop(both);
    }
}

/// Checks that the agent notifies systemd's watchdog in time while a file operation blocks.
fn notifies(systemd: &UnixDatagram, what: &str) {
    let begun = Instant::now();
    // The notifications from before the operation are not counted.
    systemd.set_nonblocking(true).unwrap();
    while systemd.recv(&mut [0; 256]).is_ok() {}
    systemd.set_nonblocking(false).unwrap();
    systemd.set_read_timeout(Some(WATCHDOG)).unwrap();
    while begun.elapsed() < BLOCKED {
        let mut message = [0; 256];
        let length = systemd.recv(&mut message);
        let length =
            length.unwrap_or_else(|error| panic!("{what}: no notification in {WATCHDOG:?}: {error}"));
        assert_eq!(message[..length].trim_ascii(), b"WATCHDOG=1", "{what}");
    }
}

fn record_of(home: &Path, image: &str) -> PathBuf {
    std::fs::create_dir_all(home.join("fetching")).unwrap();
    let digest = ring::digest::digest(&ring::digest::SHA256, image.as_bytes());
    let name: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    home.join("fetching").join(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_card_does_not_delay_the_watchdog_and_the_bus() {
    let mut device = Device::start("slow").await;
    let revision = device.fleet.put("web", &generation(1)).await;
    device.fleet.line("web", revision, Phase::Running).await;
    device.agent.take().unwrap().stop();
    let home = device.home.path().to_owned();
    let systemd = UnixDatagram::bind(home.join("notify.sock")).unwrap();
    systemd.set_read_timeout(Some(PATIENCE)).unwrap();
    let (socket, interval) = (home.join("notify.sock"), WATCHDOG.as_micros().to_string());
    let environment = [("NOTIFY_SOCKET", socket.to_str().unwrap()), ("WATCHDOG_USEC", &interval)];
    device.agent = Some(Agent::start_with(&home, &environment));
    let mut message = [0; 256];
    let length = systemd.recv(&mut message).unwrap();
    assert_eq!(message[..length].trim_ascii(), b"READY=1");
    let fleet = &device.fleet;
    let is_back = |status: &DeviceStatus| status.events.iter().any(|event| event.what.starts_with("loaded "));
    fleet.status("the agent is back", is_back).await;

    let state = Blocked::new(home.join("state.new"));
    let changed = fleet.put("web", &generation(2)).await;
    notifies(&systemd, "the desired state is written");
    assert!(matches!(fleet.ask("ping", "").await.unwrap(), Reply::Pong { .. }));
    let last = fleet.heartbeat("a heartbeat", |_| true).await;
    let next = fleet.heartbeat("another heartbeat", |next| next.sequence > last.sequence).await;
    assert!(next.desired_revision < changed, "it is not on the disk");
    state.end();
    fleet.line("web", changed, Phase::Running).await;

    let image = "localhost/absent:1";
    let record = Blocked::new(record_of(&home, image));
    let text = format!(r#"{{"version":1,"kind":"podman-container","spec":{{"image":"{image}"}}}}"#);
    let absent = fleet.put_text("absent", &text).await;
    fleet.line("absent", absent, Phase::Pending).await;
    notifies(&systemd, "the record of a download is read");
    record.end();
    fleet.error("absent", image).await;

    let local = Blocked::new(home.join("status.new"));
    fleet.delete("absent").await;
    fleet.gone("absent", absent + 1).await;
    notifies(&systemd, "the local status is written");
    local.end();
}
