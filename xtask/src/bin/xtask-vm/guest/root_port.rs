//! The commands that the guest runs as root, through a virtio-serial port. A service in the guest answers them
//! (`xtask/core/src/machine/iot-xtask-root.sh`, which also defines the form of a request and of its answer).

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use xtask_core::bail_guest;
use xtask_core::error::host_fault;

/// The maximum number of bytes that are read of an answer.
const MAX_ANSWER: usize = 1 << 20;

/// The host's end of the port. It sends one request at a time, because the guest answers them in order, and a guest
/// that boots answers late.
#[derive(Debug)]
pub(crate) struct RootPort {
    socket: PathBuf,
    connection: Option<Connection>,
    /// The number of requests so far. The number of a request is the word that its answer repeats.
    requests: u64,
    /// True if the guest has answered a request of this run.
    pub(crate) has_answered: bool,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
    /// The request that has no answer yet; `None` if there is none.
    pending: Option<Request>,
}

#[derive(Debug)]
struct Request {
    number: u64,
    command: String,
    /// The time after which the request is lost: the service in the guest was restarted while it ran the command.
    lost_at: Instant,
    /// False if the caller no longer needs the answer.
    is_wanted: bool,
}

impl RootPort {
    /// Returns the port of a QEMU that listens on `socket`.
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), connection: None, requests: 0, has_answered: false }
    }

    /// Connects to a QEMU that has just started. If this succeeds, the service in the guest waits for a request.
    /// Otherwise the service looks for a connection only once a second. If QEMU does not accept the connection,
    /// [`Self::ask`] reports the error.
    pub(crate) fn connect(&mut self) {
        self.connection = Connection::open(&self.socket).ok();
    }

    /// Closes the connection, because QEMU has ended.
    pub(crate) fn close(&mut self) {
        self.connection = None;
    }

    /// Drops the answer of a request that was sent earlier, because it may describe an earlier state of the guest.
    pub(crate) fn forget(&mut self) {
        if let Some(request) = self.connection.as_mut().and_then(|open| open.pending.as_mut()) {
            request.is_wanted = false;
        }
    }

    /// Sends a command, or continues to wait for the answer if the command was already sent. Returns `None` if there is
    /// no answer yet. The command is one line. The guest ends it after `limit`.
    ///
    /// # Errors
    /// Returns a failure of the host if QEMU does not accept or closes the connection, and a failure of the guest if an
    /// answer is too long.
    pub(crate) fn ask(&mut self, command: &str, limit: Duration) -> Result<Option<String>> {
        self.poll(command, limit).map_err(|error| {
            self.close();
            let attempted = format!("send a command to the guest through {}", self.socket.display());
            host_fault(error,
                attempted,
                "read QEMU's log (qemu.log in the report's directory, or /var/log/libvirt/qemu on a daemon's host), \
                 and run again",
            )
        })
    }

    fn poll(&mut self, command: &str, limit: Duration) -> Result<Option<String>> {
        let open = match &mut self.connection {
            Some(open) => open,
            closed => closed.insert(Connection::open(&self.socket)?),
        };
        open.receive()?;
        if let Some(pending) = open.pending.take() {
            match open.answer(pending.number) {
                None if Instant::now() > pending.lost_at => {}
                None => open.pending = Some(pending),
                Some(answer) => {
                    self.has_answered = true;
                    if pending.is_wanted && pending.command == command {
                        return Ok(Some(answer));
                    }
                }
            }
        }
        if open.pending.is_none() {
            self.requests += 1;
            writeln!(open.stream, "{} {} {command}", self.requests, limit.as_secs_f64())?;
            let command = command.to_owned();
            let lost_at = Instant::now() + 2 * limit;
            open.pending = Some(Request { number: self.requests, command, lost_at, is_wanted: true });
        }
        Ok(None)
    }
}

impl Connection {
    fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, received: Vec::new(), pending: None })
    }

    /// Reads the bytes that have arrived.
    fn receive(&mut self) -> Result<()> {
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => anyhow::bail!("QEMU has closed the port"),
                Ok(count) => self.received.extend(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
            if self.received.len() > MAX_ANSWER {
                bail_guest!(
                    "the guest has sent more than {MAX_ANSWER} bytes as the answer to a command";
                    "find out what writes to the port iot-xtask.root in the guest"
                );
            }
        }
    }

    /// Takes the answer of a request out of the received bytes. Bytes before it are an answer that is no longer needed.
    fn answer(&mut self, number: u64) -> Option<String> {
        let text = String::from_utf8_lossy(&self.received);
        let (_, after) = text.split_once(&format!("begin {number}\n"))?;
        let (answer, _) = after.split_once(&format!("end {number}\n"))?;
        let answer = answer.to_owned();
        self.received.clear();
        Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    const LIMIT: Duration = Duration::from_secs(30);

    /// Polls until the answer is there.
    fn answered(port: &mut RootPort, command: &str) -> String {
        let until = Instant::now() + LIMIT;
        loop {
            if let Some(answer) = port.ask(command, LIMIT).unwrap() {
                return answer;
            }
            assert!(Instant::now() < until, "no answer");
            std::thread::yield_now();
        }
    }

    /// Runs the guest's script with this host's bash, on a socket in place of the port.
    #[test]
    fn the_guests_script_answers_each_command_once() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("root.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut port = RootPort::new(&socket);
        assert_eq!(
            port.ask("echo early; echo lost >&2", LIMIT).unwrap(),
            None,
            "the guest has not booted yet"
        );
        let stream = listener.accept().unwrap().0;
        let script = include_str!("../../../../core/src/machine/iot-xtask-root.sh");
        let script =
            script.replace("until [ -c $port ]; do sleep 0.2; done\nexec 3<> $port\n", "exec 3>&0\n");
        assert!(script.contains("exec 3>&0"), "the script opens the port in another way");
        let mut guest = std::process::Command::new("bash")
            .args(["-c", &script])
            .stdin(std::os::fd::OwnedFd::from(stream))
            .spawn()
            .unwrap();
        port.forget();
        assert_eq!(answered(&mut port, "echo \"a  b\"; cat"), "a  b\n", "a command has no input");
        assert_eq!(answered(&mut port, "exit 3"), "");
        assert_eq!(port.ask("echo old", LIMIT).unwrap(), None);
        assert_eq!(answered(&mut port, "echo new"), "new\n");
        guest.kill().unwrap();
        guest.wait().unwrap();
        drop(listener);
        std::fs::remove_file(&socket).unwrap();
        let until = Instant::now() + LIMIT;
        while port.ask("true", LIMIT).is_ok() {
            assert!(Instant::now() < until, "the end of the port is not noticed");
        }
        assert!(port.ask("true", LIMIT).unwrap_err().to_string().contains("root.sock"));
    }
}
