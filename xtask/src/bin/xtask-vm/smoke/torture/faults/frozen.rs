//! The second snapshot: the machine while the workload runs, with the broker to which the agent was connected. It is made
//! and used by one run, in whose working directory it lies, because it contains the logins of this run.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use fs_err::os::unix::fs::FileExt as _;
use xtask_core::bail_host;
use xtask_core::fs::{make_private_dir, remove_file, write_private};
use xtask_core::image::Format;
use xtask_core::machine::RunFiles;
use xtask_core::report::EventKind;
use xtask_core::snapshot::{NVRAM, RAM};
use xtask_images::Base;

use super::super::super::prepare::{Access, make_overlay, reach};
use super::super::super::run::Run;
use super::super::super::running::RunningVm;
use super::super::super::target::{Domain, Driver};
use super::super::of_host;
use crate::libvirt::Condition;

/// The directory of the snapshot, in the run's working directory.
const DIRECTORY: &str = "workload-runs";
/// The directory of the broker in that of the snapshot.
const BROKER: &str = "broker";
/// The overlay of an episode, in the run's working directory.
const OVERLAY: &str = "episode.qcow2";

/// A machine whose workload runs, as each episode begins with it.
pub(super) struct Frozen {
    directory: PathBuf,
    /// The files of the machine of an episode. The disk of the frozen machine is the first of the backing files.
    files: RunFiles,
    virtual_bytes: u64,
}

impl Frozen {
    /// Stops the guest, and saves the machine and the broker. The machine is off afterwards, until it is restored.
    pub(super) fn save(run: &Run<'_>, vm: &mut RunningVm) -> Result<Self> {
        Self::made(run, vm).map_err(|error| of_host(error, "save the machine whose workload runs"))
    }

    fn made(run: &Run<'_>, vm: &mut RunningVm) -> Result<Self> {
        let directory = run.dir.work().join(DIRECTORY);
        make_private_dir(&directory)?;
        vm.target.stop_guest()?;
        vm.broker.keep(&directory.join(BROKER))?;
        vm.target.save(&directory)?;
        vm.root.close();
        write_private(&directory.join(NVRAM), fs_err::read(&vm.files.nvram)?)?;
        let disk = vm.files.overlay.clone();
        let mut files = vm.files.clone();
        files.overlay = run.dir.work().join(OVERLAY);
        files.backing.insert(0, disk.clone());
        let virtual_bytes = virtual_bytes(&disk)?;
        Ok(Self { directory, files, virtual_bytes })
    }

    /// Restores the machine and the broker, and sets the guest's clock. The agent finds that its connection to the broker
    /// is gone, and connects again.
    pub(super) fn restore(&self, run: &Run<'_>, vm: &mut RunningVm) -> Result<()> {
        self.started(run, vm).map_err(|error| of_host(error, "restore the machine whose workload runs"))?;
        vm.expect_no_reboot();
        set_clock(vm)
    }

    fn started(&self, run: &Run<'_>, vm: &mut RunningVm) -> Result<()> {
        if vm.target.condition() != Condition::Gone {
            vm.target.power_off()?;
        }
        vm.root.close();
        remove_file(&self.files.overlay)?;
        let base = Base {
            disk: self.files.backing[0].clone(),
            format: Format::Qcow2,
            virtual_bytes: self.virtual_bytes,
        };
        make_overlay(&self.files, &base, &run.ui)?;
        write_private(&self.files.nvram, fs_err::read(self.directory.join(NVRAM))?)?;
        vm.broker.go_back(&self.directory.join(BROKER))?;
        let access = Access { keys: &vm.keys, broker: &vm.broker, registry: vm.registry.as_ref() };
        let reach = reach(run, &vm.plan, access);
        let domain = Domain::write(&vm.plan, &self.files, &run.dir.work(), reach)?;
        let Driver::Embedded { hypervisor, .. } = vm.target.driver() else {
            bail_host!("a daemon restores no machine for torture"; "this is a bug of cargo xtask")
        };
        let memory = self.directory.join(RAM);
        let machine = domain.resume(hypervisor.restore_paused(&memory, &domain.xml, &domain.reach)?)?;
        vm.target.replace(Some(domain), machine);
        vm.files = self.files.clone();
        vm.root.connect();
        vm.record(EventKind::Boot, "the machine was restored with its running workload");
        Ok(())
    }
}

/// Returns the size of the disk that a qcow2 file contains (QEMU, docs/interop/qcow2.txt, header).
fn virtual_bytes(disk: &Path) -> Result<u64> {
    let mut bytes = [0; 8];
    fs_err::File::open(disk)?.read_exact_at(&mut bytes, 24)?;
    Ok(u64::from_be_bytes(bytes))
}

/// Sets the guest's clock to this host's time.
pub(super) fn set_clock(vm: &mut RunningVm) -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("read this host's clock")?;
    let limit = vm.plan.limits.guest_command();
    vm.run_as_root(&format!("date --set=@{}", now.as_secs_f64()), limit).map(drop)
}
