//! nats-server itself: its configuration, its port, its start and end. It may go away for a while and come back on the same
//! port with the same store, as a broker does that is restarted.

use std::path::{Path, PathBuf};
use std::time::Instant;

use agent_protocol as protocol;
use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Socket, Type};
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::host::tools;
use xtask_core::{bail_host, limits};

use xtask_jobs::Ui;
use xtask_jobs::child::{Child, Job, last_lines};

/// The fleet's user on the bus; the device's is its id.
pub const FLEET_USER: &str = "fleet";

/// A running nats-server with JetStream, which ends with this value. [`crate::Broker`] is one with the fleet's connection.
pub struct Server {
    /// `Err`: it is away, and its port is kept from others.
    state: Result<Child, Socket>,
    /// The port on 127.0.0.1, also while the server is away.
    pub port: u16,
    directory: PathBuf,
    owner: PathBuf,
    access: String,
    /// Everything that the server has printed.
    pub(super) log: PathBuf,
}

impl Server {
    /// Starts it with its store in `directory`, on a port of its own choice. `access` is the part of its configuration that
    /// says who may log in, such as [`users`]. `owner` is the directory that owns the process.
    ///
    /// # Errors
    /// The server is missing, ends, or does not listen in time.
    pub fn start(directory: &Path, owner: &Path, access: String, ui: &Ui) -> Result<Self> {
        make_private_dir(directory)?;
        let log = directory.join("nats.log");
        let child = launch(directory, owner, None, &access, &log)?;
        let port = wait_for_port(&child, directory, &log, ui)?;
        let (directory, owner) = (directory.to_owned(), owner.to_owned());
        Ok(Self { state: Ok(child), port, directory, owner, access, log })
    }

    /// # Errors
    /// A failure of the host if the server has ended.
    pub(super) fn check(&self) -> Result<()> {
        if let Ok(child) = &self.state
            && let Some(status) = child.ended()?
        {
            bail_host!(
                "the broker ended: {status}; its last output: {}", last_lines(&self.log, 3).join(" | ");
                "read {}; nothing is known about the agent", self.log.display()
            );
        }
        Ok(())
    }

    /// Ends it. Whoever connects before [`Self::come_back`] is refused.
    ///
    /// # Errors
    /// The server does not end, or its port cannot be kept.
    pub fn go_away(&mut self) -> Result<()> {
        self.stop()?;
        self.state = Err(keep_from_others(self.port).context("keep the broker's port while it is away")?);
        Ok(())
    }

    /// Starts it again, on the same port and with the same store.
    ///
    /// # Errors
    /// Those of [`Self::start`].
    pub fn come_back(&mut self, ui: &Ui) -> Result<()> {
        let child = launch(&self.directory, &self.owner, Some(self.port), &self.access, &self.log)?;
        let port = wait_for_port(&child, &self.directory, &self.log, ui)?;
        ensure!(port == self.port, "start the broker again: it listens on {port} and not on {}", self.port);
        self.state = Ok(child);
        Ok(())
    }

    /// Ends it, where it is there.
    pub(super) fn stop(&self) -> Result<()> {
        self.state.as_ref().map_or(Ok(()), Child::stop)
    }
}

/// A bound socket that does not listen: the kernel gives its port to nobody who asks for any, and refuses who connects.
/// nats-server's own socket may have it all the same, since both say SO_REUSEADDR and this one never listens.
fn keep_from_others(port: u16) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], port)).into())?;
    Ok(socket)
}

fn launch(directory: &Path, owner: &Path, port: Option<u16>, access: &str, log: &Path) -> Result<Child> {
    let config = directory.join("nats.conf");
    write_private(&config, server_config(directory, port, access))?;
    // A server that was here before may have left one.
    for path in ports_files(directory)? {
        fs_err::remove_file(&path)?;
    }
    let server = tools::require("nats-server")?;
    let job = Job {
        program: &server,
        owner,
        arguments: vec!["--config".into(), config.into()],
        log: log.to_owned(),
        environment: Vec::new(),
    };
    Child::start(&job).context("start the broker")
}

fn server_config(directory: &Path, port: Option<u16>, access: &str) -> String {
    let port = port.map_or("-1".to_owned(), |port| port.to_string());
    format!(
        "listen: \"127.0.0.1:{port}\"\n\
         ports_file_dir: \"{dir}\"\n\
         jetstream {{ store_dir: \"{dir}/store\" }}\n\
         {access}",
        dir = directory.display(),
    )
}

/// The logins of the fleet and of one device, as a part of the server's configuration. The device may say its own status,
/// answer its own commands and read its own desired state, and nothing else.
///
/// A consumer is made by a subject that ends in what it delivers, and the server refuses one whose request says another
/// filter; what is delivered goes to the device's own inboxes. So it reads no other device's desired state. It answers
/// whoever asks it (`allow_responses`), and nobody else. What subjects cannot say is whose a consumer is that is asked about or
/// deleted: its name is random, and nobody lists them to a device.
pub fn users(fleet_password: &str, device_id: &str, device_password: &str) -> String {
    let (status, desired) = (protocol::STATUS_BUCKET, protocol::DESIRED_BUCKET);
    let commands = protocol::command_wildcard(device_id);
    let publish = [
        format!("$KV.{status}.{device_id}"),
        format!("$JS.API.STREAM.INFO.KV_{status}"),
        format!("$JS.API.STREAM.INFO.KV_{desired}"),
        format!(
            "$JS.API.CONSUMER.CREATE.KV_{desired}.*.$KV.{desired}.{}",
            protocol::desired_wildcard(device_id)
        ),
        format!("$JS.API.CONSUMER.INFO.KV_{desired}.*"),
        format!("$JS.API.CONSUMER.DELETE.KV_{desired}.*"),
        "$JS.FC.>".to_owned(),
    ];
    let publish = publish.map(|subject| format!("\"{subject}\"")).join(", ");
    format!(
        "authorization {{\n  users: [\n\
         \x20   {{ user: \"{FLEET_USER}\", password: \"{fleet_password}\" }}\n\
         \x20   {{ user: \"{device_id}\", password: \"{device_password}\", permissions: {{\n\
         \x20     publish: {{ allow: [{publish}] }}\n\
         \x20     subscribe: {{ allow: [\"{commands}\", \"_INBOX.{device_id}.>\"] }}\n\
         \x20     allow_responses: true\n\
         \x20   }} }}\n\
         \x20 ]\n}}\n"
    )
}

fn ports_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs_err::read_dir(directory)?;
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths.filter(|path| path.extension().is_some_and(|ending| ending == "ports")).collect())
}

/// The server writes its ports to `<program>_<pid>.ports` once it listens.
fn wait_for_port(child: &Child, directory: &Path, log: &Path, ui: &Ui) -> Result<u16> {
    let deadline = Instant::now() + limits::SERVER_START;
    let output = || last_lines(log, 5).join(" | ");
    loop {
        ui.check()?;
        if let Some(status) = child.ended()? {
            bail!("start the broker: it ended at once with {status}; its output: {}", output());
        }
        // A file that is half written has no port yet.
        let text = ports_files(directory)?.first().and_then(|path| std::fs::read_to_string(path).ok());
        if let Some(port) = text.and_then(|text| client_port(&text)) {
            return Ok(port);
        }
        ensure!(
            Instant::now() < deadline,
            "start the broker: it does not listen after {} s; its output: {}",
            limits::SERVER_START.as_secs(),
            output()
        );
        std::thread::sleep(limits::RETRY);
    }
}

/// `{"nats":["nats://127.0.0.1:40123"], …}`
fn client_port(text: &str) -> Option<u16> {
    let ports: serde_json::Value = serde_json::from_str(text).ok()?;
    ports["nats"][0].as_str()?.rsplit(':').next()?.parse().ok()
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
    fn a_port_that_is_kept_refuses_and_is_given_to_nobody_else() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let _kept = keep_from_others(address.port()).unwrap();
        let refused = std::net::TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        std::net::TcpListener::bind(address).expect("who says SO_REUSEADDR, as a server does, may listen");
    }
}
