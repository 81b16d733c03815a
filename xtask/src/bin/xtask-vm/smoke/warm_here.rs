//! Snapshots of machines of libvirt's embedded driver.

use std::path::Path;

use anyhow::Result;
use xtask_core::cli::Sabotage;
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::image::Format;
use xtask_core::machine::{CONSOLE_SOCKET, HOST_FROM_GUEST, ROOT_SOCKET, RunFiles, xml};
use xtask_core::snapshot::{DISK, NVRAM, RAM, SEED};
use xtask_images::Base;
use xtask_images::snapshots::Snapshot;

use super::prepare::{Access, Prepared, make_overlay, make_writable_files, reach};
use super::running::RunningVm;
use super::target::Domain;
use super::warm::Warm;
use crate::libvirt::{Hypervisor, Machine};

impl Warm<'_> {
    pub(super) fn restored_here(&self, prepared: Prepared, snapshot: &Snapshot) -> Result<RunningVm> {
        let files = self.own_files(snapshot)?;
        let access = prepared.parts.access();
        let (domain, machine) = self.machine_here(&prepared.hypervisor, access, &files, snapshot)?;
        Ok(prepared.with(self.plan.clone(), files, domain, machine))
    }

    /// Returns the files of a run that uses this snapshot.
    pub(super) fn own_files(&self, snapshot: &Snapshot) -> Result<RunFiles> {
        let dir = &self.run.dir;
        let mut files = RunFiles::of_run(&dir.work(), dir.path().join("console.log"))?;
        files.backing = vec![snapshot.file(DISK), self.image.disk.clone()];
        // Later boots read the seed too. It has the same instance id, so cloud-init does not treat them as first
        // boots.
        files.seed = snapshot.file(SEED);
        files.uuid.clone_from(&snapshot.manifest.uuid);
        Ok(files)
    }

    /// Makes the disks of a machine, and restores it. QEMU's machine is compared with the domain before the guest
    /// runs.
    pub(super) fn machine_here(
        &self,
        hypervisor: &Hypervisor,
        access: Access<'_>,
        files: &RunFiles,
        snapshot: &Snapshot,
    ) -> Result<(Domain, Machine)> {
        let Self { run, plan, image, .. } = *self;
        let work = run.dir.work();
        self.make_payload(&files.payload, access, HOST_FROM_GUEST, snapshot)?;
        let virtual_bytes = image.virtual_bytes;
        let base = Base { disk: snapshot.file(DISK), format: Format::Qcow2, virtual_bytes };
        make_overlay(files, &base, &run.ui)?;
        write_private(&files.nvram, fs_err::read(snapshot.file(NVRAM))?)?;
        let mut domain = Domain::write(plan, files, &work, reach(run, plan, access))?;
        domain.record_writes(run.write_log());
        let mut xml = domain.xml.clone();
        if run.options.sabotage == Some(Sabotage::StaleChain) {
            xml = xml::with_stale_chain(&xml, &files.overlay, &image.disk);
        }
        let restored = hypervisor.restore_paused(&snapshot.file(RAM), &xml, &domain.reach);
        let machine = domain.resume(restored.map_err(|error| snapshot.does_not_restore(error))?)?;
        Ok((domain, machine))
    }

    /// Starts the machine for a snapshot, with an empty payload disk.
    pub(super) fn first_boot_here(
        &self,
        prepared: Prepared,
        payload_bytes: u64,
        made: &Path,
    ) -> Result<RunningVm> {
        let Self { run, plan, image, .. } = *self;
        make_private_dir(made)?;
        let mut files = RunFiles::of_run(made, run.dir.path().join("console.log"))?;
        files.backing = vec![image.disk.clone()];
        files.console_socket = run.dir.work().join(CONSOLE_SOCKET);
        files.root_socket = run.dir.work().join(ROOT_SOCKET);
        self.make_neutral(&prepared.parts.keys, [&files.seed, &files.payload], payload_bytes)?;
        make_writable_files(plan, &files, &image.base(), &run.ui)?;
        let reach = prepared.reach_of_first_boot(run, plan);
        let domain = Domain::write(plan, &files, &run.dir.work(), reach)?;
        let machine = domain.start(&prepared.hypervisor)?;
        Ok(prepared.with(plan.clone(), files, domain, machine))
    }
}
