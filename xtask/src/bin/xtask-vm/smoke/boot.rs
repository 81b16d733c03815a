//! From nothing to a guest whose userspace is up: broker, keys, disks, NVRAM, domain; and KVM that does not work.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xtask_core::arch::Accelerator;
use xtask_core::build::Agent;
use xtask_core::cli::Sabotage;
use xtask_core::error::{self, Failure, Kind};
use xtask_core::fs::write_private;
use xtask_core::host::{kvm, tools};
use xtask_core::limits;
use xtask_core::machine::seed::{PayloadTime, Seed, marker};
use xtask_core::machine::{RunFiles, xml};
use xtask_core::plan::Plan;
use xtask_core::processes::emulator;
use xtask_core::readback::ExpectedMachine;

use super::{RunningVm, Session, warm};
use crate::guest::console::Console;
use crate::guest::media;
use crate::guest::ssh::Keys;
use crate::libvirt::paused;
use crate::libvirt::{Condition, Hypervisor, Machine};
use xtask_fleet::Broker;
use xtask_images::{Base, ReadyImage};
use xtask_jobs::{Ui, child};

/// What is put into the guest.
pub(super) enum Payload<'a> {
    /// The executable under test, and the archive of the image that it is to run.
    Agent(&'a Agent, &'a [u8]),
    /// Nothing: a machine to work in.
    Nothing,
}

impl Payload<'_> {
    pub(super) fn as_pair(&self) -> Option<(&Agent, &[u8])> {
        match *self {
            Self::Agent(agent, workload) => Some((agent, workload)),
            Self::Nothing => None,
        }
    }
}

/// What there is of a run's machine before there is the machine.
pub(super) struct Prepared {
    pub(super) hypervisor: Hypervisor,
    device_id: String,
    pub(super) broker: Broker,
    pub(super) keys: Keys,
}

impl Prepared {
    pub(super) fn make(session: &mut Session<'_>, plan: &Plan) -> Result<Self> {
        let work = session.run.work();
        let device_id = format!("dev-{}", session.run.id());
        let broker = Broker::start(&work, &device_id, session.args.sabotage, &session.ui)?;
        let keys = Keys::make(&work, &plan.image.login_user, &session.ui)?;
        let hypervisor = Hypervisor::open(&session.run.libvirt_root(), &session.cache)?;
        session.report.host.libvirt = Some(hypervisor.version()?);
        Ok(Self { hypervisor, device_id, broker, keys })
    }

    pub(super) fn with(self, plan: Plan, files: RunFiles, domain: Domain, machine: Machine) -> RunningVm {
        let Self { hypervisor, device_id, broker, keys } = self;
        let console = Console::new(&files.console_log);
        RunningVm { plan, files, domain, hypervisor, machine, keys, device_id, console, broker }
    }
}

impl RunningVm {
    /// From nothing to a guest whose userspace runs cloud-init's last stage.
    pub(super) fn boot(
        session: &mut Session<'_>,
        plan: Plan,
        image: &ReadyImage,
        subject: &Payload<'_>,
    ) -> Result<(Self, String)> {
        if warm::may_be(session.args, &plan) {
            return Self::restore(session, plan, image, subject);
        }
        let started = Self::start(session, plan, image, subject);
        let mut vm = started.map_err(|error| {
            let hint = "see the causes; nothing is known about the agent yet. Check this host with cargo xtask preflight";
            error::host_fault(error, "start the machine and its broker", hint)
        })?;
        let outcome = vm.reach_userspace(session, image);
        match outcome {
            Ok(detail) => Ok((vm, detail)),
            Err(error) => {
                // Teardown wants it, the console's tail too.
                session.vm = Some(vm);
                Err(error)
            }
        }
    }

    /// Broker, keys, disks, NVRAM, domain.
    fn start(
        session: &mut Session<'_>,
        mut plan: Plan,
        image: &ReadyImage,
        subject: &Payload<'_>,
    ) -> Result<Self> {
        let sabotage = session.args.sabotage;
        let work = session.run.work();
        let prepared = Prepared::make(session, &plan)?;
        let mut files = RunFiles::of_run(&work, session.run.path().join("console.log"))?;
        files.backing = vec![image.disk.clone()];
        let seed = Seed {
            instance_id: session.run.id(),
            login_user: &plan.image.login_user,
            authorized_key: &prepared.keys.user_public,
            host_private_key: &prepared.keys.host_private,
            host_public_key: &prepared.keys.host_public,
            sabotage,
            payload: PayloadTime::AtFirstBoot,
        };
        media::make_seed(&files.seed, &seed, &work, &session.ui)?;
        let config = prepared.broker.agent_config();
        let payload =
            media::PayloadDisk { subject: subject.as_pair(), config: &config, sabotage, restored: None };
        media::make_payload(&files.payload, session.workspace, &payload, &work, &session.ui)?;
        make_writable_files(&plan, &files, &image.base(), &session.ui)?;
        let mut domain = Domain::write(&plan, &files, &work)?;
        let machine = match domain.start(&prepared.hypervisor) {
            // Another error (no memory, a CPU model that KVM lacks) is not KVM's fault, and emulation would not help.
            Err(error) if plan.accelerator() == Accelerator::Kvm && blames_kvm(&error) => {
                give_up_kvm(session, &mut plan, &format!("KVM does not start the machine: {error:#}"))?;
                domain = Domain::write(&plan, &files, &work)?;
                domain.start(&prepared.hypervisor)
            }
            started => started,
        }?;
        Ok(prepared.with(plan, files, domain, machine))
    }

    fn reach_userspace(&mut self, session: &mut Session<'_>, image: &ReadyImage) -> Result<String> {
        if self.plan.accelerator() == Accelerator::Kvm {
            self.see_kvm_work(session, image)?;
        }
        let work = session.run.work();
        let kill = session.args.sabotage == Some(Sabotage::KillQemu);
        self.wait(session, "the guest's userspace", self.limits().boot(), |vm| {
            if kill && vm.kernel_has_spoken() {
                let qemu = emulator(&work).context("find the run's QEMU to plant the fault")?;
                qemu.kill().context("plant the fault")?;
            }
            Ok(vm.console.line_with(marker::STARTED).map(drop))
        })?;
        Ok(format!("{}, {}", self.plan.accelerator(), session.report.guest.cpu))
    }

    /// A KVM that never runs the kernel is written down and, where KVM was not asked for by name, replaced.
    fn see_kvm_work(&mut self, session: &mut Session<'_>, image: &ReadyImage) -> Result<()> {
        let limit = self.limits().first_kernel_line();
        let waited = self.wait(session, "the kernel's first line under KVM", limit, |vm| {
            Ok(vm.kernel_has_spoken().then_some(()))
        });
        let Err(error) = waited else { return kvm::forget_failure(&session.cache) };
        // A firmware that says that the image does not boot has run, and would say so under emulation too. A dead QEMU
        // or broker is not KVM's fault either. What is left: silence, or a guest that KVM stopped.
        let condition = self.machine.condition();
        if Kind::Interrupted.is(&error) || self.console.fault().is_some() || condition == Condition::Gone {
            return Err(error);
        }
        self.broker.check()?;
        let reason = format!("/dev/kvm opens, but does not run the guest's kernel: {error}");
        self.machine.destroy()?;
        give_up_kvm(session, &mut self.plan, &reason)?;
        make_writable_files(&self.plan, &self.files, &image.base(), &session.ui)?;
        self.domain = Domain::write(&self.plan, &self.files, &session.run.work())?;
        self.console.new_boot()?;
        self.machine = self.domain.start(&self.hypervisor)?;
        Ok(())
    }
}

/// Writes down that KVM does not work here, and goes over to emulation where KVM was not asked for by name.
fn give_up_kvm(session: &mut Session<'_>, plan: &mut Plan, reason: &str) -> Result<()> {
    // libvirt passes on all that QEMU said; its first line says why.
    let reason = reason.lines().next().unwrap_or(reason).to_owned();
    kvm::remember_failure(&session.cache, &reason)?;
    if !plan.may_fall_back() {
        let hint = "leave out --accel to have the guest emulated".to_owned();
        return Err(Failure::host(reason, hint).into());
    }
    session.ui.line(&format!("{reason}: starting again under emulation"));
    *plan = plan.under_tcg(&reason);
    session.describe_accelerator(plan);
    session.limit = Some(plan.limits.boot());
    Ok(())
}

/// QEMU and libvirt name KVM where it is KVM that fails.
fn blames_kvm(error: &anyhow::Error) -> bool {
    format!("{error:#}").to_lowercase().contains("kvm")
}

/// Bytes of a guest's disk at least: a cloud image, a workload or two, and room for both.
const SMALLEST_DISK: u64 = 6 << 30;

/// What the guest writes to, fresh: the overlay over the image, the NVRAM as the firmware's template has it.
pub(crate) fn make_writable_files(plan: &Plan, files: &RunFiles, base: &Base, ui: &Ui) -> Result<()> {
    make_overlay(files, base, ui)?;
    let template = &plan.firmware.vars_template;
    let content = std::fs::read(template).with_context(|| format!("read {}", template.display()))?;
    write_private(&files.nvram, content)
}

/// The overlay over an image, or over a snapshot's disk.
pub(super) fn make_overlay(files: &RunFiles, base: &Base, ui: &Ui) -> Result<()> {
    let qemu_img = tools::require("qemu-img")?;
    let mut arguments =
        ["create", "-q", "-f", "qcow2", "-F", base.format.name(), "-b"].map(Into::into).to_vec();
    arguments.extend([base.disk.clone().into_os_string(), files.overlay.clone().into_os_string()]);
    // A cloud image is made to be grown: its root file system takes what the disk has at the first boot.
    arguments.push(base.virtual_bytes.max(SMALLEST_DISK).to_string().into());
    child::read(&qemu_img, &arguments, limits::SERVER_START, ui).context("make the disk's overlay")?;
    Ok(())
}

/// The domain as it was written, for each of its boots.
pub(super) struct Domain {
    pub(super) xml: String,
    pub(super) expected: ExpectedMachine,
    work: PathBuf,
}

impl Domain {
    /// From the plan; its XML, and what must become of it, are in the run's working directory, for `vm start` too.
    pub(super) fn write(plan: &Plan, files: &RunFiles, work: &Path) -> Result<Self> {
        let params = plan.domain(files);
        let xml = xml::domain_xml(&params);
        write_private(&work.join(paused::XML), &xml)?;
        let expected = ExpectedMachine::of(&params, &plan.firmware)?;
        write_private(&work.join(paused::EXPECTED), serde_json::to_string_pretty(&expected)?)?;
        Ok(Self { xml, expected, work: work.to_owned() })
    }

    /// Starts it paused, sees that QEMU made of it what it says, and lets the guest run.
    pub(super) fn start(&self, hypervisor: &Hypervisor) -> Result<Machine> {
        paused::start_sound(hypervisor, &self.xml, &self.expected, &self.work)
    }
}
