//! QEMU's machine protocol (QEMU, qmp-spec) without libvirt, one command at a time: for a QEMU of a bench, and for the
//! state of an instance. libvirt cannot be asked for this state, because it ends the QEMU of a guest that is off when
//! its root is opened. The binary `xtask` uses this file, too.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Value, json};
use xtask_core::fs::directories;
use xtask_core::processes::emulator;
use xtask_core::runs::instance::Instance;
pub(crate) use xtask_core::runs::listing::State;
use xtask_core::{bail_host, limits};

/// The directory in which libvirt makes the directory of each QEMU, below the run's working directory.
const MONITORS: &str = "v/lib/qemu";

/// Returns the state of an instance. If its QEMU does not answer, the instance counts as running, because libvirt is
/// then connected to QEMU for another command that starts or stops the instance. The state of an instance on a libvirt
/// daemon is unknown here.
pub(crate) fn state(instance: &Instance) -> State {
    if instance.machine.daemon.is_some() {
        return State::Unknown;
    }
    let work = instance.work();
    if emulator(&work).is_none() {
        return State::Off;
    }
    let sockets = directories(&work.join(MONITORS)).into_iter().map(|domain| domain.join("monitor.sock"));
    let reported = sockets.map(|socket| {
        let answer = Qmp::connect(&socket, limits::QEMU_STATE)?.ask("query-status", &json!({}))?;
        anyhow::Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    });
    match reported.flatten().next().as_deref() {
        None | Some("running") => State::Running,
        Some("shutdown") => State::Off,
        Some(other) => State::Stopped(other.to_owned()),
    }
}

/// Returns an error if the guest is off, or if QEMU has stopped it. A guest on a libvirt daemon is not checked
/// here. If it is off, ssh cannot enter it.
pub(crate) fn check_running(instance: &Instance, attempted: &str) -> Result<()> {
    match state(instance) {
        State::Running | State::Unknown => Ok(()),
        State::Off => Err(instance.off(attempted).into()),
        State::Stopped(state) => bail_host!(
            "{attempted}: QEMU has stopped the guest, and its state is {state}";
            "if the state is io-error, free space on the file system with {}; then use cargo xtask vm power-cut {} and \
             cargo xtask vm start",
            instance.work().display(), instance.machine.name
        ),
    }
}

/// A connection to the monitor of a QEMU.
pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the socket on which QEMU listens. `limit` is the limit of each answer.
    ///
    /// # Errors
    /// Returns an error at once if QEMU's queue of connections is full. A blocking connect(2) would wait.
    pub(crate) fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let connected = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            let stream = UnixStream::from(socket);
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(limit)).map(|()| stream)
        };
        let stream = connected().with_context(|| format!("connect to QEMU at {}", path.display()))?;
        let mut qmp = Self { stream: BufReader::new(stream) };
        qmp.until("QMP")?;
        qmp.ask("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Sends a command and returns QEMU's answer. Events before the answer are skipped.
    pub(crate) fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
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
    pub(crate) fn until(&mut self, word: &str) -> Result<()> {
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

/// Returns the value in QEMU's answer, or QEMU's description of its error.
pub(crate) fn returned(answer: &str) -> Result<Value> {
    let mut answer: Value = serde_json::from_str(answer).context("parse QEMU's answer")?;
    if let Some(value) = answer.get_mut("return") {
        return Ok(value.take());
    }
    let described = answer["error"]["desc"].as_str();
    bail!("{}", described.unwrap_or("QEMU's answer has neither a value nor an error"))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::process::{Child, Command};

    use xtask_core::arch::VmArchitecture;
    use xtask_core::fs::make_private_dir;
    use xtask_core::runs::instance::InstanceRecord;

    use super::*;

    /// An instance with a process in place of its QEMU, which has the pid file open as QEMU has.
    pub(crate) struct Stand {
        pub(crate) instance: Instance,
        qemu: Child,
        _directory: tempfile::TempDir,
    }

    impl Stand {
        pub(crate) fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let pid_file = directory.path().join("w/v/run/qemu/vm.pid");
            make_private_dir(pid_file.parent().unwrap()).unwrap();
            std::fs::write(&pid_file, "").unwrap();
            let qemu =
                Command::new("sleep").arg("600").stdin(File::open(&pid_file).unwrap()).spawn().unwrap();
            std::fs::write(&pid_file, format!("{}\n", qemu.id())).unwrap();
            let machine = InstanceRecord {
                schema: xtask_core::runs::instance::SCHEMA,
                id: "1124-100000-0001".to_owned(),
                name: "dev".to_owned(),
                arch: VmArchitecture::Aarch64,
                image: "debian-12".to_owned(),
                made_at: "2026-11-24T10:00:00Z".to_owned(),
                login_user: "debian".to_owned(),
                ssh_port: Some(40022),
                console: directory.path().join("console.log"),
                daemon: None,
            };
            let instance = Instance { machine, directory: directory.path().to_owned() };
            Self { instance, qemu, _directory: directory }
        }

        /// Returns the path of the monitor of the domain with this number.
        fn monitor(&self, number: u32) -> PathBuf {
            let directory = self.instance.work().join(MONITORS).join(format!("domain-{number}-vm"));
            make_private_dir(&directory).unwrap();
            directory.join("monitor.sock")
        }

        /// Answers each question for the state with `status`, as a QEMU does.
        pub(crate) fn answer(&self, status: &'static str) {
            let listener = UnixListener::bind(self.monitor(2)).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming().map(Result::unwrap) {
                    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                    let say = |line: &str| writeln!(&stream, "{line}").unwrap();
                    say(r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}"#);
                    let event = r#"{"timestamp": {}, "event": "SHUTDOWN", "data": {"guest": true}}"#;
                    let state = format!(r#"{{"return": {{"status": "{status}", "running": false}}}}"#);
                    for answer in [r#"{"return": {}}"#, &state] {
                        if lines.next().is_none() {
                            break;
                        }
                        say(event);
                        say(answer);
                    }
                }
            });
        }
    }

    impl Drop for Stand {
        fn drop(&mut self) {
            self.qemu.kill().and_then(|()| self.qemu.wait()).unwrap();
        }
    }

    #[test]
    fn a_guest_that_has_shut_down_is_off_although_its_qemu_runs() {
        for (status, state, shown) in [
            ("shutdown", State::Off, "off      |"),
            ("running", State::Running, "running  |"),
            ("io-error", State::Stopped("io-error".to_owned()), "io-error |"),
        ] {
            let stand = Stand::new();
            // libvirt may have left the directory of an earlier QEMU.
            drop(UnixListener::bind(stand.monitor(1)).unwrap());
            stand.answer(status);
            let found = super::state(&stand.instance);
            assert_eq!((&found, format!("{found:<8} |").as_str()), (&state, shown));
        }
        let mut ended = Stand::new();
        ended.answer("running");
        ended.qemu.kill().and_then(|()| ended.qemu.wait()).unwrap();
        assert_eq!(super::state(&ended.instance), State::Off, "its QEMU has ended");
    }

    /// While libvirt is connected, QEMU does not answer a second connection, and a third one cannot even wait.
    #[test]
    fn a_qemu_that_libvirt_talks_to_is_not_waited_for() {
        let stand = Stand::new();
        let listener = UnixListener::bind(stand.monitor(1)).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        assert_eq!(super::state(&stand.instance), State::Running);
        assert_eq!(super::state(&stand.instance), State::Running);
    }

    #[test]
    fn an_answer_of_qemus_is_its_value_or_its_error() {
        assert_eq!(returned(r#"{"return":{"running":false},"id":"libvirt-9"}"#).unwrap()["running"], false);
        let refused = r#"{"id":"libvirt-9","error":{"class":"GenericError","desc":"no such property"}}"#;
        assert_eq!(returned(refused).unwrap_err().to_string(), "no such property");
        assert!(returned("{}").is_err());
    }
}
