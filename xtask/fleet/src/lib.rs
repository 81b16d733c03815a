//! The fleet bus of a run: a real nats-server with JetStream ([`server`]) on loopback, with TLS ([`certificates`]). Its
//! credentials are valid only during the run. The fleet's connection reads statuses there and writes desired states. The
//! device may connect through a [`line`] that can be disturbed, and the broker itself can be disturbed ([`trouble`]).
//! [`registry`] is another server of a run: a real registry of images.

mod arrivals;
mod certificates;
mod kept;
mod line;
mod registry;
mod server;
#[cfg(all(test, feature = "real"))]
mod tests;
mod trouble;

use std::path::Path;
use std::time::Duration;

use agent_protocol::{self as protocol, DeviceStatus, Document, Heartbeat, Reply};
use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{self, kv, stream};
use async_nats::{Client, ConnectOptions};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use xtask_core::cli::Sabotage;
use xtask_core::digest::hex;
use xtask_core::error;
use xtask_core::fs::make_private_dir;
use xtask_core::limits;

pub use arrivals::Arrival;
use arrivals::Arrivals;
use certificates::Certificates;
pub use certificates::FLEET_NAME;
pub use line::{Line, Passage};
pub use registry::{REGISTRY_LOG, REGISTRY_PROGRAM, Registry, RegistryImage};
pub use server::{FLEET_USER, Server, users};
pub use trouble::Contents;
use xtask_jobs::Ui;

/// The authority that issues the broker's certificate.
const AUTHORITY: &str = "the certificate authority of a run";

/// A broker with the fleet's connection to it.
pub struct Broker {
    server: Server,
    certificates: Certificates,
    ui: Ui,
    runtime: Runtime,
    fleet: Fleet,
    fleet_password: String,
    device_id: String,
    device_password: String,
    arrivals: Arrivals,
    line: Option<Line>,
    portal: Option<Server>,
}

/// The fleet's connection and its buckets.
pub struct Fleet {
    pub client: Client,
    pub statuses: kv::Store,
    pub desired: kv::Store,
}

/// A status with its revision in the bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedStatus {
    /// The revision, which JetStream assigns; it does not depend on the guest's clock.
    pub revision: u64,
    /// The status that the device published.
    pub status: DeviceStatus,
}

/// A heartbeat with its revision, which is comparable with that of a status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceivedHeartbeat {
    pub revision: u64,
    pub heartbeat: Heartbeat,
}

impl Broker {
    /// Starts the server with its store in `work`, and creates the fleet's buckets.
    pub fn start(work: &Path, device_id: &str, sabotage: Option<Sabotage>, ui: &Ui) -> Result<Self> {
        let (fleet_password, device_password) = (random_password()?, random_password()?);
        let accepted = match sabotage {
            Some(Sabotage::BrokerRefuses) => random_password()?,
            _ => device_password.clone(),
        };
        let directory = work.join("nats");
        make_private_dir(&directory)?;
        let certificates = Certificates::issue(&directory, AUTHORITY)?;
        let access = certificates.server.clone() + &users(&fleet_password, device_id, &accepted);
        let server = Server::start(&directory, work, access, ui)?;
        let logins = (fleet_password, device_id.to_owned(), device_password);
        Self::connected(server, certificates, logins, ui)
    }

    /// Connects to a server that has started.
    fn connected(
        server: Server,
        certificates: Certificates,
        (fleet_password, device_id, device_password): (String, String, String),
        ui: &Ui,
    ) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start the runtime of the fleet's connection")?;
        let fleet = runtime.block_on(Fleet::connect(server.port, &certificates, &fleet_password, ui))?;
        let mut arrivals = Arrivals::default();
        let limit = ui.scaled(limits::BROKER_REQUEST);
        runtime.block_on(arrivals.follow(&fleet.statuses, &device_id, limit))?;
        let ui = ui.clone();
        Ok(Self {
            server,
            certificates,
            ui,
            runtime,
            fleet,
            fleet_password,
            device_id,
            device_password,
            arrivals,
            line: None,
            portal: None,
        })
    }

    /// Returns the port to which the device connects: that of the line if one is open, or that of the server. Both stay
    /// the same while the server is stopped.
    pub fn port(&self) -> u16 {
        self.line.as_ref().map_or(self.server.port, Line::port)
    }

    /// Returns the agent's configuration for a guest of this run, in which the broker has the address `host`.
    pub fn agent_config(&self, host: &str) -> String {
        let (id, password, port) = (&self.device_id, &self.device_password, self.port());
        format!(
            "[agent]\ndevice_id = \"{id}\"\nheartbeat_seconds = 3\n\n[credentials]\ntype = \"toml-shared\"\n\
             username = \"{id}\"\npassword = \"{password}\"\n\n\
             [nats]\nurls = [\"tls://{host}:{port}\"]\nca_file = \"secrets/ca.pem\"\n"
        )
    }

    /// Returns the certificate authority that the agent's configuration names, as PEM.
    pub fn ca(&self) -> &str {
        &self.certificates.ca
    }

    /// Returns the broker's answer to `question`, which `what` names.
    ///
    /// # Errors
    /// Returns a failure of the host if the broker does not answer or refuses. The broker runs on this host, and its
    /// silence says nothing about the agent.
    fn ask<T, E>(&self, what: &str, question: impl Future<Output = Result<T, E>>) -> Result<T>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let limit = limits::BROKER_REQUEST;
        self.unattributed(what, limit, question)
            .map_err(|error| of_host(error, "use the broker on this host"))
    }

    /// Returns the broker's answer like [`Self::ask`]. The error is not marked as a failure of the host.
    fn unattributed<T, E>(
        &self,
        what: &str,
        limit: Duration,
        question: impl Future<Output = Result<T, E>>,
    ) -> Result<T>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let limit = self.ui.scaled(limit);
        self.runtime
            .block_on(async { timeout(limit, question).await })
            .with_context(|| format!("{what}: no answer within {} s", limit.as_secs_f64()))?
            .with_context(|| what.to_owned())
    }

    /// Returns the statuses that have arrived, in order. While the broker is stopped, nothing is recorded. Of the
    /// statuses that were stored before it was followed again, only the last one is recorded.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.arrivals.list()
    }

    /// Returns the passwords of the fleet and of the device, which must be in no report.
    pub fn secrets(&self) -> [&str; 2] {
        [&self.fleet_password, &self.device_password]
    }

    /// Returns the latest status, if there is one.
    pub fn latest(&self) -> Result<Option<ReceivedStatus>> {
        let read = self.status_entry()?.map(|entry| {
            let status: DeviceStatus = parsed(&entry, "status")?;
            of_known_schema(status.schema, "status")?;
            Ok(ReceivedStatus { revision: entry.revision, status })
        });
        read.transpose()
    }

    /// Returns the latest heartbeat, if there is one.
    pub fn latest_heartbeat(&self) -> Result<Option<ReceivedHeartbeat>> {
        let key = protocol::heartbeat_key(&self.device_id);
        let entry = self.ask("ask the broker for the device's heartbeat", self.fleet.statuses.entry(&key))?;
        let read = entry.map(|entry| {
            let heartbeat: Heartbeat = parsed(&entry, "heartbeat")?;
            of_known_schema(heartbeat.schema, "heartbeat")?;
            Ok(ReceivedHeartbeat { revision: entry.revision, heartbeat })
        });
        read.transpose()
    }

    fn status_entry(&self) -> Result<Option<kv::Entry>> {
        self.ask("ask the broker for the device's status", self.fleet.statuses.entry(&self.device_id))
    }

    /// Writes a deployment of this name to the desired state, and returns the revision of the entry.
    pub fn desire(&self, deployment: &str, document: &Document) -> Result<u64> {
        let key = protocol::desired_key(&self.device_id, deployment);
        let put = self.fleet.desired.put(&key, document.to_bytes().into());
        self.ask(&format!("write the deployment {key}"), put)
    }

    /// Deletes a deployment from the desired state, and returns the revision of the deletion.
    pub fn desire_no_more(&self, deployment: &str) -> Result<u64> {
        let key = protocol::desired_key(&self.device_id, deployment);
        self.ask(&format!("delete {key}"), self.fleet.desired.delete(&key))?;
        self.revision_of_deletion(&key)
    }

    /// Purges a deployment from the desired state, which also asks the device to delete the deployment's volumes. Returns
    /// the revision of the purge.
    pub fn purge(&self, deployment: &str) -> Result<u64> {
        let key = protocol::desired_key(&self.device_id, deployment);
        self.ask(&format!("purge {key}"), self.fleet.desired.purge(&key))?;
        self.revision_of_deletion(&key)
    }

    /// A deletion and a purge are entries with their own revision, which `delete` and `purge` do not return.
    fn revision_of_deletion(&self, key: &str) -> Result<u64> {
        let entry = self.ask(&format!("read {key} back"), self.fleet.desired.entry(key))?;
        entry.map(|entry| entry.revision).with_context(|| format!("the deletion of {key} left no entry"))
    }

    /// Sends one command, such as `ping`, and returns the reply of the device.
    ///
    /// # Errors
    /// Returns an error if the device does not answer or the reply cannot be parsed, and a failure of the host if the
    /// broker does not answer either.
    pub fn command(&self, command: &str, payload: Vec<u8>) -> Result<Reply> {
        self.command_within(command, payload, limits::BROKER_REQUEST)
    }

    /// Sends one command like [`Self::command`], with a limit of its own.
    ///
    /// # Errors
    /// Returns the errors of [`Self::command`].
    pub fn command_within(&self, command: &str, payload: Vec<u8>, limit: Duration) -> Result<Reply> {
        let subject = protocol::command_subject(&self.device_id, command);
        let request = self.fleet.client.request(subject.clone(), payload.into());
        let answer = self.unattributed(&format!("request {subject}"), limit, request);
        let message = answer.or_else(|unheard| self.status_entry().and(Err(unheard)))?;
        serde_json::from_slice(&message.payload)
            .with_context(|| format!("read the reply {:?}", String::from_utf8_lossy(&message.payload)))
    }

    /// Returns how many times the broker has refused the device's login.
    pub fn refusals(&self) -> usize {
        // If the log cannot be read, the result is 0, and the caller's wait ends at its limit.
        let text = std::fs::read_to_string(&self.server.log).unwrap_or_default();
        let user = format!("{:?}", self.device_id);
        text.lines().filter(|line| line.contains("authentication error") && line.contains(&user)).count()
    }

    /// Fails if the server or the portal has ended.
    pub fn check(&self) -> Result<()> {
        self.server.check()?;
        self.portal.as_ref().map_or(Ok(()), Server::check)
    }

    /// Returns whether the server runs, and was not stopped with [`Self::go_away`].
    pub fn is_there(&self) -> bool {
        self.server.is_there()
    }

    /// Stops the server for a while. Connections are refused during that time.
    pub fn go_away(&mut self) -> Result<()> {
        self.server.go_away().map_err(|error| of_host(error, "stop the broker for a while"))
    }

    /// Starts the server again on the same port and with its store.
    pub fn come_back(&mut self) -> Result<()> {
        let port = self.server.port;
        let connected = self.server.come_back(&self.ui).and_then(|()| self.reconnect());
        connected.map_err(|error| of_host(error, &format!("start the broker again on 127.0.0.1:{port}")))
    }

    /// Replaces the fleet's connection, and follows the statuses over the new one.
    fn reconnect(&mut self) -> Result<()> {
        let connecting = Fleet::connect(self.server.port, &self.certificates, &self.fleet_password, &self.ui);
        self.fleet = self.runtime.block_on(connecting)?;
        let limit = self.ui.scaled(limits::BROKER_REQUEST);
        self.runtime.block_on(self.arrivals.follow(&self.fleet.statuses, &self.device_id, limit))
    }

    /// Ends the line, the portal and the server.
    pub fn stop(mut self) -> Result<()> {
        self.line = None;
        let portal = self.portal.as_ref().map_or(Ok(()), Server::stop);
        self.server.stop().and(portal)
    }
}

/// Parses an entry of the status bucket. `what` names the kind of document.
fn parsed<T: serde::de::DeserializeOwned>(entry: &kv::Entry, what: &str) -> Result<T> {
    ensure!(entry.operation == kv::Operation::Put, "the device's {what} was {:?}", entry.operation);
    serde_json::from_slice(&entry.value)
        .with_context(|| format!("read the device's {what} {:?}", String::from_utf8_lossy(&entry.value)))
}

fn of_known_schema(schema: u32, what: &str) -> Result<()> {
    let known = protocol::STATUS_SCHEMA;
    ensure!(schema == known, "the device's {what} has schema {schema}, this workflow reads {known}");
    Ok(())
}

/// Turns an error of the broker into a failure of the host, on which the broker runs. A failure of another kind is
/// returned unchanged.
fn of_host(error: anyhow::Error, attempted: &str) -> anyhow::Error {
    let hint = "see the causes: the host is overloaded, nats-server was stopped, or another process has taken its port; \
                run again. Nothing is known about the agent";
    error::host_fault(error, attempted, hint)
}

fn random_password() -> Result<String> {
    let mut bytes = [0; 18];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("ask the kernel for a random password")?;
    Ok(hex(&bytes))
}

impl Fleet {
    async fn connect(port: u16, certificates: &Certificates, password: &str, ui: &Ui) -> Result<Self> {
        let options = ConnectOptions::with_user_and_password(FLEET_USER.to_owned(), password.to_owned())
            .add_root_certificates(certificates.ca_file.clone())
            .require_tls(true);
        Self::enter(&format!("tls://127.0.0.1:{port}"), options, ui).await
    }

    /// Connects, and creates the buckets that do not exist yet.
    ///
    /// # Errors
    /// Returns an error if the broker does not answer in time or refuses.
    pub async fn enter(url: &str, options: ConnectOptions, ui: &Ui) -> Result<Self> {
        let client = timeout(ui.scaled(limits::SERVER_START), options.connect(url))
            .await
            .with_context(|| format!("connect to the broker {url}: no answer in time"))?
            .with_context(|| format!("connect to the broker {url}"))?;
        let jetstream = jetstream::new(client.clone());
        let open = async |name: &'static str| {
            let what = || format!("make the bucket {name}");
            jetstream.get_or_create_stream(bucket(name)).await.with_context(what)?;
            jetstream.get_key_value(name).await.with_context(|| format!("open the bucket {name}"))
        };
        let buckets = async {
            anyhow::Ok((open(protocol::STATUS_BUCKET).await?, open(protocol::DESIRED_BUCKET).await?))
        };
        let (statuses, desired) = timeout(ui.scaled(limits::BROKER_REQUEST), buckets)
            .await
            .context("make the fleet's buckets: no answer in time")??;
        Ok(Self { client, statuses, desired })
    }
}

/// Returns the configuration of a KV bucket as a stream (NATS ADR-8). It is written out because `create_key_value` of
/// async-nats 0.51 first requests account information. The response of a nats-server before 2.10 lacks fields that it
/// needs.
fn bucket(name: &str) -> stream::Config {
    stream::Config {
        name: format!("KV_{name}"),
        subjects: vec![format!("$KV.{name}.>")],
        max_messages_per_subject: 1,
        discard: stream::DiscardPolicy::New,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        num_replicas: 1,
        ..stream::Config::default()
    }
}
