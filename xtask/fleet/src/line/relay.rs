//! One connection of the line, from the device to the server and back.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, Shutdown};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use xtask_core::limits;

use super::{Passage, Route, State};

/// The most bytes that are read at once.
const PIECE: usize = 1 << 14;
/// The bytes that a delayed direction of a connection holds at most. 16 MiB are more than a delay of a second at the
/// rate of 100 Mbit/s.
const IN_FLIGHT: usize = 1 << 24;
/// The number of pieces into which a limited connection divides the bytes of a second.
const STEPS: u64 = 20;

/// Accepts the device's connections until the task is aborted.
pub(super) async fn accept(listener: TcpListener, route: Arc<Route>, state: watch::Receiver<State>) {
    loop {
        match listener.accept().await {
            Ok((device, _)) => {
                route.accepted.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(connect(device, Arc::clone(&route), state.clone()));
            }
            // The device has closed the connection already, or this process has too many files open.
            Err(_) => sleep(limits::RETRY).await,
        }
    }
}

/// Carries a connection until both sides have closed it, or until it is cut.
async fn connect(device: TcpStream, route: Arc<Route>, mut state: watch::Receiver<State>) {
    let born = *state.borrow_and_update();
    let port = match born.passage {
        Passage::Portal => route.portal.load(Ordering::Relaxed),
        _ => route.server,
    };
    let mut cut = state.clone();
    let has_ended = tokio::select! {
        biased;
        _ = cut.wait_for(|now| now.cuts != born.cuts || now.passage == Passage::Refused) => false,
        ended = relay(&device, port, born, state) => ended.is_ok(),
    };
    if !has_ended {
        // The close of the socket then resets the connection. If this fails, the device has ended the connection.
        device.set_zero_linger().ok();
    }
}

async fn relay(device: &TcpStream, port: u16, born: State, state: watch::Receiver<State>) -> io::Result<()> {
    let mut silence = state.clone();
    let is_silent = |now: &State| now.passage == Passage::Silent || now.silences != born.silences;
    let server = tokio::select! {
        biased;
        _ = silence.wait_for(is_silent) => None,
        server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) => Some(server?),
    };
    if let Some(server) = &server {
        device.set_nodelay(true)?;
        server.set_nodelay(true)?;
        tokio::select! {
            biased;
            _ = silence.wait_for(is_silent) => {}
            ended = async { tokio::try_join!(carry(device, server, state.clone()), carry(server, device, state.clone())) } => {
                return ended.map(drop);
            }
        }
    }
    match &server {
        Some(server) => {
            tokio::join!(swallow(device), swallow(server));
        }
        None => swallow(device).await,
    }
    Ok(())
}

/// Discards all bytes of a stream until its peer has closed it.
async fn swallow(stream: &TcpStream) {
    let mut buffer = vec![0; PIECE];
    while stream.readable().await.is_ok() {
        match stream.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
    // If this fails, the peer has reset the connection.
    SockRef::from(stream).shutdown(Shutdown::Write).ok();
}

/// Carries the bytes of one direction until the sender has closed it.
async fn carry(from: &TcpStream, to: &TcpStream, mut state: watch::Receiver<State>) -> io::Result<()> {
    let mut queue = Queue { pieces: VecDeque::new(), length: 0, free_at: Instant::now() };
    let mut buffer = vec![0; PIECE];
    let mut has_ended = false;
    loop {
        let passage = state.borrow_and_update().passage;
        if has_ended && queue.length == 0 {
            return SockRef::from(to).shutdown(Shutdown::Write);
        }
        let room = if matches!(passage, Passage::Delayed(_)) { IN_FLIGHT } else { PIECE };
        let due = queue.due(passage);
        tokio::select! {
            changed = state.changed() => changed.map_err(io::Error::other)?,
            ready = from.readable(), if !has_ended && queue.length < room => {
                ready?;
                match from.try_read(&mut buffer) {
                    Ok(0) => has_ended = true,
                    Ok(read) => queue.push(&buffer[..read]),
                    Err(error) => unless_it_would_block(error)?,
                }
            }
            ready = async { sleep_until(due).await; to.writable().await }, if queue.length > 0 => {
                ready?;
                queue.send(to, passage).or_else(unless_it_would_block)?;
            }
        }
    }
}

fn unless_it_would_block(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::WouldBlock { Ok(()) } else { Err(error) }
}

/// The bytes of one direction that have been read and not yet written.
struct Queue {
    /// The pieces with the time at which each was read.
    pieces: VecDeque<(Instant, Vec<u8>)>,
    length: usize,
    /// The time at which a limited direction may write again.
    free_at: Instant,
}

impl Queue {
    fn push(&mut self, bytes: &[u8]) {
        self.length += bytes.len();
        self.pieces.push_back((Instant::now(), bytes.to_owned()));
    }

    /// Returns when the first byte may be written.
    fn due(&self, passage: Passage) -> Instant {
        let read_at = self.pieces.front().map_or_else(Instant::now, |(read_at, _)| *read_at);
        match passage {
            Passage::Delayed(delay) => read_at + delay,
            Passage::Limited(_) => self.free_at,
            _ => read_at,
        }
    }

    /// Writes as much of the first piece as the passage allows.
    fn send(&mut self, to: &TcpStream, passage: Passage) -> io::Result<()> {
        let Some((_, piece)) = self.pieces.front_mut() else { return Ok(()) };
        let rate = if let Passage::Limited(rate) = passage { Some(rate.max(1)) } else { None };
        let step = rate.map_or(u64::MAX, |rate| (rate / STEPS).max(1));
        let most = piece.len().min(usize::try_from(step).unwrap_or(usize::MAX));
        let written = to.try_write(&piece[..most])?;
        piece.drain(..written);
        if piece.is_empty() {
            self.pieces.pop_front();
        }
        self.length -= written;
        if let Some(rate) = rate {
            let taken = Duration::from_secs_f64(written as f64 / rate as f64);
            self.free_at = self.free_at.max(Instant::now()) + taken;
        }
        Ok(())
    }
}
