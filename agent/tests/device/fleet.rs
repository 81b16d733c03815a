//! A fleet bus for one test: a real nats-server with JetStream, the fleet's connection to it, and the agent's
//! process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use agent_protocol::{self as protocol, DeploymentStatus, DeviceStatus, Document, Heartbeat, Phase, Reply};
use async_nats::jetstream::kv;
use async_nats::{Client, ConnectOptions};
use xtask_fleet::{FLEET_USER, Server};
use xtask_jobs::Ui;

/// The longest wait for an event. It is long, since the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `holds` is true.
pub(crate) async fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The fleet's connection to the bus.
pub(crate) struct Fleet {
    pub(crate) client: Client,
    pub(crate) desired: kv::Store,
    pub(crate) statuses: kv::Store,
    pub(crate) device: String,
}

/// Returns the fleet's login to a broker with the logins of [`users`].
pub(crate) fn password_login() -> ConnectOptions {
    ConnectOptions::with_user_and_password(FLEET_USER.into(), "fleet-s3cret".into())
}

/// Returns the logins of the fleet and of `device`, as a part of the broker's configuration.
pub(crate) fn users(device: &str) -> String {
    xtask_fleet::users("fleet-s3cret", device, "device-s3cret")
}

/// A broker in a directory of its own.
pub(crate) struct Broker {
    // The first field is dropped first: the server ends before its directory is deleted.
    pub(crate) server: Server,
    _directory: tempfile::TempDir,
}

impl Broker {
    /// Starts a broker. `access` is the part of its configuration with the logins.
    pub(crate) fn start(access: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let server = Server::start(path, path, access.to_owned(), &Ui::quiet())
            .expect("start nats-server; cargo xtask ci --fix installs it");
        Self { server, _directory: directory }
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.server.port)
    }

    pub(crate) fn down(&mut self) {
        self.server.go_away().unwrap();
    }

    pub(crate) fn up(&mut self) {
        self.server.come_back(&Ui::quiet()).unwrap();
    }
}

impl Fleet {
    /// Connects as the fleet's user and creates the buckets.
    pub(crate) async fn enter(broker: &Broker, device: &str) -> Self {
        Self::enter_at(&broker.url(), device, password_login()).await
    }

    pub(crate) async fn enter_at(url: &str, device: &str, login: ConnectOptions) -> Self {
        let options = login.retry_on_initial_connect();
        let xtask_fleet::Fleet { client, statuses, desired } =
            xtask_fleet::Fleet::enter(url, options, &Ui::quiet()).await.unwrap();
        Self { client, desired, statuses, device: device.to_owned() }
    }

    /// Puts a document and returns its revision.
    pub(crate) async fn put(&self, deployment: &str, document: &Document) -> u64 {
        self.put_text(deployment, &String::from_utf8(document.to_bytes()).unwrap()).await
    }

    pub(crate) async fn put_text(&self, deployment: &str, text: &str) -> u64 {
        let key = protocol::desired_key(&self.device, deployment);
        self.desired.put(&key, text.to_owned().into()).await.unwrap()
    }

    pub(crate) async fn delete(&self, deployment: &str) {
        self.desired.delete(protocol::desired_key(&self.device, deployment)).await.unwrap();
    }

    pub(crate) async fn purge(&self, deployment: &str) {
        self.desired.purge(protocol::desired_key(&self.device, deployment)).await.unwrap();
    }

    /// Returns the latest status and its revision.
    pub(crate) async fn latest(&self) -> Option<(u64, DeviceStatus)> {
        let entry = self.statuses.entry(&self.device).await.ok()??;
        if entry.operation != kv::Operation::Put {
            return None;
        }
        Some((entry.revision, serde_json::from_slice(&entry.value).unwrap()))
    }

    /// Waits for a status for which `holds` is true.
    pub(crate) async fn status(&self, what: &str, holds: impl Fn(&DeviceStatus) -> bool) -> DeviceStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let latest = self.latest().await;
            match latest {
                Some((_, status)) if holds(&status) => return status,
                other => assert!(Instant::now() < deadline, "no {what}; the latest status: {other:#?}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits for a heartbeat for which `holds` is true.
    pub(crate) async fn heartbeat(&self, what: &str, holds: impl Fn(&Heartbeat) -> bool) -> Heartbeat {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let latest = self.statuses.get(protocol::heartbeat_key(&self.device)).await.ok().flatten();
            let latest = latest.map(|bytes| serde_json::from_slice::<Heartbeat>(&bytes).unwrap());
            match latest {
                Some(heartbeat) if holds(&heartbeat) => return heartbeat,
                other => assert!(Instant::now() < deadline, "no {what}; the latest heartbeat: {other:?}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until the deployment's line of the status has this revision and this phase.
    pub(crate) async fn line(&self, deployment: &str, revision: u64, phase: Phase) -> DeploymentStatus {
        let holds = |status: &DeviceStatus| {
            status
                .deployment(deployment)
                .is_some_and(|line| line.desired_revision >= revision && line.phase == phase)
        };
        let status = self.status(&format!("{deployment} {phase:?} at {revision}"), holds).await;
        status.deployment(deployment).unwrap().clone()
    }

    /// Waits until the deletion of a deployment at this revision is carried out.
    pub(crate) async fn gone(&self, deployment: &str, revision: u64) {
        let holds = |status: &DeviceStatus| {
            status.desired_revision >= revision && status.deployment(deployment).is_none()
        };
        self.status(&format!("end of {deployment} at {revision}"), holds).await;
    }

    /// Waits until the deployment's line of the status has an error with these words.
    pub(crate) async fn error(&self, deployment: &str, words: &str) {
        let has = |status: &DeviceStatus| {
            let error = status.deployment(deployment).and_then(|line| line.last_error.clone());
            error.is_some_and(|error| error.contains(words))
        };
        self.status(&format!("{deployment}: {words}"), has).await;
    }

    /// Sends a command and returns the reply.
    pub(crate) async fn ask(
        &self,
        command: &str,
        payload: &str,
    ) -> Result<Reply, async_nats::client::RequestError> {
        let subject = protocol::command_subject(&self.device, command);
        let message = self.client.request(subject, payload.to_owned().into()).await?;
        Ok(serde_json::from_slice(&message.payload).unwrap())
    }
}

/// A process of the agent.
pub(crate) struct Agent {
    process: Child,
    pub(crate) directory: PathBuf,
}

impl Agent {
    /// Starts an agent whose configuration, state and local status are in `directory`.
    pub(crate) fn start(directory: &Path) -> Self {
        Self::start_with(directory, &[])
    }

    pub(crate) fn start_with(directory: &Path, environment: &[(&str, &str)]) -> Self {
        let log =
            std::fs::File::options().create(true).append(true).open(directory.join("agent.log")).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_iot-agent"))
            .args(["run", "--config"])
            .arg(directory.join("config.toml"))
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { process, directory: directory.to_owned() }
    }

    /// Sends SIGKILL.
    pub(crate) fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Sends SIGTERM, as systemd does, and waits a few seconds for the end.
    pub(crate) fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.process.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the agent does not stop: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("agent.log")).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The test may have ended the agent already.
        if self.process.try_wait().unwrap().is_none() {
            self.process.kill().unwrap();
            self.process.wait().unwrap();
        }
        if std::thread::panicking() {
            eprintln!("the agent's log:\n{}", self.log());
        }
    }
}
