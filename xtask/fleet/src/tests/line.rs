//! Tests of the line with a device that connects through it.

use std::net::TcpStream;
use std::time::Instant;

use async_nats::{ConnectErrorKind, Event};

use super::device::{ABSENCE, Device, EVENT, REQUEST};
use super::*;

/// The size of the message that a limited line carries.
const MESSAGE: usize = 100_000;

fn with_line(directory: &Path) -> Broker {
    let mut broker = started(directory);
    broker.open_line().unwrap();
    broker
}

fn set(broker: &Broker, passage: Passage) {
    broker.line().unwrap().set(passage).unwrap();
}

fn accepted(broker: &Broker) -> u64 {
    broker.line().unwrap().accepted()
}

/// Waits until the line has accepted this number of connections.
fn wait_for_accepted(broker: &Broker, count: u64) {
    let deadline = Instant::now() + EVENT;
    while accepted(broker) < count {
        assert!(Instant::now() < deadline, "{} connections instead of {count}", accepted(broker));
        std::thread::sleep(limits::POLL);
    }
}

#[test]
fn a_device_connects_through_the_line_and_the_fleet_does_not() {
    let directory = tempfile::tempdir().unwrap();
    let mut broker = started(directory.path());
    assert!(broker.line().is_none());
    let server = broker.port();
    broker.open_line().unwrap();
    broker.open_line().unwrap_err();
    let port = broker.port();
    assert_ne!(port, server);
    assert!(broker.agent_config("h").contains(&format!("tls://h:{port}\"")));
    Device::connect(&broker).asks(&broker);
    broker.go_away().unwrap();
    broker.come_back().unwrap();
    assert_eq!((broker.port(), broker.server.port), (port, server));
    Device::connect(&broker).asks(&broker);
    assert_eq!(accepted(&broker), 2);
    assert_eq!(broker.latest().unwrap(), None);
    broker.stop().unwrap();
    let refused = TcpStream::connect(("127.0.0.1", port)).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_delayed_line_delays_requests_and_answers() {
    const DELAY: Duration = Duration::from_millis(300);
    let directory = tempfile::tempdir().unwrap();
    let broker = with_line(directory.path());
    let device = Device::connect(&broker);
    device.asks(&broker);
    set(&broker, Passage::Delayed(DELAY));
    let taken = device.asks(&broker);
    assert!(taken >= 2 * DELAY, "{taken:?}");
    let start = Instant::now();
    Device::connect(&broker).asks(&broker);
    assert!(
        start.elapsed() >= 6 * DELAY,
        "TCP's own handshake is not delayed, but TLS is: {:?}",
        start.elapsed()
    );
    broker.stop().unwrap();
}

#[test]
fn a_limited_line_limits_both_directions() {
    const RATE: u64 = 40_000;
    let directory = tempfile::tempdir().unwrap();
    let broker = with_line(directory.path());
    let device = Device::connect(&broker);
    set(&broker, Passage::Limited(RATE));
    for (from, to, subject) in [
        (&device.client, &broker.fleet.client, "$KV.agent-status.dev-1"),
        (&broker.fleet.client, &device.client, "device-commands.dev-1.ping"),
    ] {
        broker.runtime.block_on(async {
            let mut heard = to.subscribe(subject).await.unwrap();
            // The answer to a later request shows that the broker knows the subscription.
            to.request(REQUEST, "".into()).await.unwrap();
            let start = Instant::now();
            from.publish(subject, vec![b'x'; MESSAGE].into()).await.unwrap();
            let message = timeout(EVENT, heard.next()).await.unwrap().unwrap();
            assert_eq!(message.payload.len(), MESSAGE);
            let least = Duration::from_millis(2400);
            assert!(start.elapsed() >= least, "{subject}: {:?}", start.elapsed());
        });
    }
    broker.stop().unwrap();
}

#[test]
fn a_silent_line_leaves_the_device_half_open() {
    const PING: Duration = Duration::from_secs(2);
    let directory = tempfile::tempdir().unwrap();
    let broker = with_line(directory.path());
    let mut pinging = Device::try_with(&broker, Device::options(&broker).ping_interval(PING)).unwrap();
    let mut patient = Device::connect(&broker);
    set(&broker, Passage::Silent);
    let start = Instant::now();
    assert!(patient.hears_nothing(&broker));
    let late = Device::try_with(&broker, Device::options(&broker).connection_timeout(ABSENCE)).err().unwrap();
    assert_eq!(late.kind(), ConnectErrorKind::TimedOut, "{late:#}");
    assert_eq!(pinging.waits_for(&broker, &Event::Disconnected), []);
    assert!(start.elapsed() >= PING, "the client gives up after two pings: {:?}", start.elapsed());
    // The first three connections are those of the devices, and the next ones are attempts to connect again.
    wait_for_accepted(&broker, 4);
    set(&broker, Passage::Open);
    Device::connect(&broker).asks(&broker);
    pinging.waits_for(&broker, &Event::Connected);
    pinging.asks(&broker);
    assert!(patient.hears_nothing(&broker), "the connection does not recover");
    assert_eq!(patient.events(), []);
    broker.line().unwrap().cut();
    patient.waits_for(&broker, &Event::Disconnected);
    patient.waits_for(&broker, &Event::Connected);
    patient.asks(&broker);
    broker.stop().unwrap();
}

#[test]
fn a_refusing_line_keeps_its_port_until_it_is_open() {
    let directory = tempfile::tempdir().unwrap();
    let broker = with_line(directory.path());
    let mut device = Device::connect(&broker);
    set(&broker, Passage::Refused);
    device.waits_for(&broker, &Event::Disconnected);
    let refused = Device::try_with(&broker, Device::options(&broker)).err().unwrap();
    assert_eq!(refused.kind(), ConnectErrorKind::Io, "{refused:#}");
    assert!(format!("{:?}", refused).contains("ConnectionRefused"), "{refused:?}");
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], broker.port()));
    let taken = socket.bind(&address.into()).expect_err("the port is reserved");
    assert_eq!((taken.kind(), accepted(&broker)), (std::io::ErrorKind::AddrInUse, 1));
    broker.desire("a", &document()).unwrap();
    set(&broker, Passage::Open);
    device.waits_for(&broker, &Event::Connected);
    device.asks(&broker);
    broker.stop().unwrap();
}

#[test]
fn a_cut_connection_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let broker = with_line(directory.path());
    let mut device = Device::connect(&broker);
    for cuts in 1..=3 {
        broker.line().unwrap().cut();
        device.waits_for(&broker, &Event::Disconnected);
        device.waits_for(&broker, &Event::Connected);
        device.asks(&broker);
        assert_eq!(accepted(&broker), 1 + cuts);
    }
    broker.stop().unwrap();
}

#[test]
fn the_portal_has_a_certificate_of_another_authority() {
    let directory = tempfile::tempdir().unwrap();
    let mut broker = started(directory.path());
    broker.open_portal().expect_err("there is no line");
    broker.open_line().unwrap();
    let mut device = Device::connect(&broker);
    broker.open_portal().unwrap();
    broker.open_portal().unwrap();
    set(&broker, Passage::Portal);
    device.waits_for(&broker, &Event::Disconnected);
    let distrusted = Device::try_with(&broker, Device::options(&broker)).err().unwrap();
    assert!(format!("{distrusted:?}").contains("UnknownIssuer"), "{distrusted:?}");
    // The device tries again and again, and never trusts the portal.
    let before = accepted(&broker);
    wait_for_accepted(&broker, before + 2);
    assert!(!device.events().contains(&Event::Connected));
    let owned = || xtask_core::processes::owned(directory.path()).len();
    assert_eq!(owned(), 2, "the portal is recorded");
    broker.check().unwrap();
    set(&broker, Passage::Open);
    device.waits_for(&broker, &Event::Connected);
    device.asks(&broker);
    broker.stop().unwrap();
    assert_eq!(owned(), 0, "the portal has ended");
}

#[test]
fn a_kept_broker_has_the_same_line() {
    let (first, kept, second) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut broker = with_line(first.path());
    let ports = (broker.port(), broker.server.port);
    let config = broker.agent_config("h");
    let mut device = Device::connect(&broker);
    broker.keep(kept.path()).unwrap();
    device.waits_for(&broker, &Event::Connected);
    drop(device);
    broker.stop().unwrap();
    let taken = std::net::TcpListener::bind(("127.0.0.1", ports.0)).unwrap();
    let error =
        Broker::resume(second.path(), kept.path(), &Ui::quiet()).err().expect("the line's port is taken");
    assert!(Kind::Host.is(&error), "{error:#}");
    drop(taken);
    let again = tempfile::tempdir().unwrap();
    let resumed = Broker::resume(again.path(), kept.path(), &Ui::quiet()).unwrap();
    assert_eq!((resumed.port(), resumed.server.port), ports);
    assert_eq!((resumed.agent_config("h"), accepted(&resumed)), (config, 0));
    Device::connect(&resumed).asks(&resumed);
    drop(resumed);
    let refused = TcpStream::connect(("127.0.0.1", ports.0)).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
}
