//! The fleet bus of a run: a real nats-server with JetStream, on loopback, on a port of its own choice, with credentials
//! that live as long as the run; and what the fleet sees there.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use async_nats::jetstream::{self, kv, stream};
use async_nats::{Client, ConnectOptions};
use iot_agent::protocol::{self, DeviceStatus, Reply};
use tokio::runtime::Runtime;
use tokio::time::timeout;
use xtask::agent_build::hex;
use xtask::cli::Sabotage;
use xtask::domain::HOST_FROM_GUEST;
use xtask::host::tools;
use xtask::limits;
use xtask::paths::{make_private_dir, write_private};

use crate::child::{Child, Job, last_lines};
use crate::interrupt::Interrupt;

/// The fleet's user on the bus; the device's is its id.
const FLEET_USER: &str = "fleet";

/// A running broker and the fleet's own connection to it.
pub(crate) struct Broker {
    child: Child,
    runtime: Runtime,
    client: Client,
    bucket: kv::Store,
    port: u16,
    log: PathBuf,
    device_id: String,
    device_password: String,
}

/// A status and the bucket's revision of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// JetStream's own number; the guest's clock plays no part.
    pub(crate) revision: u64,
    /// What the device said.
    pub(crate) status: DeviceStatus,
}

impl Broker {
    /// Starts the server with its store in `work` and makes the fleet's bucket.
    pub(crate) fn start(
        work: &Path,
        device_id: &str,
        sabotage: Option<Sabotage>,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let directory = work.join("nats");
        make_private_dir(&directory)?;
        let (fleet_password, device_password) = (random_password()?, random_password()?);
        let accepted = match sabotage {
            Some(Sabotage::BrokerRefuses) => random_password()?,
            _ => device_password.clone(),
        };
        let config = directory.join("nats.conf");
        write_private(&config, server_config(&directory, &fleet_password, device_id, &accepted))?;
        let server = tools::require("nats-server")?;
        let log = directory.join("nats.log");
        let job = Job {
            program: &server,
            arguments: vec!["--config".into(), config.into()],
            log: log.clone(),
            environment: Vec::new(),
        };
        let child = Child::start(&job).context("start the broker")?;
        let port = wait_for_port(&child, &directory, &log, interrupt)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start the runtime of the fleet's connection")?;
        let (client, bucket) = runtime.block_on(connect(port, fleet_password))?;
        let device_id = device_id.to_owned();
        Ok(Self { child, runtime, client, bucket, port, log, device_id, device_password })
    }

    /// The agent's configuration for a guest of this run.
    pub(crate) fn agent_config(&self) -> String {
        format!(
            "[agent]\ndevice_id = \"{id}\"\nheartbeat_seconds = 3\n\n[credentials]\ntype = \"toml-shared\"\n\
             username = \"{id}\"\npassword = \"{}\"\n\n[nats]\nurls = [\"nats://{HOST_FROM_GUEST}:{}\"]\n",
            self.device_password,
            self.port,
            id = self.device_id,
        )
    }

    /// The latest status, if there is one.
    pub(crate) fn latest(&self) -> Result<Option<Seen>> {
        let entry = self
            .runtime
            .block_on(async { timeout(limits::BROKER_REQUEST, self.bucket.entry(&self.device_id)).await })
            .context("ask the broker for the device's status: no answer in time")?
            .context("ask the broker for the device's status")?;
        let Some(entry) = entry else { return Ok(None) };
        ensure!(entry.operation == kv::Operation::Put, "the device's status was {:?}", entry.operation);
        let status: DeviceStatus = serde_json::from_slice(&entry.value).with_context(|| {
            format!("read the device's status {:?}", String::from_utf8_lossy(&entry.value))
        })?;
        ensure!(
            status.schema == protocol::STATUS_SCHEMA,
            "the device's status has schema {}, this workflow reads {}",
            status.schema,
            protocol::STATUS_SCHEMA
        );
        Ok(Some(Seen { revision: entry.revision, status }))
    }

    /// One ping; what the device answered.
    pub(crate) fn ping(&self) -> Result<Reply> {
        let subject = protocol::command_subject(&self.device_id, "ping");
        let request = self.client.request(subject.clone(), Vec::new().into());
        let message = self
            .runtime
            .block_on(async { timeout(limits::BROKER_REQUEST, request).await })
            .with_context(|| format!("request {subject}: no answer in time"))?
            .with_context(|| format!("request {subject}"))?;
        serde_json::from_slice(&message.payload)
            .with_context(|| format!("read the reply {:?}", String::from_utf8_lossy(&message.payload)))
    }

    /// How often the broker has refused the device's login.
    pub(crate) fn refusals(&self) -> usize {
        // A log that cannot be read has no refusals in it; the wait then ends at its limit.
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().filter(|line| line.contains("authentication error")).count()
    }

    /// Fails where the server has died.
    pub(crate) fn check(&self) -> Result<()> {
        match self.child.ended()? {
            None => Ok(()),
            Some(status) => {
                bail!("the broker ended: {status}; it said last: {}", last_lines(&self.log, 3).join(" | "))
            }
        }
    }

    /// Ends it.
    pub(crate) fn stop(self) -> Result<()> {
        self.child.stop()
    }
}

fn random_password() -> Result<String> {
    let mut bytes = [0; 18];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("ask the kernel for a random password")?;
    Ok(hex(&bytes))
}

/// The device may say its own status and answer its own commands, and nothing else.
fn server_config(directory: &Path, fleet_password: &str, device_id: &str, device_password: &str) -> String {
    let bucket = protocol::STATUS_BUCKET;
    let commands = protocol::command_wildcard(device_id);
    format!(
        "listen: \"127.0.0.1:-1\"\n\
         ports_file_dir: \"{dir}\"\n\
         jetstream {{ store_dir: \"{dir}/store\" }}\n\
         authorization {{\n  users: [\n\
         \x20   {{ user: \"{FLEET_USER}\", password: \"{fleet_password}\" }}\n\
         \x20   {{ user: \"{device_id}\", password: \"{device_password}\", permissions: {{\n\
         \x20     publish: {{ allow: [\"$KV.{bucket}.{device_id}\", \"$JS.API.STREAM.INFO.KV_{bucket}\", \"_INBOX.>\"] }}\n\
         \x20     subscribe: {{ allow: [\"{commands}\", \"_INBOX.>\"] }}\n\
         \x20   }} }}\n  ]\n}}\n",
        dir = directory.display(),
    )
}

/// The server writes its ports to `<program>_<pid>.ports` once it listens.
fn wait_for_port(child: &Child, directory: &Path, log: &Path, interrupt: &Interrupt) -> Result<u16> {
    let deadline = Instant::now() + limits::SERVER_START;
    loop {
        interrupt.check()?;
        if let Some(status) = child.ended()? {
            bail!(
                "start the broker: it ended at once, {status}; it said: {}",
                last_lines(log, 5).join(" | ")
            );
        }
        let entries =
            std::fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?;
        let file =
            entries.flatten().map(|e| e.path()).find(|path| path.extension().is_some_and(|e| e == "ports"));
        // A file that is half written has no port yet.
        if let Some(port) =
            file.and_then(|path| std::fs::read_to_string(path).ok()).and_then(|t| client_port(&t))
        {
            return Ok(port);
        }
        ensure!(
            Instant::now() < deadline,
            "start the broker: it does not listen after {} s; it said: {}",
            limits::SERVER_START.as_secs(),
            last_lines(log, 5).join(" | ")
        );
        std::thread::sleep(limits::RETRY);
    }
}

/// `{"nats":["nats://127.0.0.1:40123"], …}`
fn client_port(text: &str) -> Option<u16> {
    let ports: serde_json::Value = serde_json::from_str(text).ok()?;
    ports["nats"][0].as_str()?.rsplit(':').next()?.parse().ok()
}

async fn connect(port: u16, password: String) -> Result<(Client, kv::Store)> {
    let url = format!("nats://127.0.0.1:{port}");
    let options = ConnectOptions::with_user_and_password(FLEET_USER.to_owned(), password);
    let client = timeout(limits::SERVER_START, options.connect(&url))
        .await
        .with_context(|| format!("connect to the broker {url}: no answer in time"))?
        .with_context(|| format!("connect to the broker {url}"))?;
    let jetstream = jetstream::new(client.clone());
    let bucket = async {
        jetstream.create_stream(status_bucket()).await.context("make the status bucket")?;
        jetstream.get_key_value(protocol::STATUS_BUCKET).await.context("open the status bucket")
    };
    let bucket = timeout(limits::BROKER_REQUEST, bucket)
        .await
        .context("make the status bucket: no answer in time")??;
    Ok((client, bucket))
}

/// A KV bucket is a stream of this form (NATS ADR-8). Written out, because `create_key_value` of async-nats 0.51 asks
/// first for account information that nats-server before 2.10 answers without fields that it needs.
fn status_bucket() -> stream::Config {
    stream::Config {
        name: format!("KV_{}", protocol::STATUS_BUCKET),
        subjects: vec![format!("$KV.{}.>", protocol::STATUS_BUCKET)],
        max_messages_per_subject: 1,
        discard: stream::DiscardPolicy::New,
        allow_rollup: true,
        deny_delete: true,
        allow_direct: true,
        num_replicas: 1,
        ..stream::Config::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_read_from_the_servers_own_file() {
        assert_eq!(client_port(r#"{"nats":["nats://127.0.0.1:40123"],"monitoring":[]}"#), Some(40123));
        assert_eq!(client_port(r#"{"nats":["nats://127.0"#), None);
    }

    #[test]
    fn a_real_broker_starts_is_asked_and_is_gone_afterwards() {
        let directory = tempfile::tempdir().unwrap();
        let broker = Broker::start(directory.path(), "dev-1", None, &Interrupt::default()).unwrap();
        broker.check().unwrap();
        assert_eq!(broker.latest().unwrap(), None);
        assert!(
            broker.ping().unwrap_err().to_string().contains("device-commands.dev-1.ping"),
            "nobody is there"
        );
        let config = iot_agent::config::Config::parse(&broker.agent_config()).unwrap();
        assert_eq!(config.device_id, "dev-1");
        assert_eq!(xtask::paths::processes_naming(directory.path()).len(), 1);
        broker.stop().unwrap();
        assert!(xtask::paths::processes_naming(directory.path()).is_empty());
    }
}
