//! A device with a bus and a podman of its own, and documents for it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

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
        let broker = Broker::start(&users(name));
        let fleet = Fleet::enter(&broker, name).await;
        let mut device =
            Self { broker, fleet, pod: Pod::start(), home: tempfile::tempdir().unwrap(), agent: None };
        write_config(&device, pod::archives());
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

fn write_config(device: &Device, archives: &Path) {
    let home = device.home.path();
    let text = format!(
        "[agent]\ndevice_id = \"{name}\"\nheartbeat_seconds = 1\nstate_directory = \"{home}\"\nstatus_file = \"{home}/status.json\"\n\
         [credentials]\ntype = \"toml-shared\"\nusername = \"{name}\"\npassword = \"device-s3cret\"\n\
         [nats]\nurls = [\"nats://127.0.0.1:{port}\"]\n[podman]\nsocket = \"{socket}\"\nimage_archives = \"{archives}\"\n",
        name = device.fleet.device,
        home = home.display(),
        port = device.broker.port,
        socket = device.pod.socket().display(),
        archives = archives.display(),
    );
    let path = home.join("config.toml");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

pub(crate) fn spec(words: &[&str]) -> ContainerSpec {
    let limits = Limits { open_files: Some(256), ..Limits::default() };
    let command = words.iter().map(|word| (*word).to_owned()).collect();
    ContainerSpec { command, limits, ..ContainerSpec::of(IMAGE) }
}

pub(crate) fn document(spec: ContainerSpec) -> Document {
    Document::of(Deployment::PodmanContainer(spec))
}

/// A container that prints its generation.
pub(crate) fn generation(number: u32) -> Document {
    let mut spec = spec(&[]);
    spec.env.insert("GENERATION".into(), number.to_string());
    document(spec)
}
