//! Snapshots of machines on a libvirt daemon of this host. Their files are in the cache, as those of the embedded driver.
//! The disk of a snapshot is also a volume of the daemon, which is named by its digest and stays there, as an image does.
//! The memory goes through a pipe, see `libvirt::daemon::memory`. The memory contains the UEFI variables.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use xtask_core::fs::make_private_dir;
use xtask_core::machine::RunFiles;
use xtask_core::plan::Plan;
use xtask_core::snapshot::{DISK, Platform, RAM, SEED};
use xtask_images::snapshots::Snapshot;

use super::on_daemon::{Begun, OnDaemon};
use super::prepare::Access;
use super::running::RunningVm;
use super::warm::Warm;
use crate::guest::tunnel::BROKER_IN_GUEST;
use crate::libvirt::Machine;
use crate::libvirt::daemon::run_domain::Layers;

impl Begun {
    /// Returns the platform of a snapshot, or the reason why this daemon makes none. Defines the domain.
    pub(super) fn platform(&mut self, plan: &Plan) -> Result<Platform, String> {
        let text = |error: anyhow::Error| format!("{error:#}");
        let Self { on_daemon, files, .. } = self;
        let Some(directory) = on_daemon.run_domain.directory().map_err(text)? else {
            return Err(format!("the storage pool {} is not a directory", plan.place.pool()));
        };
        on_daemon.define(plan, files, true, false).map_err(text)?;
        if let Some(reason) = on_daemon.run_domain.against_snapshots().map_err(text)? {
            return Err(reason);
        }
        let firmware = on_daemon.run_domain.firmware_to_select(&on_daemon.params)?;
        // A daemon in a container may have other files than this process.
        for path in [&plan.emulator, &firmware.code, &firmware.vars_template] {
            File::open(path).map_err(|error| format!("open {} of the daemon: {error}", path.display()))?;
        }
        let daemon = on_daemon.params.daemon.clone().map(|daemon| (daemon, directory));
        Ok(Platform { libvirt: self.libvirt_version.clone(), firmware, daemon })
    }
}

impl Warm<'_> {
    pub(super) fn restored_on_daemon(&self, mut begun: Begun, snapshot: &Snapshot) -> Result<RunningVm> {
        let Begun { parts, on_daemon, files, .. } = &mut begun;
        let restored = self.restore_on(on_daemon, parts.access(), files, snapshot);
        begun.with(self.plan, restored)
    }

    /// Makes the volumes of a machine, and restores it. QEMU's machine is compared with the domain before the guest runs.
    pub(super) fn restore_on(
        &self,
        on_daemon: &mut OnDaemon,
        access: Access<'_>,
        files: &mut RunFiles,
        snapshot: &Snapshot,
    ) -> Result<Machine> {
        let Self { run, plan, image, .. } = *self;
        let is_restricted = !on_daemon.keeps_internet;
        on_daemon.define(plan, files, is_restricted, true)?;
        let payload = run.dir.work().join("payload.img");
        self.make_payload(&payload, access, BROKER_IN_GUEST, snapshot)?;
        let saved = snapshot.manifest.files.get(DISK).context("the snapshot's manifest names no disk")?;
        let disk = snapshot.file(DISK);
        let layers = Layers { image, snapshot: Some((&saved.digest, &disk)) };
        on_daemon.make_disks(layers, [&snapshot.file(SEED), &payload], files)?;
        let machine = on_daemon.run_domain.start_paused(files)?;
        // From its next boot on, the machine waits for no memory.
        on_daemon.define(plan, files, is_restricted, false)?;
        on_daemon.write_xml()?;
        let loaded = on_daemon.run_domain.load_memory(&machine, &snapshot.file(RAM));
        loaded.map_err(|error| snapshot.does_not_restore(error))?;
        on_daemon.resume(machine)
    }

    /// Starts the machine for a snapshot, with an empty payload disk.
    pub(super) fn first_boot_on_daemon(
        &self,
        mut begun: Begun,
        payload_bytes: u64,
        made: &Path,
    ) -> Result<RunningVm> {
        let started = self.first_machine(&mut begun, payload_bytes, made);
        begun.with(self.plan, started)
    }

    fn first_machine(&self, begun: &mut Begun, payload_bytes: u64, made: &Path) -> Result<Machine> {
        let Self { plan, image, .. } = *self;
        let Begun { parts, on_daemon, files, .. } = begun;
        make_private_dir(made)?;
        let own = [made.join(SEED), made.join("payload.img")];
        let own = [own[0].as_path(), own[1].as_path()];
        self.make_neutral(&parts.keys, own, payload_bytes)?;
        on_daemon.define(plan, files, on_daemon.is_restricted_at_first(plan), false)?;
        on_daemon.make_disks(Layers { image, snapshot: None }, own, files)?;
        on_daemon.boot(files)
    }
}
