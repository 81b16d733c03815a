//! The consoles of a guest on a daemon, as streams of libvirt. Each stream is passed on to the file or the socket that a
//! guest of the embedded driver has on this host, so that all other code reads the same files.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::stream::Stream;
use xtask_core::fs::remove_file;
use xtask_core::machine::{MARKER_PORT, ROOT_PORT, RunFiles};

const BUFFER: usize = 4096;

/// The streams of one boot. They end with the domain, or with this value.
pub(super) struct Streams(Vec<Arc<Stream>>);

impl Streams {
    /// Opens the streams of a domain that has been started paused, so that the guest's first byte is not lost.
    pub(super) fn open(connect: &Connect, domain: &Domain, files: &RunFiles) -> Result<Self> {
        let console = stream(connect)?;
        domain
            .open_console(None, &console, virt::sys::VIR_DOMAIN_CONSOLE_FORCE)
            .context("open the guest's console")?;
        append(&console, &files.console_log, || {})?;
        let channel = |name: &str| {
            let channel = stream(connect)?;
            domain
                .open_channel(Some(name), &channel, virt::sys::VIR_DOMAIN_CHANNEL_FORCE)
                .with_context(|| format!("open the guest's port {name}"))?;
            anyhow::Ok(channel)
        };
        let markers = channel(MARKER_PORT)?;
        append(&markers, &files.markers_log, || {})?;
        let root = channel(ROOT_PORT)?;
        serve(&root, &files.root_socket)?;
        Ok(Self(vec![console, markers, root]))
    }

    /// Opens the console of a running domain, unless another client has it open. The output is appended to `log`. What is
    /// written to the returned socket is sent to the guest.
    pub(super) fn attach(connect: &Connect, domain: &Domain, log: &Path) -> Result<(Self, UnixStream)> {
        let console = stream(connect)?;
        domain
            .open_console(None, &console, virt::sys::VIR_DOMAIN_CONSOLE_SAFE)
            .context("open the guest's console")?;
        let (own, other) = UnixStream::pair().context("make a pair of sockets")?;
        let end = own.try_clone().context("duplicate a socket")?;
        // An error means that the other side has already closed its socket.
        append(&console, log, move || _ = end.shutdown(std::net::Shutdown::Both))?;
        let input = Arc::clone(&console);
        std::thread::spawn(move || send_until_closed(own, &input));
        Ok((Self(vec![console]), other))
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for stream in self.0.drain(..) {
            // An error means that the stream has already ended. The end wakes the stream's threads.
            let _ = Stream::clone(&stream).abort();
        }
    }
}

fn stream(connect: &Connect) -> Result<Arc<Stream>> {
    Ok(Arc::new(Stream::new(connect, 0).context("open a stream")?))
}

/// Returns the next bytes of a stream, or `None` at its end. A stream that breaks ends, too. Whether the connection
/// still exists is checked by the phases.
fn receive<'a>(stream: &Stream, buffer: &'a mut [u8; BUFFER]) -> Option<&'a [u8]> {
    let count = usize::try_from(stream.recv(buffer).ok()?).ok()?;
    (count > 0).then(|| &buffer[..count])
}

/// Appends what a stream receives to a file. Calls `end` at the end of the stream.
fn append(stream: &Arc<Stream>, path: &Path, end: impl FnOnce() + Send + 'static) -> Result<()> {
    let file = File::options().create(true).append(true).open(path);
    let mut file = file.with_context(|| format!("open {}", path.display()))?;
    let stream = Arc::clone(stream);
    std::thread::spawn(move || {
        let mut buffer = [0; BUFFER];
        while let Some(bytes) = receive(&stream, &mut buffer) {
            if file.write_all(bytes).is_err() {
                break;
            }
        }
        end();
    });
    Ok(())
}

/// Passes a stream on to a socket on this host, which has one client at a time.
fn serve(stream: &Arc<Stream>, socket: &Path) -> Result<()> {
    remove_file(socket)?;
    let listener = UnixListener::bind(socket).with_context(|| format!("listen on {}", socket.display()))?;
    let client = Arc::new(Mutex::new(None::<UnixStream>));
    let (output, to_client) = (Arc::clone(stream), Arc::clone(&client));
    std::thread::spawn(move || {
        let mut buffer = [0; BUFFER];
        while let Some(bytes) = receive(&output, &mut buffer) {
            let mut client = to_client.lock().unwrap_or_else(PoisonError::into_inner);
            // As with QEMU, the output is lost if there is no client.
            if client.as_mut().is_some_and(|client| client.write_all(bytes).is_err()) {
                *client = None;
            }
        }
        // The client sees the end of the port.
        if let Some(client) = to_client.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
    });
    let input = Arc::clone(stream);
    std::thread::spawn(move || {
        for accepted in listener.incoming().map_while(Result::ok) {
            let Ok(writer) = accepted.try_clone() else { continue };
            *client.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
            if send_until_closed(accepted, &input).is_none() {
                return;
            }
        }
    });
    Ok(())
}

/// Sends to the stream what a client writes. Returns `None` if the stream has ended.
fn send_until_closed(mut client: UnixStream, stream: &Stream) -> Option<()> {
    let mut buffer = [0; BUFFER];
    loop {
        let count = client.read(&mut buffer).unwrap_or(0);
        let mut rest = &buffer[..count];
        if rest.is_empty() {
            return Some(());
        }
        while !rest.is_empty() {
            let sent = usize::try_from(stream.send(rest).ok()?).ok()?;
            rest = &rest[sent..];
        }
    }
}
