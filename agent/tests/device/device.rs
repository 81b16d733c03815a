//! A device under test with its own bus and its own podman, and documents of deployments.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use agent_protocol::deployment::{ContainerSpec, Deployment, Document, Limits};

use crate::fleet::{Agent, Broker, Fleet, users};
use crate::pod::{self, IMAGE, Pod};

pub(crate) struct Device {
    // The first field is dropped first: the agent ends before its bus and its podman.
    pub(crate) agent: Option<Agent>,
    pub(crate) broker: Broker,
    pub(crate) fleet: Fleet,
    pub(crate) pod: Pod,
    pub(crate) home: tempfile::TempDir,
}

impl Device {
    pub(crate) async fn start(name: &str) -> Self {
        Self::start_with(name, 600).await
    }

    /// Starts a device whose agent reads the complete desired state at this interval.
    pub(crate) async fn start_with(name: &str, resync_seconds: u32) -> Self {
        Self::configured(&std::env::temp_dir(), name, resync_seconds, "", "").await
    }

    /// Starts a device with these registries, and with more lines in the table `[podman]` of its configuration.
    pub(crate) async fn start_with_images(name: &str, registries: &str, more: &str) -> Self {
        Self::configured(&std::env::temp_dir(), name, 600, registries, more).await
    }

    /// Starts a device whose podman and agent keep their files in this directory.
    pub(crate) async fn start_at(directory: &Path, name: &str, registries: &str) -> Self {
        Self::configured(directory, name, 600, registries, "").await
    }

    async fn configured(
        directory: &Path,
        name: &str,
        resync_seconds: u32,
        registries: &str,
        more: &str,
    ) -> Self {
        let broker = Broker::start(&users(name));
        let fleet = Fleet::enter(&broker, name).await;
        let mut device = Self {
            broker,
            fleet,
            pod: Pod::start_at(directory, registries),
            home: tempfile::tempdir_in(directory).unwrap(),
            agent: None,
        };
        let nats = format!("urls = [{:?}]", device.broker.url());
        let (socket, archives) = (device.pod.socket(), pod::archives());
        let podman = format!("socket = {socket:?}\nimage_archives = {archives:?}\n{more}");
        let home = device.home.path();
        write_config(home, name, &password_login(name), &nats, &podman);
        let text = std::fs::read_to_string(home.join("config.toml")).unwrap();
        let resync = format!("resync_seconds = {resync_seconds}\n[credentials]");
        secret(home, "config.toml", &text.replacen("[credentials]", &resync, 1));
        device.up();
        device
    }

    pub(crate) fn up(&mut self) {
        self.agent = Some(Agent::start(self.home.path()));
    }

    pub(crate) fn kill(&mut self) {
        self.agent.take().unwrap().kill();
    }
}

/// Writes a configuration with the contents of the tables `[credentials]`, `[nats]` and `[podman]`.
pub(crate) fn write_config(home: &Path, device: &str, credentials: &str, nats: &str, podman: &str) {
    let text = format!(
        "[agent]\ndevice_id = \"{device}\"\nheartbeat_seconds = 1\nstate_directory = \"{home}\"\n\
         status_file = \"{home}/status.json\"\n[credentials]\n{credentials}\n[nats]\n{nats}\n[podman]\n{podman}\n",
        home = home.display(),
    );
    secret(home, "config.toml", &text);
}

/// Returns the contents of `[credentials]` for a device whose login is in [`users`].
pub(crate) fn password_login(device: &str) -> String {
    format!("type = \"toml-shared\"\nusername = \"{device}\"\npassword = \"device-s3cret\"")
}

/// Creates a file that only its owner can read.
pub(crate) fn secret(home: &Path, name: &str, text: &str) -> PathBuf {
    let path = home.join(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path
}

pub(crate) fn spec(words: &[&str]) -> ContainerSpec {
    let limits = Limits { open_files: Some(256), ..Limits::default() };
    let command = words.iter().map(|word| (*word).to_owned()).collect();
    // Without a probation, the previous container is removed as soon as the new one runs.
    ContainerSpec { command, limits, probation_seconds: Some(0), ..ContainerSpec::of(IMAGE) }
}

pub(crate) fn document(spec: ContainerSpec) -> Document {
    Document::of(Deployment::PodmanContainer(spec))
}

/// Returns the document of a container that prints its generation.
pub(crate) fn generation(number: u32) -> Document {
    let mut spec = spec(&[]);
    spec.env.insert("GENERATION".into(), number.to_string());
    document(spec)
}
