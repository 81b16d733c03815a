//! The guest of `bench delivery`: bare QEMU with a blank disk, a free slot for another disk, and a monitor. Commands
//! in the guest wait for the content that is delivered.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;
use xtask_core::fs::write_private;
use xtask_core::host::tools;
use xtask_core::limits;
use xtask_core::runs::RunDir;
use xtask_jobs::Ui;
use xtask_jobs::child::{Child, Job};

use super::super::bare::{Bare, Started};
use crate::guest::media;
use crate::guest::monitor::Qmp;
use crate::guest::ssh::Keys;
use crate::libvirt::forwarded_port;

/// The file in the guest for the delivered content.
pub(super) const DELIVERED: &str = "/run/delivered";

/// A booted guest, and the content to deliver.
pub(super) struct DeliveryGuest<'a> {
    /// A file with the content.
    pub(super) full: PathBuf,
    /// The disk that is attached from the start.
    pub(super) there: PathBuf,
    work: PathBuf,
    log: PathBuf,
    /// QEMU, which ends when this value is dropped.
    _qemu: Child,
    pub(super) qmp: PathBuf,
    pub(super) keys: Keys,
    pub(super) port: u16,
    pub(super) content: &'a [u8],
    pub(super) ui: &'a Ui,
}

impl<'a> DeliveryGuest<'a> {
    pub(super) fn boot(bare: &Bare<'a>, run: &RunDir, content: &'a [u8]) -> Result<Self> {
        let work = run.work();
        let (qmp, log) = (work.join("qmp.sock"), work.join("waiting.log"));
        let (there, full) = (work.join("there.img"), work.join("full.img"));
        media::make_blank(&there, content.len() as u64)?;
        write_private(&full, content)?;
        let disk = format!("if=virtio,format=raw,readonly=on,cache=none,file={}", there.display());
        let late = format!(
            "driver=raw,node-name=late,read-only=on,cache.direct=on,file.driver=file,file.filename={}",
            full.display()
        );
        let monitor = format!("unix:{},server=on,wait=off", qmp.display());
        let slot = "pcie-root-port,id=free,chassis=1";
        let more = ["-qmp", &monitor, "-drive", &disk, "-device", slot, "-blockdev", &late];
        let network = "user,id=net0,ipv6=off,hostfwd=tcp:127.0.0.1:0-:22";
        let started = bare.start(run, network, &more.map(str::to_owned))?;
        bare.until_finished(&started)?;
        let table = json!({ "command-line": "info usernet" });
        let table = Qmp::connect(&qmp, limits::QMP_ANSWER)?.ask("human-monitor-command", &table)?;
        let port = forwarded_port(table.as_str().context("read QEMU's table of its user network")?, 22)?;
        let Started { qemu, keys, .. } = started;
        Ok(Self { full, there, work, log, _qemu: qemu, qmp, keys, port, content, ui: bare.bench.ui })
    }

    pub(super) fn root(&self, command: &str) -> Result<String> {
        self.keys.run_as_root(self.port, command, limits::DELIVERY)
    }

    /// Starts the command `source` in the guest, which must print the delivered content. Returns when the command has
    /// started.
    pub(super) fn waiting(&self, source: &str) -> Result<Waiting<'_>> {
        write_private(&self.log, "")?;
        let mut arguments = self.keys.arguments(self.port);
        let limit = limits::DELIVERY.as_secs();
        let script = format!("echo {READY}; {{ {source}; }} > {DELIVERED}; echo {DONE}");
        arguments.push(format!("sudo -n timeout {limit} bash -c '{script}'").into());
        let ssh = tools::require("ssh")?;
        let (log, environment) = (self.log.clone(), Vec::new());
        let job = Job { program: &ssh, owner: &self.work, arguments, log, environment };
        let waiting = Waiting { child: Child::start(&job)?, log: &self.log, ui: self.ui };
        waiting.until(READY)?;
        Ok(waiting)
    }
}

/// The lines that a waiting command prints before and after the delivery.
const READY: &str = "ready";
const DONE: &str = "done";

/// A command in the guest that waits for the content.
pub(super) struct Waiting<'a> {
    child: Child,
    log: &'a Path,
    ui: &'a Ui,
}

impl Waiting<'_> {
    /// Waits until the command reports that it has the content.
    pub(super) fn delivered(&self) -> Result<()> {
        self.until(DONE)
    }

    fn until(&self, word: &str) -> Result<()> {
        while !self.output()?.lines().any(|line| line == word) {
            self.look()?;
        }
        Ok(())
    }

    /// Sleeps for a moment. Returns an error if the command has ended without the content.
    pub(super) fn look(&self) -> Result<()> {
        self.ui.check()?;
        if self.child.ended()?.is_some() && !self.output()?.lines().any(|line| line == DONE) {
            bail!("the guest did not receive the content; its output was {:?}", self.output()?);
        }
        std::thread::sleep(limits::CHILD_POLL);
        Ok(())
    }

    fn output(&self) -> Result<String> {
        Ok(fs_err::read_to_string(self.log)?)
    }
}
