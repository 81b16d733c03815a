//! QEMU's machine protocol (QEMU, qmp-spec) for a QEMU that a bench started without libvirt. It sends one command at a
//! time.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xtask_core::limits;

use crate::libvirt::returned;

/// A connection to the monitor of a QEMU.
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the socket on which QEMU listens.
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connect to QEMU at {}", socket.display()))?;
        stream.set_read_timeout(Some(limits::QMP_ANSWER)).context("set the time limit of QEMU's answers")?;
        let mut qmp = Self { stream: BufReader::new(stream) };
        qmp.until("QMP")?;
        qmp.ask("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Sends a command and returns QEMU's answer. Events before the answer are skipped.
    pub(super) fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let question = json!({ "execute": command, "arguments": arguments }).to_string();
        let mut answer = || -> Result<Value> {
            writeln!(self.stream.get_mut(), "{question}")?;
            let mut line = self.line()?;
            while line.contains("\"event\":") {
                line = self.line()?;
            }
            returned(&line)
        };
        answer().with_context(|| format!("ask QEMU: {question}"))
    }

    /// Waits for a line that contains this word in quotes, for example an event or the greeting.
    pub(super) fn until(&mut self, word: &str) -> Result<()> {
        let word = format!("\"{word}\"");
        while !self.line().with_context(|| format!("wait for {word} from QEMU"))?.contains(&word) {}
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line).context("read QEMU's reply")?;
        ensure!(read > 0, "QEMU has closed its monitor");
        Ok(line)
    }
}
