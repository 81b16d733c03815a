//! Tests of the faults of the broker with a device.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::TcpStream;

use async_nats::{ConnectErrorKind, Event};

use super::device::{ABSENCE, Device};
use super::*;

fn log(broker: &Broker) -> String {
    std::fs::read_to_string(&broker.server.log).unwrap()
}

fn report(broker: &Broker, device: &Device, sequence: u64) {
    let status = DeviceStatus { schema: protocol::STATUS_SCHEMA, sequence, ..DeviceStatus::default() };
    let put = device.client.publish("$KV.agent-status.dev-1", serde_json::to_vec(&status).unwrap().into());
    broker.runtime.block_on(put).unwrap();
}

#[test]
fn a_paused_broker_accepts_connections_and_answers_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut broker = started(directory.path());
    broker.open_line().unwrap();
    let mut device = Device::connect(&broker);
    report(&broker, &device, 1);
    assert_eq!(sequences(&broker, 1), [1]);
    broker.pause().unwrap();
    assert!(device.hears_nothing(&broker));
    let mut raw = TcpStream::connect(("127.0.0.1", broker.server.port)).unwrap();
    raw.set_read_timeout(Some(ABSENCE)).unwrap();
    assert_eq!(raw.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    let late = Device::try_with(&broker, Device::options(&broker).connection_timeout(ABSENCE)).err().unwrap();
    assert_eq!(late.kind(), ConnectErrorKind::TimedOut, "{late:#}");
    assert_eq!(device.events(), []);
    broker.go_on().unwrap();
    assert_eq!(broker.latest().unwrap().unwrap().status.sequence, 1);
    device.asks(&broker);
    report(&broker, &device, 2);
    assert_eq!(sequences(&broker, 2), [1, 2]);

    broker.pause().unwrap();
    broker.go_away().unwrap();
    assert!(log(&broker).contains("Server Exiting"), "a paused broker ends by SIGTERM: {}", log(&broker));
    let stopped = broker.pause().unwrap_err();
    assert!(is_of_host(&stopped, "the broker is stopped"), "{stopped:#}");
    broker.come_back().unwrap();
    signal_server(directory.path(), Signal::KILL);
    wait_for_error(|| broker.check());
    for ended in [broker.pause(), broker.go_on(), broker.revoke_login()] {
        let ended = ended.unwrap_err();
        assert!(is_of_host(&ended, "the broker ended: signal: 9"), "{ended:#}");
    }
}

#[test]
fn a_revoked_login_is_refused_until_it_is_allowed_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut broker = started(directory.path());
    broker.open_line().unwrap();
    let mut device = Device::connect(&broker);
    report(&broker, &device, 1);
    assert_eq!(sequences(&broker, 1), [1]);
    broker.revoke_login().unwrap();
    device.waits_for(&broker, &Event::Disconnected);
    let refused = |broker: &Broker| {
        let error = Device::try_with(broker, Device::options(broker)).err().unwrap();
        assert_eq!(error.kind(), ConnectErrorKind::AuthorizationViolation, "{error:#}");
    };
    refused(&broker);
    assert!(broker.refusals() > 0);
    assert_eq!(broker.latest().unwrap().unwrap().status.sequence, 1, "the fleet's login is still valid");
    broker.go_away().unwrap();
    broker.come_back().unwrap();
    refused(&broker);
    broker.allow_login().unwrap();
    let device = Device::connect(&broker);
    device.asks(&broker);
    report(&broker, &device, 2);
    assert_eq!(sequences(&broker, 2), [1, 2]);
    broker.revoke_login().unwrap();
    broker.allow_login().unwrap();
    let device = Device::connect(&broker);
    report(&broker, &device, 3);
    assert_eq!(sequences(&broker, 3), [1, 2, 3], "the statuses are still followed");

    broker.go_away().unwrap();
    broker.revoke_login().unwrap();
    broker.come_back().unwrap();
    refused(&broker);
    broker.stop().unwrap();
}

#[test]
fn a_broker_that_does_not_reload_is_the_hosts_fault() {
    let directory = tempfile::tempdir().unwrap();
    let mut broker = started(directory.path());
    broker.certificates.server = "tls { no such setting }\n".into();
    let error = broker.revoke_login().unwrap_err();
    assert!(is_of_host(&error, "reload the broker's configuration"), "{error:#}");
}

#[test]
fn an_emptied_bucket_has_no_markers_and_is_refilled_with_the_same_documents() {
    let directory = tempfile::tempdir().unwrap();
    let broker = started(directory.path());
    assert_eq!(broker.refill_bucket(&broker.empty_bucket().unwrap()).unwrap(), BTreeMap::new());
    let other = Document::of(Deployment::PodmanContainer(ContainerSpec::of("localhost/b:1")));
    broker.desire("b", &other).unwrap();
    broker.desire("a", &document()).unwrap();
    broker.desire("c", &document()).unwrap();
    let last = broker.desire_no_more("c").unwrap();
    let contents = broker.empty_bucket().unwrap();
    let entry = |name: &str| {
        let entry = broker.runtime.block_on(broker.fleet.desired.entry(format!("dev-1.{name}"))).unwrap();
        entry.map(|entry| (entry.revision, entry.value))
    };
    assert_eq!(["a", "b", "c"].map(entry), [None, None, None]);
    let revisions = broker.refill_bucket(&contents).unwrap();
    assert_eq!(revisions, BTreeMap::from([("b".to_owned(), last + 1), ("a".to_owned(), last + 2)]));
    assert_eq!(entry("b"), Some((last + 1, other.to_bytes().into())));
    assert_eq!(entry("a"), Some((last + 2, document().to_bytes().into())));
    assert_eq!(entry("c"), None);
    broker.stop().unwrap();
}

#[test]
fn a_broker_goes_back_to_what_was_kept() {
    let (directory, kept) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut broker = started(directory.path());
    broker.open_line().unwrap();
    let before = broker.desire("a", &document()).unwrap();
    broker.keep(kept.path()).unwrap();
    let port = broker.port();
    broker.desire("b", &document()).unwrap();
    broker.revoke_login().unwrap();
    broker.line().unwrap().set(Passage::Refused).unwrap();
    broker.pause().unwrap();
    broker.go_back(kept.path()).unwrap();
    assert_eq!(broker.port(), port);
    assert_eq!(broker.desire_no_more("a").unwrap(), before + 1, "the later document is not there");
    let device = Device::connect(&broker);
    device.asks(&broker);
    broker.go_away().unwrap();
    broker.go_back(kept.path()).unwrap();
    assert_eq!(broker.desire_no_more("a").unwrap(), before + 1);
    broker.stop().unwrap();
}
