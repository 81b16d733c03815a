//! Tests with a real nats-server: the data that survive a restart of the server, and the rights of a device.

mod device;
mod line;
mod registry;
mod trouble;

use agent_protocol::{ContainerSpec, Deployment};
use async_nats::jetstream::consumer::push::OrderedConfig;
use futures_util::StreamExt as _;
use rustix::process::Signal;
use serde_json::json;
use xtask_core::error::Kind;

use super::*;

fn started(directory: &Path) -> Broker {
    Broker::start(directory, "dev-1", None, &Ui::quiet()).unwrap()
}

fn document() -> Document {
    Document::of(Deployment::PodmanContainer(ContainerSpec::of("localhost/a:1")))
}

#[test]
fn a_real_broker_starts_is_asked_and_is_gone_afterwards() {
    let directory = tempfile::tempdir().unwrap();
    let broker = started(directory.path());
    broker.check().unwrap();
    assert_eq!((broker.latest().unwrap(), broker.latest_heartbeat().unwrap()), (None, None));
    let unheard = format!("{:#}", broker.command("ping", Vec::new()).unwrap_err());
    assert!(unheard.contains("device-commands.dev-1.ping"), "no agent is there: {unheard}");
    assert_eq!(xtask_core::processes::processes_naming(directory.path()).len(), 1);
    assert_eq!(xtask_core::processes::owned(directory.path()).len(), 1, "it is recorded");
    broker.stop().unwrap();
    assert!(xtask_core::processes::processes_naming(directory.path()).is_empty());
}

#[test]
fn what_is_desired_outlives_the_brokers_absence() {
    let directory = tempfile::tempdir().unwrap();
    let mut broker = started(directory.path());
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], broker.server.port));
    let first = broker.desire("a", &document()).unwrap();
    broker.go_away().unwrap();
    broker.check().unwrap();
    let refused = std::net::TcpStream::connect(address).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(xtask_core::processes::processes_naming(directory.path()).is_empty());
    broker.come_back().unwrap();
    assert_eq!(broker.server.port, address.port());
    let deleted = broker.desire_no_more("a").unwrap();
    assert_eq!(deleted, first + 1);
    broker.stop().unwrap();
}

#[test]
fn a_kept_broker_has_the_same_port_logins_and_documents() {
    let (first, kept, second) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut broker = started(first.path());
    let desired = broker.desire("a", &document()).unwrap();
    broker.keep(kept.path()).unwrap();
    let (port, config, ca) = (broker.port(), broker.agent_config("h"), broker.ca().to_owned());
    let resumed = Broker::resume(second.path(), kept.path(), &Ui::quiet()).err().expect("the port is taken");
    assert!(Kind::Host.is(&resumed), "{resumed:#}");
    broker.stop().unwrap();
    let again = tempfile::tempdir().unwrap();
    let resumed = Broker::resume(again.path(), kept.path(), &Ui::quiet()).unwrap();
    assert_eq!((resumed.port(), resumed.agent_config("h"), resumed.ca()), (port, config, ca.as_str()));
    assert_eq!(resumed.desire_no_more("a").unwrap(), desired + 1);
    resumed.stop().unwrap();
}

#[test]
fn each_status_is_recorded_also_after_the_brokers_absence() {
    let directory = tempfile::tempdir().unwrap();
    let mut broker = started(directory.path());
    let report = |broker: &Broker, sequence| {
        let status = DeviceStatus { sequence, ..DeviceStatus::default() };
        let put = broker.fleet.statuses.put("dev-1", serde_json::to_vec(&status).unwrap().into());
        broker.runtime.block_on(put).unwrap();
    };
    report(&broker, 1);
    report(&broker, 2);
    // The bucket keeps only the newest status, so the first two must have arrived before the broker goes away.
    assert_eq!(sequences(&broker, 2), [1, 2]);
    broker.go_away().unwrap();
    broker.come_back().unwrap();
    report(&broker, 3);
    assert_eq!(sequences(&broker, 3), [1, 2, 3]);
    broker.stop().unwrap();
}

/// Waits for `count` statuses. Returns the sequence numbers of all that have arrived.
fn sequences(broker: &Broker, count: usize) -> Vec<u64> {
    let deadline = std::time::Instant::now() + limits::BROKER_REQUEST;
    loop {
        let arrived: Vec<_> = broker.arrivals().iter().map(|seen| seen.received.status.sequence).collect();
        if arrived.len() >= count || std::time::Instant::now() >= deadline {
            return arrived;
        }
        std::thread::sleep(limits::POLL);
    }
}

/// Returns whether the error is a failure of the host with a remedy and contains `words`.
fn is_of_host(error: &anyhow::Error, words: &str) -> bool {
    Kind::Host.is(error) && error::hint(error).is_some() && format!("{error:#}").contains(words)
}

#[test]
fn a_broker_that_does_not_answer_is_the_hosts_fault_and_a_silent_device_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let mut broker = started(directory.path());
    let unheard = broker.command("ping", Vec::new()).unwrap_err();
    assert_eq!(error::code(&unheard), 1, "the broker answers, and no device does: {unheard:#}");

    signal_server(directory.path(), Signal::STOP);
    for error in [
        broker.latest().unwrap_err(),
        broker.desire("a", &document()).unwrap_err(),
        broker.command("ping", Vec::new()).unwrap_err(),
    ] {
        assert!(is_of_host(&error, "use the broker on this host"), "{error:#}");
    }
    signal_server(directory.path(), Signal::CONT);

    broker.go_away().unwrap();
    let taken = std::net::TcpListener::bind(("127.0.0.1", broker.server.port)).unwrap();
    let error = broker.come_back().unwrap_err();
    assert!(is_of_host(&error, "address already in use"), "{error:#}");
    drop(taken);
    broker.come_back().unwrap();
    signal_server(directory.path(), Signal::KILL);
    let error = wait_for_error(|| broker.check());
    assert!(is_of_host(&error, "the broker ended: signal: 9"), "{error:#}");
}

fn signal_server(directory: &Path, signal: Signal) {
    for server in xtask_core::processes::owned(directory) {
        rustix::process::kill_process(server.pid, signal).unwrap();
    }
}

fn wait_for_error(check: impl Fn() -> Result<()>) -> anyhow::Error {
    let deadline = std::time::Instant::now() + limits::CHILD_STOP;
    loop {
        if let Err(error) = check() {
            return error;
        }
        assert!(std::time::Instant::now() < deadline, "no error within {:?}", limits::CHILD_STOP);
        std::thread::sleep(limits::CHILD_POLL);
    }
}

/// Checks the requests of the device `dev-1` that the broker must allow and those that it must refuse.
#[test]
fn a_device_reads_its_own_desired_state_and_no_others() {
    let directory = tempfile::tempdir().unwrap();
    let broker = started(directory.path());
    broker.desire("a", &document()).unwrap();
    broker.runtime.block_on(async {
        let url = format!("tls://127.0.0.1:{}", broker.server.port);
        let device = ConnectOptions::with_user_and_password("dev-1".into(), broker.device_password.clone())
            .custom_inbox_prefix("_INBOX.dev-1")
            .add_root_certificates(broker.certificates.ca_file.clone())
            .connect(url)
            .await
            .unwrap();
        let consumer = |name: Option<&str>, filter: &str| OrderedConfig {
            name: name.map(str::to_owned),
            deliver_subject: device.new_inbox(),
            filter_subject: filter.to_owned(),
            ..OrderedConfig::default()
        };
        let stream = jetstream::new(device.clone()).get_stream("KV_desired-state").await.unwrap();
        let own = "$KV.desired-state.dev-1.>";
        let made = stream.create_consumer(consumer(Some("mine"), own)).await.unwrap();
        let message = made.messages().await.unwrap().next().await.unwrap().unwrap();
        assert_eq!(Document::parse(&message.payload).unwrap(), document());

        for (name, filter) in [
            (None, own),
            (Some("n"), "$KV.desired-state.dev-2.>"),
            (Some("n"), "$KV.desired-state.*.a"),
            (Some("n"), "$KV.desired-state.>"),
            (Some("n"), ""),
        ] {
            let made = timeout(limits::POLL, stream.create_consumer(consumer(name, filter))).await;
            assert!(made.is_err(), "{name:?} {filter:?}: {made:?}");
        }
        // The subject names the device's own filter, but the body of the request names the filter of another device.
        let config = json!({ "name": "n", "deliver_subject": device.new_inbox(), "filter_subject": "$KV.desired-state.>" });
        let request = json!({ "stream_name": "KV_desired-state", "config": config }).to_string();
        let subject = format!("$JS.API.CONSUMER.CREATE.KV_desired-state.n.{own}");
        let answer = device.request(subject, request.into()).await.unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&answer.payload).unwrap();
        assert!(answer["error"]["description"].is_string(), "{answer}");

        let mut others = device.subscribe("_INBOX.>").await.unwrap();
        // The answer to a later request shows that the broker knows the subscription.
        device.request(device::REQUEST, "".into()).await.unwrap();
        broker.fleet.client.publish("_INBOX.dev-2.x", "secret".into()).await.unwrap();
        assert!(timeout(limits::POLL, others.next()).await.is_err(), "the answer to another device");
        for (subject, is_own) in [
            ("$KV.agent-status.dev-1", true),
            ("$KV.agent-status.dev-1.heartbeat", true),
            ("$KV.agent-status.dev-1.other", false),
            ("$KV.agent-status.dev-2", false),
            ("$KV.agent-status.dev-2.heartbeat", false),
            ("$KV.desired-state.dev-1.a", false),
            ("device-commands.dev-2.ping", false),
        ] {
            let mut heard = broker.fleet.client.subscribe(subject).await.unwrap();
            broker.fleet.statuses.entry("dev-1").await.unwrap();
            device.publish(subject, "x".into()).await.unwrap();
            let limit = if is_own { limits::BROKER_REQUEST } else { limits::POLL };
            assert_eq!(timeout(limit, heard.next()).await.is_ok(), is_own, "{subject}");
        }
    });
    broker.stop().unwrap();
}
