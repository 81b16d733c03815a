//! QEMU's machine protocol (QEMU, qmp-spec) for the QEMU that a bench started without libvirt: one question at a time.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use xtask_core::limits;

use crate::libvirt::returned;

/// A monitor that somebody listens to.
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// At the socket where QEMU listens.
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connect to QEMU at {}", socket.display()))?;
        stream.set_read_timeout(Some(limits::QMP_ANSWER)).context("set the limit of QEMU's answers")?;
        let mut qmp = Self { stream: BufReader::new(stream) };
        qmp.until("QMP")?;
        qmp.ask("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// What QEMU answers; events before the answer are passed over.
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

    /// Waits for a line with this word in quotes: an event, the greeting.
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
