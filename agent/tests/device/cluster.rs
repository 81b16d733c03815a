//! A test with a cluster of three brokers, which lose their leader, their data and each other.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use agent_protocol::Phase;
use async_nats::jetstream;
use serde_json::json;

use crate::backup;
use crate::device::{generation, password_login, secret, write_config};
use crate::fleet::{self, Agent, Fleet, PATIENCE, users};
use crate::pod::{self, Pod};

const DEVICE: &str = "clustered";
const BUCKETS: [&str; 2] = ["desired-state", "agent-status"];

struct Cluster {
    directory: tempfile::TempDir,
    clients: [u16; 3],
    routes: [u16; 3],
    servers: [Option<Child>; 3],
}

/// Returns three ports that are free now.
fn free_ports() -> [u16; 3] {
    let sockets = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    sockets.map(|socket| socket.local_addr().unwrap().port())
}

impl Cluster {
    fn start() -> Self {
        let mut cluster = Self {
            directory: tempfile::tempdir().unwrap(),
            clients: free_ports(),
            routes: free_ports(),
            servers: [None, None, None],
        };
        (0..3).for_each(|number| cluster.up(number));
        cluster
    }

    fn up(&mut self, number: usize) {
        let home = self.home(number);
        std::fs::create_dir_all(&home).unwrap();
        let routes = self.routes.map(|port| format!("\"nats://127.0.0.1:{port}\"")).join(", ");
        let config = format!(
            "server_name: n{number}\nlisten: \"127.0.0.1:{}\"\njetstream {{ store_dir: \"{}/store\" }}\n\
             cluster {{ name: fleet, listen: \"127.0.0.1:{}\", routes: [{routes}] }}\n{}",
            self.clients[number],
            home.display(),
            self.routes[number],
            users(DEVICE)
        );
        let log = std::fs::File::options().create(true).append(true).open(home.join("log")).unwrap();
        let config = secret(&home, "nats.conf", &config);
        let server = Command::new("nats-server")
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.servers[number] = Some(server);
    }

    fn home(&self, number: usize) -> std::path::PathBuf {
        self.directory.path().join(format!("n{number}"))
    }

    /// Sends SIGKILL to a server.
    fn kill(&mut self, number: usize) {
        let mut server = self.servers[number].take().unwrap();
        server.kill().unwrap();
        server.wait().unwrap();
    }

    fn urls(&self) -> [String; 3] {
        self.clients.map(|port| format!("nats://127.0.0.1:{port}"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for server in self.servers.iter_mut().flatten() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }
}

/// Repeats an action until it succeeds, as a client must while a cluster elects a leader.
async fn retried<T, E: std::fmt::Debug>(what: &str, action: impl AsyncFn() -> Result<T, E>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match action().await {
            Ok(value) => return value,
            Err(error) => assert!(Instant::now() < deadline, "{what}: {error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn enter(cluster: &Cluster) -> Fleet {
    let url = &cluster.urls()[0];
    let client = fleet::password_login().retry_on_initial_connect().connect(url).await.unwrap();
    for bucket in BUCKETS {
        let config = json!({
            "name": format!("KV_{bucket}"), "subjects": [format!("$KV.{bucket}.>")], "retention": "limits",
            "storage": "file", "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_age": 0,
            "max_msgs_per_subject": 1, "discard": "new", "num_replicas": 3, "allow_rollup_hdrs": true,
            "allow_direct": true,
        });
        let operation = format!("STREAM.CREATE.KV_{bucket}");
        retried("make the bucket", async || backup::attempt(&client, &operation, &config).await).await;
    }
    Fleet::enter_at(url, DEVICE, fleet::password_login()).await
}

async fn put(fleet: &Fleet, name: &str, number: u32) -> u64 {
    let key = agent_protocol::desired_key(DEVICE, name);
    let text = generation(number).to_bytes();
    retried("put", async || fleet.desired.put(&key, text.clone().into()).await).await
}

/// Returns the number of the server that leads the bucket's stream.
async fn leader(fleet: &Fleet) -> usize {
    let jetstream = jetstream::new(fleet.client.clone());
    let name = retried("find the leader", async || {
        let stream = jetstream.get_stream("KV_desired-state").await.map_err(|error| error.to_string())?;
        let cluster = stream.cached_info().cluster.clone();
        cluster.and_then(|cluster| cluster.leader).ok_or_else(|| "no leader".to_owned())
    })
    .await;
    name.strip_prefix('n').unwrap().parse().unwrap()
}

fn configure(home: &Path, cluster: &Cluster, pod: &Pod) {
    let nats = format!("urls = {:?}", cluster.urls());
    let podman = format!("socket = {:?}\nimage_archives = {:?}", pod.socket(), pod::archives());
    write_config(home, DEVICE, &password_login(DEVICE), &nats, &podman);
    let text = std::fs::read_to_string(home.join("config.toml")).unwrap();
    secret(home, "config.toml", &text.replacen("[credentials]", "resync_seconds = 1\n[credentials]", 1));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a minute: cargo xtask soak --agent runs it"]
async fn a_cluster_that_loses_its_leader_and_its_data_stops_nothing() {
    let mut cluster = Cluster::start();
    let fleet = enter(&cluster).await;
    let (pod, home) = (Pod::start(""), tempfile::tempdir().unwrap());
    configure(home.path(), &cluster, &pod);
    let _agent = Agent::start(home.path());
    let first = put(&fleet, "web", 1).await;
    fleet.line("web", first, Phase::Running).await;
    let web = pod.running("web");
    assert_eq!(web.len(), 1);
    for round in 0..3 {
        let lost = leader(&fleet).await;
        cluster.kill(lost);
        let name = format!("b{round}");
        let revision = put(&fleet, &name, 1).await;
        fleet.line(&name, revision, Phase::Running).await;
        assert_eq!(pod.running("web"), web, "round {round}");
        if round > 0 {
            std::fs::remove_dir_all(cluster.home(lost)).unwrap();
        }
        cluster.up(lost);
        // The server catches up while the agent reads the desired state each second.
        let revision = put(&fleet, &name, 2).await;
        fleet.line(&name, revision, Phase::Running).await;
    }
    (0..3).for_each(|number| cluster.kill(number));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(pod.running("web"), web);
    (0..3).for_each(|number| cluster.up(number));
    let last = put(&fleet, "last", 1).await;
    fleet.line("last", last, Phase::Running).await;
    let status = fleet.status("no orphans", |status| {
        status.deployments.len() == 5 && status.deployments.iter().all(|line| line.phase == Phase::Running)
    });
    status.await;
    assert_eq!(pod.running("web"), web, "its container is still the first one");
    assert_eq!(pod.containers().len(), 5);
}
