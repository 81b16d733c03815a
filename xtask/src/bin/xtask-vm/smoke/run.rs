//! The values that all phases of a run share: the workspace, the options, the cache, the run's directory, the screen.

use std::cell::{Ref, RefCell};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use xtask_core::cache::Cache;
use xtask_core::error::{self, Kind};
use xtask_core::fs::{read_if_there, remove_file, write_atomically, write_private};
use xtask_core::machine::seed::PlantedFault;
use xtask_core::plan::Plan;
use xtask_core::report::{CONSOLE, MARKERS};
use xtask_core::runs::RunDir;
use xtask_core::workspace::Workspace;
use xtask_fleet::REGISTRY_LOG;
use xtask_images::Store;
use xtask_jobs::Ui;

use super::options::RunOptions;
use super::secrets::Secrets;
use super::times::Times;
use crate::guest::media::Plant;
use crate::guest::{begin_run, filesystem, tunnel};
use crate::libvirt::isolation;
use crate::libvirt::paused::{LIVE_XML, TRANSCRIPT, XML};

/// The file name, in the run's directory, of the disk of a guest with a damaged file system.
const DAMAGED: &str = "damaged.qcow2";

/// The file name, in the run's working directory, of the recorded writes.
const WRITE_LOG: &str = "writes.log";

/// The remedy if evidence cannot be written.
const ROOM: &str = "make room, or give --report another directory";

/// A run. Its phases share this value.
pub(crate) struct Run<'a> {
    /// The workspace under test.
    pub(crate) workspace: &'a Workspace,
    pub(crate) options: RunOptions<'a>,
    pub(crate) cache: Cache,
    pub(crate) dir: RunDir,
    pub(crate) ui: Ui,
    /// The usual times of the phases of this run.
    pub(super) times: Times,
    /// The errors that do not change the verdict of the run.
    warnings: RefCell<Vec<String>>,
    secrets: RefCell<Secrets>,
}

impl<'a> Run<'a> {
    /// Deletes the remains of dead runs, and makes this run's directory.
    ///
    /// # Errors
    /// Returns a failure of the host if the cache cannot be used.
    pub(crate) fn begin(workspace: &'a Workspace, options: RunOptions<'a>, ui: Ui) -> Result<Self> {
        let begun = Cache::open().and_then(|cache| Self::in_cache(cache, workspace, options, ui));
        begun.map_err(|error| {
            let hint =
                "see the causes; set IOT_XTASK_CACHE to a directory of this user with a short absolute path";
            error::host_fault(error, "make the run's directory in the cache", hint)
        })
    }

    pub(super) fn in_cache(
        cache: Cache,
        workspace: &'a Workspace,
        options: RunOptions<'a>,
        ui: Ui,
    ) -> Result<Self> {
        let ui = ui.with_timeout_scale(options.timeout_scale);
        let dir = begin_run(&cache, &ui)?;
        let is_faulty = options.sabotage.is_some()
            || options.plant.is_some()
            || options.agent_fault.is_some()
            || options.disturb.is_some();
        let times = Times::new(&cache, is_faulty);
        let (warnings, secrets) = (RefCell::default(), RefCell::default());
        Ok(Self { workspace, options, cache, dir, ui, times, warnings, secrets })
    }

    /// Returns the fault of `torture` to plant in the guest, if any.
    pub(super) fn plant(&self, plan: &Plan) -> Result<Option<Plant>> {
        let make = |fault| Plant::make(fault, self.workspace, &self.cache, plan.spec.architecture);
        let RunOptions { plant, agent_fault, .. } = self.options;
        let fault = plant.map(PlantedFault::Durability).or(agent_fault.map(PlantedFault::Agent));
        fault.map(make).transpose()
    }

    /// Shows a warning, and keeps it for the report.
    pub(super) fn warn(&self, text: &str) {
        let text = self.secrets.borrow().hide_in(text);
        self.ui.line(&format!("warning: {text}"));
        self.warnings.borrow_mut().push(text);
    }

    /// Warns, also in the report, if the guest can use services of this host's loopback while it reaches the internet.
    pub(super) fn note_services(&self) {
        if let Some(sentence) = isolation::services_in_reach() {
            self.warn(&sentence);
        }
    }

    /// Hides these secrets in the reports and logs of the run.
    pub(super) fn hide<'s>(&self, secrets: impl IntoIterator<Item = &'s str>) {
        self.secrets.borrow_mut().add(secrets);
    }

    pub(super) fn secrets(&self) -> Ref<'_, Secrets> {
        self.secrets.borrow()
    }

    /// Hides the secrets in the logs that QEMU writes into the run's directory. Their length stays the same, and QEMU
    /// appends to them, so this is possible while a machine that is kept runs.
    pub(super) fn hide_in_logs(&self) {
        for log in [CONSOLE, MARKERS] {
            let path = self.dir.path().join(log);
            let hidden = hide_in_place(&path, &self.secrets.borrow());
            if let Err(error) = hidden {
                self.warn(&format!("a secret may be in the log: {error:#}"));
            }
        }
    }

    /// Writes evidence without the secrets. If this fails, adds a warning.
    pub(super) fn keep(&self, path: &Path, content: Vec<u8>) {
        if let Err(error) = write_atomically(path, self.secrets.borrow().hide(content)) {
            self.warn(&format!("the evidence is incomplete: {error:#}; {ROOM}"));
        }
    }

    /// Returns the warnings since the last call, for the report.
    pub(super) fn take_warnings(&self) -> Vec<String> {
        self.warnings.take()
    }

    /// Returns the id of this run's device on the bus.
    pub(super) fn device_id(&self) -> String {
        format!("dev-{}", self.dir.id())
    }

    /// Returns the file in which the writes to the guest's disk are recorded; `None` if they are not recorded.
    pub(super) fn write_log(&self) -> Option<PathBuf> {
        self.options.records.then(|| self.dir.work().join(WRITE_LOG))
    }

    /// Returns the store of images, for use by this run.
    pub(super) fn images(&self) -> Store<'_> {
        Store {
            cache: &self.cache,
            ui: &self.ui,
            offline: self.options.machine.image.offline,
            run: Some(&self.dir),
        }
    }

    /// If `--fsck` is given, checks the file systems of a machine that is off. Returns the text that a phase adds to
    /// its detail. A damaged disk is moved into the run's directory, and the definition of its domain is copied there.
    pub(super) fn check_disk(&self, disk: &Path) -> Result<String> {
        if !self.options.fsck {
            return Ok(String::new());
        }
        self.ui.tick("checking the guest's file systems")?;
        let checked = filesystem::check(disk, &self.dir.work(), &self.ui);
        if checked.as_ref().is_err_and(|error| Kind::Guest.is(error)) {
            let damaged = self.dir.path().join(DAMAGED);
            if let Err(error) = fs_err::rename(disk, &damaged) {
                self.warn(&format!("the damaged disk is not kept: {error:#}"));
            }
            self.copy_evidence(self.dir.path());
        }
        Ok(format!("; {} file system(s) of the guest checked, no damage", checked?))
    }

    /// Copies the domain, QEMU's answers, and the logs of the servers and of QEMU into `directory`.
    pub(super) fn copy_evidence(&self, directory: &Path) {
        let work = self.dir.work();
        for (from, to) in [
            (work.join(XML), XML),
            (work.join(TRANSCRIPT), TRANSCRIPT),
            (work.join("nats/nats.log"), "nats.log"),
            (work.join(REGISTRY_LOG), "registry.log"),
            (work.join("v/log/qemu/vm.log"), "qemu.log"),
            (work.join(tunnel::LOG), tunnel::LOG),
            (work.join(LIVE_XML), LIVE_XML),
        ] {
            self.copy(&from, &directory.join(to));
        }
    }

    /// Copies a file of the run, if it exists. If the copy fails, adds a warning.
    pub(super) fn copy(&self, from: &Path, to: &Path) {
        if let Err(error) = copy_whole(from, to, &self.secrets.borrow()) {
            self.warn(&format!("the evidence is incomplete: {error:#}; {ROOM}"));
        }
    }
}

/// Hides the secrets in a file, if it exists, without changing its length.
fn hide_in_place(path: &Path, secrets: &Secrets) -> Result<()> {
    let Some(content) = read_if_there(path)? else { return Ok(()) };
    let hidden = secrets.hide(content.clone());
    if hidden != content {
        fs_err::OpenOptions::new().write(true).open(path)?.write_all(&hidden)?;
    }
    Ok(())
}

/// Copies a file if it exists. If the copy fails, deletes the incomplete copy, because the report needs the space on a
/// full disk.
fn copy_whole(from: &Path, to: &Path, secrets: &Secrets) -> Result<()> {
    if !from.exists() {
        return Ok(());
    }
    let Err(error) = copy_private(from, to, secrets) else { return Ok(()) };
    Err(match remove_file(to) {
        Ok(()) => error,
        Err(left) => error.context(format!("a part of the copy is left: {left:#}")),
    })
}

/// Copies a file without the secrets to a file that only this user may read, because other users may read the
/// directory of `--report`.
fn copy_private(from: &Path, to: &Path, secrets: &Secrets) -> Result<()> {
    write_private(to, secrets.hide(fs_err::read(from)?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_copy_that_fails_leaves_no_part_of_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        copy_whole(&from, &to, &Secrets::default()).unwrap();
        assert!(!to.exists(), "there was nothing to copy");
        std::fs::write(&from, "console").unwrap();
        copy_whole(&from, &to, &Secrets::default()).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "console");
        assert_eq!(to.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        // This file can be opened, but its first bytes cannot be read.
        copy_whole(Path::new("/proc/self/mem"), &to, &Secrets::default()).unwrap_err();
        assert!(!to.exists(), "a part of the copy is left");
    }
}
