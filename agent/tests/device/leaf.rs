//! A device on a leaf node whose JetStream has a domain of its own. The buckets are on the hub.

use std::net::TcpListener;

use agent_protocol::Phase;
use xtask_fleet::FLEET_USER;

use crate::device::{generation, password_login, write_config};
use crate::fleet::{self, Agent, Broker, Fleet};
use crate::pod::{self, Pod};

const DEVICE: &str = "on-a-leaf";

/// Returns the permissions of a device whose buckets are in the domain `hub`. They are those of [`xtask_fleet::users`]
/// with other subjects of JetStream.
fn users() -> String {
    let users = fleet::users(DEVICE).replace("$JS.API.", "$JS.hub.API.");
    let status = "\"$KV.agent-status";
    assert_eq!(users.matches(status).count(), 2, "{users}");
    users.replace(status, "\"$JS.hub.API.$KV.agent-status")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_on_a_leaf_node_uses_the_buckets_of_the_hub() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let stores = tempfile::tempdir().unwrap();
    let with_domain = |domain: &str| {
        // Of two blocks with the same name, the server uses the last one.
        let store = stores.path().join(domain);
        format!("jetstream {{ store_dir: {store:?}, domain: {domain} }}\n")
    };
    let listen = format!("leafnodes {{ listen: \"127.0.0.1:{port}\" }}\n");
    let hub = Broker::start(&(with_domain("hub") + &listen + &fleet::users(DEVICE)));
    let remote = format!("nats://{FLEET_USER}:fleet-s3cret@127.0.0.1:{port}");
    let remotes = format!("leafnodes {{ remotes: [{{ url: \"{remote}\" }}] }}\n");
    let leaf = Broker::start(&(with_domain("leaf") + &remotes + &users()));
    let fleet = Fleet::enter(&hub, DEVICE).await;
    let (home, pod) = (tempfile::tempdir().unwrap(), Pod::start(""));
    let podman = format!("socket = {:?}\nimage_archives = {:?}", pod.socket(), pod::archives());
    let nats = format!("urls = [{:?}]\njetstream_domain = \"hub\"", leaf.url());
    write_config(home.path(), DEVICE, &password_login(DEVICE), &nats, &podman);
    let _agent = Agent::start(home.path());
    for number in 1..=2 {
        let revision = fleet.put("web", &generation(number)).await;
        fleet.line("web", revision, Phase::Running).await;
    }
    fleet.heartbeat("a heartbeat", |heartbeat| heartbeat.sequence > 1).await;
    assert_eq!(pod.running("web").len(), 1);
    fleet.ask("ping", "").await.unwrap();
}
