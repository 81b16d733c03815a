//! The client of the workload: it connects to the port of a deployment and reads the answer of its program.

use std::io::{self, BufRead as _, BufReader, ErrorKind, Read as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Error, Result, ensure};
use xtask_core::limits;
use xtask_core::report::WorkloadEvidence;

use super::running::RunningVm;

/// The maximum number of bytes that are read of an answer.
const MAX_ANSWER: u64 = 4096;

impl RunningVm {
    /// Reads the answer of the deployment on a port of the guest.
    pub(super) fn answer_of(&self, guest_port: u16) -> Result<WorkloadEvidence> {
        answer_of(self.target.port_to(guest_port)?, self.ui.scaled(limits::WORKLOAD_ANSWER))
    }
}

/// Connects to a port of this host's loopback and reads an answer of one line. QEMU accepts each connection, and
/// closes it if nothing listens on the guest's port.
fn answer_of(port: u16, limit: Duration) -> Result<WorkloadEvidence> {
    let ask = || -> Result<WorkloadEvidence> {
        let stream = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), limit)?;
        stream.set_read_timeout(Some(limit))?;
        let mut line = String::new();
        BufReader::new(stream).take(MAX_ANSWER).read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "no answer");
        serde_json::from_str(&line).with_context(|| format!("read {line:?}"))
    };
    ask().with_context(|| format!("ask the workload behind port {port}"))
}

/// Returns whether the error is a timeout. Something may then still listen on the port.
pub(super) fn is_slow(error: &Error) -> bool {
    let cause = error.downcast_ref::<io::Error>();
    cause.is_some_and(|cause| matches!(cause.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn who_closes_is_gone_and_who_is_slow_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let answered = |answer: &'static [u8]| {
            let listener = listener.try_clone().unwrap();
            let thread = std::thread::spawn(move || listener.accept().unwrap().0.write_all(answer).unwrap());
            let answer = answer_of(port, limits::WORKLOAD_ANSWER);
            thread.join().unwrap();
            answer
        };
        let line = b"{\"machine\":\"aarch64\",\"boot_id\":\"b\",\"generation\":1,\"starts\":2}\n";
        assert_eq!(answered(line).unwrap().starts, 2);
        assert!(!is_slow(&answered(b"").unwrap_err()), "as QEMU does where the guest does not listen");
        let slow = answer_of(port, limits::WORKLOAD_ANSWER).unwrap_err();
        assert!(is_slow(&slow), "{slow:?}");
        drop(listener);
        assert!(!is_slow(&answer_of(port, limits::WORKLOAD_ANSWER).unwrap_err()));
    }
}
