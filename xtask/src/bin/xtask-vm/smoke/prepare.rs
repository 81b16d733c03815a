//! What a machine is made from, cold or out of a snapshot: broker, keys, disks, and which runs may be warm.

use anyhow::{Context, Result};
use xtask_core::arch::Accelerator;
use xtask_core::cli::Sabotage;
use xtask_core::error::{self, Failure};
use xtask_core::format::name_of;
use xtask_core::fs::write_private;
use xtask_core::host::tools;
use xtask_core::limits;
use xtask_core::machine::RunFiles;
use xtask_core::plan::Plan;
use xtask_fleet::Broker;
use xtask_images::Base;
use xtask_jobs::{Ui, child};

use super::options::RunOptions;
use super::run::Run;
use super::running::RunningVm;
use super::target::{Domain, Target};
use crate::guest::console::Console;
use crate::guest::ssh::Keys;
use crate::libvirt::{Hypervisor, Machine};

/// The parts of a machine that exist before its domain starts.
pub(super) struct Prepared {
    ui: Ui,
    pub(super) hypervisor: Hypervisor,
    pub(super) libvirt_version: String,
    pub(super) broker: Broker,
    pub(super) keys: Keys,
}

impl Prepared {
    pub(super) fn make(run: &Run<'_>, plan: &Plan) -> Result<Self> {
        let work = run.dir.work();
        let broker = Broker::start(&work, &run.device_id(), run.options.sabotage, &run.ui)?;
        let keys = Keys::make(&work, &plan.image.login_user, &run.ui)?;
        let hypervisor = Hypervisor::open(&run.dir.libvirt_root(), &run.cache)?;
        let libvirt_version = hypervisor.version()?;
        Ok(Self { ui: run.ui.clone(), hypervisor, libvirt_version, broker, keys })
    }

    pub(super) fn with(self, plan: Plan, files: RunFiles, domain: Domain, machine: Machine) -> RunningVm {
        let Self { ui, hypervisor, libvirt_version, broker, keys } = self;
        let console = Console::new(&files.console_log);
        let target = Target::new(hypervisor, domain, machine);
        RunningVm { ui, plan, files, target, snapshot: None, libvirt_version, keys, console, broker }
    }
}

/// Attributes the start of a machine that failed to the host, unless the error says otherwise: no guest code has run.
pub(super) fn not_started(error: anyhow::Error) -> anyhow::Error {
    let hint =
        "see the causes; nothing is known about the agent yet. Check this host with cargo xtask preflight";
    error::host_fault(error, "start the machine", hint)
}

/// Whether this run may come from a snapshot. KVM boots in seconds; and two faults are planted in the first boot itself.
pub(super) fn may_be_warm(options: &RunOptions<'_>, plan: &Plan) -> bool {
    let of_first_boot = matches!(options.sabotage, Some(Sabotage::KernelPanic | Sabotage::KillQemu));
    !options.cold && !of_first_boot && plan.accelerator() == Accelerator::Tcg
}

/// Refuses flags that need a warm run if the run is cold.
pub(super) fn check_flags(options: &RunOptions<'_>, plan: &Plan) -> Result<(), Failure> {
    let warm = may_be_warm(options, plan);
    let cannot = match options.sabotage {
        Some(Sabotage::StaleChain) if !warm => {
            "--sabotage stale-chain: needs a warm run, under emulation and without --cold"
        }
        Some(Sabotage::ColdPanics) => {
            "--sabotage cold-panics: needs --verify-cold, for it is planted in the cold one of the two runs"
        }
        _ if options.warm && !warm => {
            "--warm: not possible under KVM or with a fault of the first boot, where every run is cold"
        }
        _ => return Ok(()),
    };
    Err(Failure::usage(cannot))
}

/// Bytes of a guest's disk at least: a cloud image, a workload or two, and room for both.
const SMALLEST_DISK: u64 = 6 << 30;

/// What the guest writes to, fresh: the overlay over the image, the NVRAM as the firmware's template has it.
pub(crate) fn make_writable_files(plan: &Plan, files: &RunFiles, base: &Base, ui: &Ui) -> Result<()> {
    make_overlay(files, base, ui)?;
    write_private(&files.nvram, fs_err::read(&plan.firmware.vars_template)?)
}

/// The overlay over an image, or over a snapshot's disk.
pub(super) fn make_overlay(files: &RunFiles, base: &Base, ui: &Ui) -> Result<()> {
    let qemu_img = tools::require("qemu-img")?;
    let format = name_of(&base.format);
    let mut arguments = ["create", "-q", "-f", "qcow2", "-F", &format, "-b"].map(Into::into).to_vec();
    arguments.extend([base.disk.clone().into_os_string(), files.overlay.clone().into_os_string()]);
    // A cloud image is made to be grown: its root file system takes what the disk has at the first boot.
    arguments.push(base.virtual_bytes.max(SMALLEST_DISK).to_string().into());
    child::read(&qemu_img, &arguments, limits::SERVER_START, ui).context("make the disk's overlay")?;
    Ok(())
}
