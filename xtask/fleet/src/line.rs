//! The line between the device and the broker: a TCP proxy on a port of its own. A [`Passage`] says what it does with
//! the device's connections. The module [`relay`] carries one connection.

mod relay;
#[cfg(test)]
mod tests;

use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use xtask_core::message;

use crate::of_host;
use crate::server::keep_from_others;

/// The number of connections that wait until the line accepts them.
const BACKLOG: i32 = 1024;

/// What the line does with connections. A change also applies to the connections that exist already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passage {
    /// Each byte passes at once.
    Open,
    /// Each byte passes after this time, in each direction. The rate is not limited.
    Delayed(Duration),
    /// At most this number of bytes (at least 1) passes in a second, in each direction of each connection.
    Limited(u64),
    /// No byte passes, and the device's connections stay half-open: they are neither closed nor reset. New connections
    /// are accepted and are silent, too. A connection that has been silent stays silent for ever, like a connection
    /// whose router has forgotten it: all later bytes are discarded, in each direction. Otherwise, the first byte after
    /// the silence would be an error of TLS, which tells the device at once that the connection is lost.
    Silent,
    /// Connections are refused, and existing connections are cut. No other process gets the port.
    Refused,
    /// New connections lead to the portal, another server ([`crate::Broker::open_portal`]). Existing connections are
    /// cut. The connections to the portal are cut when the passage changes again.
    Portal,
}

#[derive(Debug, Clone, Copy)]
struct State {
    passage: Passage,
    /// The number of cuts. A connection that is older than the last cut must end.
    cuts: u64,
    /// The number of silences. A connection that is older than the last silence stays silent.
    silences: u64,
}

/// The ports behind the line, and the number of connections.
#[derive(Debug)]
struct Route {
    server: u16,
    /// The port of the portal, or 0 if there is none.
    portal: AtomicU16,
    accepted: AtomicU64,
}

/// A TCP proxy between the device and a server on this host. It ends when this value is dropped.
///
/// The line accepts a connection before it connects to the server. If the server refuses, the device's connection is
/// reset.
#[derive(Debug)]
pub struct Line {
    port: u16,
    runtime: Handle,
    route: Arc<Route>,
    state: watch::Sender<State>,
    listening: Mutex<Option<Listening>>,
    /// Reserves the port while nothing listens. This socket never listens.
    _reserved: Socket,
}

#[derive(Debug)]
struct Listening {
    socket: TcpListener,
    /// The task that accepts connections. It holds a duplicate of the socket.
    task: JoinHandle<()>,
}

impl Line {
    /// Opens a line to the server on 127.0.0.1 with this port. If `port` is `None`, the kernel chooses the port of the
    /// line.
    ///
    /// # Errors
    /// Returns a failure of the host, for example if another process has the port.
    pub fn open(runtime: Handle, port: Option<u16>, server: u16) -> Result<Self> {
        Self::opened(runtime, port, server).map_err(|error| of_host(error, "open a line to the broker"))
    }

    fn opened(runtime: Handle, port: Option<u16>, server: u16) -> Result<Self> {
        let socket = bound(port.unwrap_or(0))?;
        let port = socket.local_addr()?.as_socket_ipv4().context("the line has no IPv4 address")?.port();
        let reserved = keep_from_others(port).with_context(|| format!("reserve 127.0.0.1:{port}"))?;
        let route = Route { server, portal: AtomicU16::new(0), accepted: AtomicU64::new(0) };
        let state = State { passage: Passage::Open, cuts: 0, silences: 0 };
        let line = Self {
            port,
            runtime,
            route: Arc::new(route),
            state: watch::Sender::new(state),
            listening: Mutex::new(None),
            _reserved: reserved,
        };
        let listening = line.listen(socket)?;
        *line.listening.lock().unwrap_or_else(PoisonError::into_inner) = Some(listening);
        Ok(line)
    }

    /// Returns the port on 127.0.0.1 to which the device connects. It never changes.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns how many connections the line has accepted so far.
    pub fn accepted(&self) -> u64 {
        self.route.accepted.load(Ordering::Relaxed)
    }

    /// Returns what the line does with connections now.
    pub fn passage(&self) -> Passage {
        self.state.borrow().passage
    }

    /// Changes what the line does with connections. When this function returns, [`Passage::Refused`] refuses
    /// connections, and each other passage accepts them. The tasks of existing connections follow at once.
    ///
    /// # Errors
    /// Returns a failure of the host if the line cannot listen again, and an error for [`Passage::Portal`] without a
    /// portal.
    pub fn set(&self, passage: Passage) -> Result<()> {
        let has_portal = self.route.portal.load(Ordering::Relaxed) != 0;
        ensure!(
            passage != Passage::Portal || has_portal,
            "lead the line to the portal: open the portal first"
        );
        let mut listening = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed(passage, &mut listening)
            .map_err(|error| of_host(error, &format!("set the line 127.0.0.1:{} to {passage:?}", self.port)))
    }

    fn changed(&self, passage: Passage, listening: &mut Option<Listening>) -> Result<()> {
        if passage == Passage::Refused
            && let Some(listening) = listening.take()
        {
            listening.end()?;
        }
        self.state.send_modify(|state| {
            let cuts = |passage| matches!(passage, Passage::Refused | Passage::Portal);
            state.cuts += u64::from(cuts(passage) || cuts(state.passage));
            state.silences += u64::from(passage == Passage::Silent);
            state.passage = passage;
        });
        if passage != Passage::Refused && listening.is_none() {
            *listening = Some(self.listen(bound(self.port)?)?);
        }
        Ok(())
    }

    /// Resets all connections of the device that exist now. The passage stays the same.
    pub fn cut(&self) {
        self.state.send_modify(|state| state.cuts += 1);
    }

    /// Sets the port on 127.0.0.1 to which [`Passage::Portal`] leads.
    pub(crate) fn lead_to(&self, portal: u16) {
        self.route.portal.store(portal, Ordering::Relaxed);
    }

    fn listen(&self, socket: Socket) -> Result<Listening> {
        let what = || format!("listen on 127.0.0.1:{}", self.port);
        socket.set_nonblocking(true).with_context(what)?;
        socket.listen(BACKLOG).with_context(what)?;
        let socket = TcpListener::from(socket);
        let _entered = self.runtime.enter();
        let listener = tokio::net::TcpListener::from_std(socket.try_clone().with_context(what)?);
        let accepting =
            relay::accept(listener.with_context(what)?, Arc::clone(&self.route), self.state.subscribe());
        Ok(Listening { socket, task: self.runtime.spawn(accepting) })
    }
}

impl Listening {
    /// Ends the listening at once, although the task still has a duplicate of the socket.
    fn end(self) -> Result<()> {
        self.task.abort();
        SockRef::from(&self.socket).shutdown(Shutdown::Read).context("end the line's listening")
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let listening = self.listening.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(error)) = listening.map(Listening::end) {
            message!("warning: {error:#}");
        }
    }
}

/// Returns a socket that can listen although a socket of [`keep_from_others`] has the port.
fn bound(port: u16) -> Result<Socket> {
    let what = || format!("bind 127.0.0.1:{port}");
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).with_context(what)?;
    socket.set_reuse_address(true).with_context(what)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).with_context(what)?;
    Ok(socket)
}
