//! The ssh connection that joins a guest on a libvirt daemon to the servers of the run. It forwards a port of the
//! guest's loopback to the broker, and ports of this host's loopback to the workload. The networks between guest and
//! host need to transport only ssh, so the connection is the same for each network and for a daemon on another host.

use std::ffi::OsString;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use xtask_core::error::Failure;
use xtask_core::host::tools;
use xtask_core::limits;
use xtask_core::machine::WORKLOAD_PORTS;
use xtask_core::message;
use xtask_core::runs::instance::{Route, ssh_arguments_by};
use xtask_jobs::child::{Child, Job, last_lines};

/// The address of the broker in the guest.
pub(crate) const BROKER_IN_GUEST: &str = "127.0.0.1";

/// The log of ssh, in the working directory of the run.
pub(crate) const LOG: &str = "tunnel.log";

/// The part of ssh's log that shows that the guest's sshd has accepted the forwarding (OpenSSH, `clientloop.c`).
const FORWARDS: &str = "remote forward success for: listen";

/// The ssh connection of a run. It is open or closed.
pub(crate) struct Tunnel {
    ssh: PathBuf,
    /// The directory with the keys of the run, which also owns the processes.
    work: PathBuf,
    login_user: String,
    broker_port: u16,
    /// The ports of the guest, each with the port of this host's loopback.
    ports: Vec<(u16, u16)>,
    open: Option<Open>,
}

struct Open {
    state: Arc<State>,
    thread: JoinHandle<()>,
}

/// The state that the thread of an open connection shares.
#[derive(Default)]
struct State {
    /// Set to end the connection.
    ends: AtomicBool,
    /// True while ssh forwards the ports.
    is_up: AtomicBool,
}

impl Tunnel {
    /// Returns a closed connection. The kernel chooses free ports of this host.
    pub(crate) fn new(work: PathBuf, login_user: &str, broker_port: u16) -> Result<Self> {
        // All ports are bound at the same time, so that they differ.
        let held = WORKLOAD_PORTS.map(|port| Ok((port, TcpListener::bind(("127.0.0.1", 0))?)));
        let held = held.into_iter().collect::<Result<Vec<_>>>().context("find free ports of this host")?;
        let ports = held.iter().map(|(port, listener)| Ok((*port, listener.local_addr()?.port())));
        let ports = ports.collect::<Result<_>>()?;
        let ssh = tools::require("ssh")?;
        Ok(Self { ssh, work, login_user: login_user.to_owned(), broker_port, ports, open: None })
    }

    /// Returns the port of this host's loopback that leads to `guest_port`.
    pub(crate) fn port_to(&self, guest_port: u16) -> Result<u16> {
        let port = self.ports.iter().find(|(port, _)| *port == guest_port);
        port.map(|(_, port)| *port).with_context(|| format!("no port leads to the guest's port {guest_port}"))
    }

    /// Starts ssh in a thread. If ssh ends, because the guest has no sshd yet or reboots, the thread starts it again.
    pub(crate) fn open(&mut self, route: &Route) {
        self.close();
        let state = Arc::<State>::default();
        let (arguments, ssh, work) = (self.arguments(route), self.ssh.clone(), self.work.clone());
        let shared = Arc::clone(&state);
        let thread = std::thread::spawn(move || {
            let log = work.join(LOG);
            while !shared.ends.load(Ordering::Relaxed) {
                let before = std::fs::metadata(&log).map_or(0, |log| log.len());
                let job = Job {
                    program: &ssh,
                    arguments: arguments.clone(),
                    owner: &work,
                    log: log.clone(),
                    environment: Vec::new(),
                };
                match Child::start(&job) {
                    // If the child is dropped, it ends.
                    Ok(child) => shared.watch(&child, &log, before),
                    Err(error) => message!("warning: connect the guest with the broker: {error:#}"),
                }
                shared.is_up.store(false, Ordering::Relaxed);
                shared.pause();
            }
        });
        self.open = Some(Open { state, thread });
    }

    /// Returns a failure of the host if the connection should be open but ssh does not forward the ports.
    pub(crate) fn failure(&self) -> Option<Failure> {
        let Open { state, .. } = self.open.as_ref()?;
        if state.is_up.load(Ordering::Relaxed) {
            return None;
        }
        let said = last_lines(&self.work.join(LOG), 1).concat();
        let said = if said.trim().is_empty() { "it has printed nothing yet" } else { said.trim() };
        Some(Failure::host(
            format!("ssh does not connect the guest with the broker: {said}"),
            "read tunnel.log in the report's directory; nothing is known about the agent",
        ))
    }

    /// Closes the connection, and waits for the end of ssh.
    pub(crate) fn close(&mut self) {
        if let Some(Open { state, thread }) = self.open.take() {
            state.ends.store(true, Ordering::Relaxed);
            // A thread that has panicked has ended, too.
            let _ = thread.join();
        }
    }

    fn arguments(&self, route: &Route) -> Vec<OsString> {
        let broker = self.broker_port;
        let options = ["-N", "-oExitOnForwardFailure=yes", "-oLogLevel=DEBUG1"];
        let mut arguments: Vec<OsString> = options.map(OsString::from).into();
        arguments.push(format!("-oServerAliveInterval={}", limits::SSH_ALIVE.as_secs()).into());
        arguments.push(format!("-oServerAliveCountMax={}", limits::SSH_ALIVES_MISSED).into());
        arguments.push(format!("-R{BROKER_IN_GUEST}:{broker}:127.0.0.1:{broker}").into());
        for (guest, own) in &self.ports {
            arguments.push(format!("-L127.0.0.1:{own}:127.0.0.1:{guest}").into());
        }
        arguments.extend(ssh_arguments_by(&self.work, &self.login_user, route));
        arguments
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.close();
    }
}

impl State {
    /// Waits for the end of ssh, or of the connection. `before` is the size of the log when ssh was started.
    fn watch(&self, child: &Child, log: &Path, before: u64) {
        while !self.ends.load(Ordering::Relaxed) && child.ended().is_ok_and(|status| status.is_none()) {
            if !self.is_up.load(Ordering::Relaxed) {
                let text = std::fs::read(log).unwrap_or_default();
                let new = text.get(usize::try_from(before).unwrap_or(0)..).unwrap_or_default();
                let is_up = String::from_utf8_lossy(new).contains(FORWARDS);
                self.is_up.store(is_up, Ordering::Relaxed);
            }
            std::thread::sleep(limits::CHILD_POLL);
        }
    }

    fn pause(&self) {
        let pauses = limits::SSH_AGAIN.as_millis() / limits::CHILD_POLL.as_millis();
        for _ in 0..pauses {
            if self.ends.load(Ordering::Relaxed) {
                return;
            }
            std::thread::sleep(limits::CHILD_POLL);
        }
    }
}
