//! The nats-server: its configuration, its port, its start and its end. It may be stopped for a while and started again
//! on the same port with the same store, like a broker that is restarted.

use std::path::{Path, PathBuf};
use std::time::Instant;

use agent_protocol as protocol;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use socket2::{Domain, Socket, Type};
use xtask_core::error::host_fault;
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::host::tools;
use xtask_core::{bail_host, limits};

use xtask_jobs::Ui;
use xtask_jobs::child::{Child, Job, last_lines};

/// The user name of the fleet on the bus. The user name of a device is its id.
pub const FLEET_USER: &str = "fleet";

/// A nats-server with JetStream, which ends when this value is dropped. [`crate::Broker`] adds the fleet's connection.
pub struct Server {
    /// The running server. `Err` holds the socket that reserves the port while the server is stopped.
    state: Result<Child, Socket>,
    /// The port on 127.0.0.1. It stays the same while the server is stopped.
    pub port: u16,
    directory: PathBuf,
    owner: PathBuf,
    access: String,
    /// The log with all output of the server.
    pub(super) log: PathBuf,
}

impl Server {
    /// Starts the server with its store in `directory`, on a free port that the server chooses. `access` is the part
    /// of the configuration that says who may log in, such as the result of [`users`]. The process is recorded in the
    /// directory `owner`, so that a later run can end it.
    ///
    /// # Errors
    /// Returns an error if the server is missing, ends, or does not listen in time.
    pub fn start(directory: &Path, owner: &Path, access: String, ui: &Ui) -> Result<Self> {
        Self::start_on(directory, owner, None, access, ui)
    }

    /// Starts the server like [`Self::start`], on this port.
    ///
    /// # Errors
    /// Returns the errors of [`Self::start`].
    pub(super) fn start_on(
        directory: &Path,
        owner: &Path,
        port: Option<u16>,
        access: String,
        ui: &Ui,
    ) -> Result<Self> {
        make_private_dir(directory)?;
        let log = directory.join("nats.log");
        let child = launch(directory, owner, port, &access, &log)?;
        let port = wait_for_port(&child, directory, &log, ui)?;
        let (directory, owner) = (directory.to_owned(), owner.to_owned());
        Ok(Self { state: Ok(child), port, directory, owner, access, log })
    }

    /// Returns the directory with the server's configuration, certificates and store.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the directory in which the server's process is recorded.
    pub(super) fn owner(&self) -> &Path {
        &self.owner
    }

    /// Checks that the server runs, unless it was stopped by [`Self::go_away`].
    ///
    /// # Errors
    /// Returns a failure of the host if the server has ended.
    pub(super) fn check(&self) -> Result<()> {
        let Ok(child) = &self.state else { return Ok(()) };
        let ended = child.ended().map_err(|error| {
            host_fault(error, "look whether the broker runs", "run again; nothing is known about the agent")
        })?;
        if let Some(status) = ended {
            bail_host!(
                "the broker ended: {status}; its last output: {}", last_lines(&self.log, 3).join(" | ");
                "read nats.log in the report's directory, and the host's kernel log if it was killed; \
                 nothing is known about the agent"
            );
        }
        Ok(())
    }

    /// Stops the server. Connections are refused until [`Self::come_back`].
    ///
    /// # Errors
    /// Returns an error if the server does not end, or if its port cannot be reserved.
    pub fn go_away(&mut self) -> Result<()> {
        self.stop()?;
        self.state =
            Err(keep_from_others(self.port).context("reserve the broker's port while it is stopped")?);
        Ok(())
    }

    /// Starts the server again on the same port and with the same store.
    ///
    /// # Errors
    /// Returns the errors of [`Self::start`], and an error if the server listens on another port.
    pub fn come_back(&mut self, ui: &Ui) -> Result<()> {
        let child = launch(&self.directory, &self.owner, Some(self.port), &self.access, &self.log)?;
        let port = wait_for_port(&child, &self.directory, &self.log, ui)?;
        ensure!(port == self.port, "start the broker again: it listens on {port} and not on {}", self.port);
        self.state = Ok(child);
        Ok(())
    }

    /// Replaces the part of the configuration that says who may log in (see [`Self::start`]). A running server reads it
    /// at once, and ends the connections whose login is no longer valid. A stopped server reads it when it starts again.
    ///
    /// # Errors
    /// Returns an error if the server refuses the configuration, or has not read it in time, for example because it is
    /// paused.
    pub(super) fn reload(&mut self, access: String, ui: &Ui) -> Result<()> {
        let config = self.directory.join("nats.conf");
        if let Ok(child) = &self.state {
            let earlier = self.reloads()?;
            write_private(&config, server_config(&self.directory, Some(self.port), &access))?;
            child.signal(Signal::HUP)?;
            let limit = ui.scaled(limits::SERVER_START);
            let deadline = Instant::now() + limit;
            while self.reloads()? == earlier {
                ui.check()?;
                self.check()?;
                let output = || last_lines(&self.log, 3).join(" | ");
                let late = "reload the broker's configuration";
                ensure!(
                    Instant::now() < deadline,
                    "{late}: not done after {} s: {}",
                    limit.as_secs(),
                    output()
                );
                std::thread::sleep(limits::RETRY);
            }
        }
        self.access = access;
        Ok(())
    }

    /// Returns how many times the server has read a new configuration.
    fn reloads(&self) -> Result<usize> {
        Ok(fs_err::read_to_string(&self.log)?.matches("Reloaded server configuration").count())
    }

    /// Sends a signal to the server.
    ///
    /// # Errors
    /// Returns an error if the server was stopped by [`Self::go_away`], or has ended.
    pub(super) fn signal(&self, signal: Signal) -> Result<()> {
        self.check()?;
        self.state.as_ref().ok().context("the broker is stopped")?.signal(signal)
    }

    pub(super) fn is_there(&self) -> bool {
        self.state.is_ok()
    }

    /// Ends the server if it runs.
    pub(super) fn stop(&self) -> Result<()> {
        self.state.as_ref().map_or(Ok(()), Child::stop)
    }
}

/// Returns a bound socket that does not listen. While the socket exists, the kernel assigns its port to no other
/// process that asks for a free port, and refuses connections to the port. nats-server can still bind the port,
/// because both sockets set SO_REUSEADDR and this one never listens.
pub(super) fn keep_from_others(port: u16) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], port)).into())?;
    Ok(socket)
}

fn launch(directory: &Path, owner: &Path, port: Option<u16>, access: &str, log: &Path) -> Result<Child> {
    let config = directory.join("nats.conf");
    write_private(&config, server_config(directory, port, access))?;
    // An earlier server may have left such a file, which would name the wrong port.
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

/// Returns the logins of the fleet and of one device, as a part of the server's configuration. The device may only
/// publish its own status and heartbeat, answer its own commands and read its own desired state.
///
/// A device creates a consumer to read its desired state. The subject of that request ends in the filter, and the
/// server refuses a request whose body names another filter. Messages are delivered only to the device's own inboxes.
/// The device therefore cannot read the desired state of another device. It can reply to requests (`allow_responses`),
/// but cannot publish to other inboxes. Subjects cannot restrict which consumers a device may query or delete.
/// However, the names of consumers are random, and a device cannot list them.
pub fn users(fleet_password: &str, device_id: &str, device_password: &str) -> String {
    let (status, desired) = (protocol::STATUS_BUCKET, protocol::DESIRED_BUCKET);
    let commands = protocol::command_wildcard(device_id);
    let publish = [
        format!("$KV.{status}.{device_id}"),
        format!("$KV.{status}.{}", protocol::heartbeat_key(device_id)),
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
    let timeout = limits::BROKER_LOGIN.as_secs();
    format!(
        "authorization {{\n  timeout: {timeout}\n  users: [\n\
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

/// Waits until the server listens, and returns its port. The server writes its ports to `<program>_<pid>.ports` as soon
/// as it listens.
fn wait_for_port(child: &Child, directory: &Path, log: &Path, ui: &Ui) -> Result<u16> {
    let limit = ui.scaled(limits::SERVER_START);
    let deadline = Instant::now() + limit;
    let output = || last_lines(log, 5).join(" | ");
    loop {
        ui.check()?;
        if let Some(status) = child.ended()? {
            bail!("start the broker: it ended at once with {status}; its output: {}", output());
        }
        // A file that is not completely written contains no port yet.
        let text = ports_files(directory)?.first().and_then(|path| std::fs::read_to_string(path).ok());
        if let Some(port) = text.and_then(|text| client_port(&text)) {
            return Ok(port);
        }
        ensure!(
            Instant::now() < deadline,
            "start the broker: it does not listen after {} s; its output: {}",
            limit.as_secs(),
            output()
        );
        std::thread::sleep(limits::RETRY);
    }
}

/// Returns the client port from a text such as `{"nats":["nats://127.0.0.1:40123"], …}`.
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
        std::net::TcpListener::bind(address).expect("a server with SO_REUSEADDR can listen");
    }
}
