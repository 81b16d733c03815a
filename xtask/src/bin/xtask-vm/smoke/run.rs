//! What every phase of a run uses and none changes: the workspace, the options, the cache, the run's directory, the
//! screen.

use std::path::Path;

use anyhow::Result;
use xtask_core::cache::Cache;
use xtask_core::error::Kind;
use xtask_core::runs::RunDir;
use xtask_core::workspace::Workspace;
use xtask_images::Store;
use xtask_jobs::Ui;

use super::options::RunOptions;
use super::times::Times;
use crate::guest::{begin_run, filesystem};
use crate::libvirt::paused::{TRANSCRIPT, XML};

/// In the run's directory: the disk of a guest whose file system is damaged.
const DAMAGED: &str = "damaged.qcow2";

/// One run, shared by its phases.
pub(crate) struct Run<'a> {
    /// The workspace under test.
    pub(crate) workspace: &'a Workspace,
    pub(crate) options: RunOptions<'a>,
    pub(crate) cache: Cache,
    pub(crate) dir: RunDir,
    pub(crate) ui: Ui,
    /// How long its phases usually take.
    pub(super) times: Times,
}

impl<'a> Run<'a> {
    /// Collects dead runs, and makes this run's directory.
    pub(crate) fn begin(workspace: &'a Workspace, options: RunOptions<'a>, ui: Ui) -> Result<Self> {
        let cache = Cache::from_env()?;
        let dir = begin_run(&cache, &ui)?;
        let times = Times::new(&cache, options.sabotage.is_some());
        Ok(Self { workspace, options, cache, dir, ui, times })
    }

    /// What this run's device is called on the bus.
    pub(super) fn device_id(&self) -> String {
        format!("dev-{}", self.dir.id())
    }

    /// The cache's images, for this run.
    pub(super) fn images(&self) -> Store<'_> {
        Store {
            cache: &self.cache,
            ui: &self.ui,
            offline: self.options.machine.image.offline,
            run: Some(&self.dir),
        }
    }

    /// Checks, with `--fsck`, the file systems of a machine without power; returns what a phase adds to its detail. A
    /// damaged disk is moved into the run's directory, with the domain that it belonged to.
    pub(super) fn check_disk(&self, disk: &Path) -> Result<String> {
        if !self.options.fsck {
            return Ok(String::new());
        }
        self.ui.tick("checking the guest's file systems")?;
        let checked = filesystem::check(disk, &self.dir.work(), &self.ui);
        if checked.as_ref().is_err_and(|error| Kind::Guest.is(error)) {
            let damaged = self.dir.path().join(DAMAGED);
            fs_err::rename(disk, &damaged)?;
            self.copy_evidence(self.dir.path())?;
        }
        Ok(format!("; {} file system(s) of the guest checked, no damage", checked?))
    }

    /// Copies the domain, QEMU's answers and the logs of the broker and of QEMU.
    pub(super) fn copy_evidence(&self, directory: &Path) -> Result<()> {
        let work = self.dir.work();
        for (from, to) in [
            (work.join(XML), XML),
            (work.join(TRANSCRIPT), TRANSCRIPT),
            (work.join("nats/nats.log"), "nats.log"),
            (work.join("v/log/qemu/vm.log"), "qemu.log"),
        ] {
            if from.exists() {
                fs_err::copy(&from, directory.join(to))?;
            }
        }
        Ok(())
    }
}
