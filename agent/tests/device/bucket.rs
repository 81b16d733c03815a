//! Tests of a bucket that is emptied, lost, recreated, restored from a backup, or written in another way than
//! agents expect. Only an explicit deletion removes a deployment.

use agent_protocol::deployment::{ContainerSpec, Volume};
use agent_protocol::{DeploymentStatus, Document, Phase, desired_key};
use async_nats::HeaderMap;
use async_nats::jetstream;
use serde_json::{Value, json};

use crate::backup::{self, Backup};
use crate::device::{Device, document, generation, spec};
use crate::fleet::{Fleet, wait_until};

const STREAM: &str = "KV_desired-state";

/// Returns the document of a container with a volume.
fn with_data() -> Document {
    let data = Volume { name: "data".into(), mount: "/data".into(), read_only: false };
    document(ContainerSpec { volumes: vec![data], ..spec(&["write"]) })
}

impl Device {
    /// Waits until the deployment is an orphan for a reason with these words, and checks that its container is
    /// still this one.
    async fn orphaned(&self, name: &str, words: &str, container: &[String]) -> DeploymentStatus {
        let told = |line: &DeploymentStatus| {
            line.phase == Phase::Orphaned && line.last_error.as_ref().is_some_and(|why| why.contains(words))
        };
        let status = self
            .fleet
            .status(&format!("{name} orphaned: {words}"), |status| status.deployment(name).is_some_and(told))
            .await;
        assert_eq!(self.pod.running(name), container);
        status.deployment(name).unwrap().clone()
    }

    fn volumes(&self) -> String {
        self.pod.podman(&["volume", "ls", "--quiet"])
    }

    async fn delete_bucket(&self) {
        jetstream::new(self.fleet.client.clone()).delete_stream(STREAM).await.unwrap();
    }

    /// Creates the bucket again, which is empty.
    async fn make_bucket(&mut self) {
        let device = self.fleet.device.clone();
        self.fleet = Fleet::enter(&self.broker, &device).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_lost_or_new_bucket_stops_nothing() {
    let mut device = Device::start_with("emptied", 1).await;
    let revision = device.fleet.put("web", &with_data()).await;
    device.fleet.line("web", revision, Phase::Running).await;
    let container = device.pod.running("web");
    assert_eq!(container.len(), 1);

    let stream = jetstream::new(device.fleet.client.clone()).get_stream(STREAM).await.unwrap();
    stream.purge().await.unwrap();
    device.orphaned("web", "has lost its entry", &container).await;
    let path = device.home.path().join("status.json");
    let (text, healthy) = iot_agent::status_report::describe(&path).unwrap();
    assert!(healthy && text.contains("orphaned") && text.contains("has lost its entry"), "{text}");
    let revision = device.fleet.put("web", &with_data()).await;
    device.fleet.line("web", revision, Phase::Running).await;
    assert_eq!(device.pod.running("web"), container, "the document is the same");

    device.delete_bucket().await;
    device.fleet.status("the lost bucket", |status| status.following_error.is_some()).await;
    let (text, healthy) = iot_agent::status_report::describe(&path).unwrap();
    assert!(!healthy && text.contains("not followed: open the bucket desired-state"), "{text}");
    assert_eq!(device.pod.running("web"), container);
    // The new bucket has a deletion that the agent did not see as it was made.
    device.kill();
    device.make_bucket().await;
    device.fleet.purge("web").await;
    device.up();
    device.orphaned("web", "was recreated", &container).await;
    assert!(device.volumes().contains("iot-emptied.web.data"));
    device.fleet.purge("web").await;
    device.fleet.status("purged", |status| status.deployment("web").is_none()).await;
    assert!(device.pod.containers().is_empty());
    assert_eq!(device.volumes().trim(), "");
}

/// The backup has the deployment's deletion, and the deployment was put again after the backup.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_deletes_no_volume() {
    let device = Device::start_with("restored", 1).await;
    let old = device.fleet.put("old", &generation(1)).await;
    device.fleet.line("old", old, Phase::Running).await;
    device.fleet.purge("web").await;
    let backup = Backup::of(&device.fleet.client, STREAM).await;
    device.fleet.put("old", &generation(2)).await;
    let later = device.fleet.put("later", &generation(1)).await;
    let revision = device.fleet.put("web", &with_data()).await;
    device.fleet.line("later", later, Phase::Running).await;
    device.fleet.line("web", revision, Phase::Running).await;
    let [web, later] = ["web", "later"].map(|name| device.pod.running(name));

    device.delete_bucket().await;
    backup.restore(&device.fleet.client, STREAM).await;
    let line = device.orphaned("web", "the bucket ", &web).await;
    device.orphaned("later", "the bucket ", &later).await;
    device.fleet.line("old", old, Phase::Running).await;
    let logs = |name: &str| device.pod.podman(&["logs", &device.pod.running(name)[0]]);
    wait_until("the document of the backup", || {
        device.pod.running("old").len() == 1 && logs("old").contains("generation 1")
    })
    .await;
    assert!(device.volumes().contains("iot-restored.web.data"));

    // The restored stream counts on from the backup.
    let again = device.fleet.put("later", &generation(1)).await;
    assert!(again <= revision);
    device.fleet.line("later", again, Phase::Running).await;
    assert_eq!(device.pod.running("later"), later, "the document is the same");
    if line.last_error.unwrap().contains(&format!("older than revision {revision}")) {
        // nats-server 2.9 restores the stream's identity, too. A deletion below the known revision could come from
        // a replica that lags behind.
        device.fleet.purge("web").await;
        let known = device.fleet.put("later", &generation(1)).await;
        device.fleet.status("the Purge is read", |status| status.desired_revision >= known).await;
        device.orphaned("web", "older than revision", &web).await;
        let known = device.fleet.put("web", &with_data()).await;
        assert!(known > revision);
        device.fleet.line("web", known, Phase::Running).await;
    }
    device.fleet.purge("web").await;
    device.fleet.status("purged", |status| status.deployment("web").is_none()).await;
    assert!(device.pod.running("web").is_empty());
    assert_eq!(device.volumes().trim(), "");
}

impl Fleet {
    /// Writes an entry with these headers, as other clients and nats-server itself do.
    async fn write(&self, deployment: &str, headers: &[(&str, &str)], payload: &[u8]) -> u64 {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, *value);
        }
        let subject = format!("$KV.desired-state.{}", desired_key(&self.device, deployment));
        let published = jetstream::new(self.client.clone())
            .publish_with_headers(subject, map, payload.to_vec().into())
            .await;
        published.unwrap().await.unwrap().sequence
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn markers_of_the_server_and_binary_documents_are_understood() {
    let device = Device::start("markers").await;
    let fleet = &device.fleet;
    let revision = fleet.put("web", &with_data()).await;
    fleet.line("web", revision, Phase::Running).await;
    for reason in ["MaxAge", "Remove"] {
        let revision = fleet.write("web", &[("Nats-Marker-Reason", reason)], b"").await;
        fleet.gone("web", revision).await;
        assert!(device.pod.running("web").is_empty(), "{reason}");
        assert!(device.volumes().contains("iot-markers.web.data"));
    }
    let revision = fleet.write("web", &[("Nats-Marker-Reason", "Purge")], b"").await;
    fleet.gone("web", revision).await;
    assert_eq!(device.volumes().trim(), "");
    let text = [
        &b"{\"version\":1,\"kind\":\"podman-container\",\"spec\":{\"image\":\"localhost/\xff:1\""[..],
        b"}}",
    ];
    let text = text.concat();
    let wrong = text.iter().position(|byte| *byte == 0xff).unwrap();
    let revision = fleet.write("binary", &[], &text).await;
    let line = fleet.line("binary", revision, Phase::Refused).await;
    assert!(line.last_error.unwrap().contains(&format!("is not UTF-8 text: byte {wrong} is wrong")));
}

/// Without markers, an entry that expires leaves nothing. nats-server 2.11 and later can write a marker.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_expires_is_told_by_its_marker_alone() {
    let mut device = Device::start_with("expired", 1).await;
    let client = device.fleet.client.clone();
    let version = client.server_info().version;
    let minor = version.split('.').nth(1).and_then(|minor| minor.parse::<u32>().ok()).unwrap();
    device.kill();
    device.delete_bucket().await;
    let mut config = json!({
        "name": STREAM, "subjects": ["$KV.desired-state.>"], "retention": "limits", "storage": "file",
        "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_msgs_per_subject": 1, "discard": "new",
        "num_replicas": 1, "allow_rollup_hdrs": true, "max_age": 0,
    });
    if minor < 11 {
        config["max_age"] = json!(5_000_000_000_u64);
    } else {
        (config["allow_msg_ttl"], config["subject_delete_marker_ttl"]) =
            (json!(true), json!(60_000_000_000_u64));
    }
    backup::jetstream(&client, &format!("STREAM.CREATE.{STREAM}"), &config).await;
    device.make_bucket().await;
    device.fleet.statuses.purge("expired").await.unwrap();
    device.up();
    device.fleet.status("the agent is back", |_| true).await;
    let text = with_data().to_bytes();
    let headers: &[_] = if minor < 11 { &[] } else { &[("Nats-TTL", "5s")] };
    let revision = device.fleet.write("web", headers, &text).await;
    wait_until("a container", || device.pod.running("web").len() == 1).await;
    let container = device.pod.running("web");
    if minor < 11 {
        device.orphaned("web", "has lost its entry", &container).await;
    } else {
        device.fleet.gone("web", revision + 1).await;
        assert!(device.pod.containers().is_empty());
    }
    assert!(device.volumes().contains("iot-expired.web.data"));
}

/// The agent reads the complete state only every ten minutes here, so it must notice by itself that its consumer is
/// gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_consumer_is_replaced_and_a_restart_under_load_starts_nothing_anew() {
    let mut device = Device::start("consumer").await;
    let names = ["a", "b", "c"];
    let first = device.fleet.put("a", &generation(1)).await;
    device.fleet.line("a", first, Phase::Running).await;
    let kept = device.pod.running("a");
    let client = device.fleet.client.clone();
    let listed = backup::jetstream(&client, &format!("CONSUMER.NAMES.{STREAM}"), &Value::Null).await;
    let consumers = listed["consumers"].as_array().unwrap().clone();
    assert!(!consumers.is_empty());
    for name in consumers.iter().filter_map(Value::as_str) {
        backup::jetstream(&client, &format!("CONSUMER.DELETE.{STREAM}.{name}"), &Value::Null).await;
    }
    device.pod.hang(true);
    device.fleet.put("b", &generation(1)).await;
    let last = device.fleet.put("c", &generation(1)).await;
    device.fleet.status("the new consumer", |status| status.desired_revision >= last).await;
    device.broker.down();
    device.broker.up();
    device.pod.hang(false);
    for name in names {
        device.fleet.line(name, 1, Phase::Running).await;
    }
    assert_eq!(device.pod.running("a"), kept);
    assert_eq!(device.pod.containers().len(), names.len());
}

/// The device has lost its state, and the bucket its entries.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_state_an_emptied_bucket_stops_nothing() {
    let mut device = Device::start_with("stateless", 1).await;
    let revision = device.fleet.put("web", &with_data()).await;
    device.fleet.line("web", revision, Phase::Running).await;
    let container = device.pod.running("web");
    device.kill();
    for name in ["state", "state.old"] {
        std::fs::remove_file(device.home.path().join(name)).unwrap();
    }
    let stream = jetstream::new(device.fleet.client.clone()).get_stream(STREAM).await.unwrap();
    stream.purge().await.unwrap();
    device.fleet.statuses.purge("stateless").await.unwrap();
    device.up();
    device.fleet.status("the agent is back", |status| status.following_error.is_none()).await;
    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    assert_eq!(device.pod.running("web"), container);
    device.fleet.status("the container", |status| status.foreign_containers == 1).await;
    device.fleet.delete("web").await;
    wait_until("the container is removed", || device.pod.containers().is_empty()).await;
}
