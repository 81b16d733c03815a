//! The boot phase up to a running userspace of the guest, and the fallback to emulation if KVM does not work.

use anyhow::{Context, Error, Result};
use xtask_core::arch::Accelerator;
use xtask_core::cli::Sabotage;
use xtask_core::error::{Failure, Kind};
use xtask_core::host::kvm;
use xtask_core::limits;
use xtask_core::machine::seed::{PayloadTime, Seed, marker};
use xtask_core::machine::{HOST_FROM_GUEST, RunFiles};
use xtask_core::plan::Plan;
use xtask_core::report::EventKind;
use xtask_core::snapshot::neutral_seed;
use xtask_images::ReadyImage;

use super::on_daemon::Leasing;
use super::prepare::{Prepared, apt_sources, make_writable_files, may_be_warm, not_started, why_cold};
use super::run::Run;
use super::running::RunningVm;
use super::target::Domain;
use super::warm::{Ground, Warm};
use crate::guest::media::{self, Delivered};
use crate::libvirt::Condition;

/// Boots or restores a machine. Returns once a booted guest runs cloud-init's last stage, or once a restored guest sees
/// its payload. The machine is in `slot` as soon as it exists, because the teardown needs it even if the boot fails.
pub(super) fn boot<'slot>(
    run: &Run<'_>,
    plan: &mut Plan,
    image: &ReadyImage,
    subject: Delivered<'_>,
    slot: &'slot mut Option<RunningVm>,
) -> Result<(&'slot mut RunningVm, String)> {
    let (mut ground, mut why) =
        (Ground::begin(run, plan).map_err(not_started)?, why_cold(&run.options, plan));
    if may_be_warm(&run.options, plan) {
        match ground.platform(plan) {
            Ok(platform) => return Warm { run, plan, image, subject }.restore(ground, &platform, slot),
            Err(reason) => why = Some(reason),
        }
    }
    let started = match ground {
        Ground::Here(prepared) => start(*prepared, run, plan, image, subject),
        Ground::Daemon(begun) => begun.start(run, plan, image, subject),
    };
    let started = started.map_err(not_started)?;
    let vm = slot.insert(started);
    // Emulation, if KVM was refused, has another limit.
    vm.deadline = run.times.deadline();
    vm.reach_userspace(run, plan, image)?;
    let why = why.map_or(String::new(), |why| format!(" (cold: {why})"));
    let detail = format!("{}, {}{why}", vm.plan.accelerator(), vm.plan.cpu.describe());
    Ok((vm, detail))
}

/// Makes the disks and the NVRAM of a machine of the embedded driver, and starts its domain.
fn start(
    prepared: Prepared,
    run: &Run<'_>,
    plan: &mut Plan,
    image: &ReadyImage,
    subject: Delivered<'_>,
) -> Result<RunningVm> {
    let sabotage = run.options.sabotage;
    let work = run.dir.work();
    let mut files = RunFiles::of_run(&work, run.dir.path().join("console.log"))?;
    files.backing = vec![image.disk.clone()];
    let seed = Seed { sabotage, payload: PayloadTime::AtFirstBoot, ..neutral_seed(plan) };
    media::make_seed(&files.seed, &prepared.parts.keys.seed(run.dir.id(), &seed), &work, &run.ui)?;
    let access = prepared.parts.access();
    let (config, ca) = (access.broker.agent_config(HOST_FROM_GUEST), access.broker.ca());
    let registries = access.registries();
    let apt_sources = apt_sources(plan, subject, &run.ui)?;
    let plant = run.plant(plan)?;
    let disk = media::PayloadDisk {
        subject,
        apt_sources: &apt_sources,
        config: &config,
        ca,
        sabotage,
        plant: plant.as_ref(),
        registries: registries.as_deref(),
        restored: None,
    };
    media::make_payload(&files.payload, run.workspace, &disk, &work, &run.ui)?;
    make_writable_files(plan, &files, &image.base(), &run.ui)?;
    let reach = prepared.reach_of_first_boot(run, plan);
    let mut domain = Domain::write(plan, &files, &work, reach.clone())?;
    domain.record_writes(run.write_log());
    let machine = match domain.start(&prepared.hypervisor) {
        Err(error) => {
            emulate_instead(run, plan, error)?;
            domain = Domain::write(plan, &files, &work, reach)?;
            domain.record_writes(run.write_log());
            domain.start(&prepared.hypervisor)
        }
        started => started,
    }?;
    let mut vm = prepared.with(plan.clone(), files, domain, machine);
    vm.record(EventKind::Boot, "the machine was switched on");
    Ok(vm)
}

impl RunningVm {
    fn reach_userspace(&mut self, run: &Run<'_>, plan: &mut Plan, image: &ReadyImage) -> Result<()> {
        if self.plan.accelerator() == Accelerator::Kvm {
            self.see_kvm_work(run, plan, image)?;
        }
        let kill = run.options.sabotage == Some(Sabotage::KillQemu);
        let (mut is_planted, mut leasing, mut no_address) = (false, Leasing::default(), None);
        let waited = self.wait_for_first_boot(self.deadline, "the guest's userspace", |vm| {
            if kill && !is_planted && vm.kernel_has_spoken() {
                vm.target.kill_qemu().context("plant the fault")?;
                is_planted = true;
            }
            no_address = leasing.poll(vm).err();
            Ok((no_address.is_some() || vm.console.line_with(marker::STARTED).is_some()).then_some(()))
        });
        waited.map_err(|error| if is_planted { planted(error) } else { error })?;
        no_address.map_or_else(|| self.connect_tunnel(leasing), Err)
    }

    /// Waits until the guest shows a sign of life under KVM. If it shows none and its processors execute nothing,
    /// records that KVM does not work for this machine. Then starts the machine again under emulation, or returns an
    /// error if the user requested KVM by name.
    fn see_kvm_work(&mut self, run: &Run<'_>, plan: &mut Plan, image: &ReadyImage) -> Result<()> {
        let deadline = self.deadline.within(self.plan.limits.first_kernel_line());
        let waited = self.wait_until(deadline, "a sign of life of the guest under KVM", |vm| {
            Ok(vm.shows_life().then_some(()))
        });
        let Err(error) = waited else {
            return if plan.is_here() {
                kvm::forget_failure(&run.cache, plan.kvm_candidate())
            } else {
                Ok(())
            };
        };
        // An interrupt, a fault on the console, and the end of QEMU or of the broker are not KVM's fault. A firmware
        // that reports that the image does not boot has run, and it would report the same under emulation. The
        // remaining cases are a guest without output and a guest that KVM stopped.
        let gone = self.target.condition() == Condition::Gone;
        if Kind::Interrupted.is(&error) || self.console.fault().is_some() || gone {
            return Err(error);
        }
        let condition = self.target.condition();
        if condition == Condition::Paused && self.target.run_state()? != "internal-error" {
            return Err(error);
        }
        // A guest without output may have a kernel that prints nothing, or it may be slow.
        if condition == Condition::Running && self.executes()? {
            run.ui.note("the guest prints nothing on its serial console, but its processors run");
            return Ok(());
        }
        self.broker.check()?;
        let reason = format!("/dev/kvm opens and does not run the guest's kernel: {error}");
        self.target.power_off()?;
        *plan = without_kvm(run, plan, &reason)?;
        self.plan = plan.clone();
        self.deadline = run.times.deadline();
        self.console.new_boot()?;
        self.target.start_again(run, plan, &self.files, image)?;
        self.root.connect();
        Ok(())
    }
}

impl RunningVm {
    /// Returns whether a processor of the guest executes instructions, that is, whether its registers change.
    fn executes(&self) -> Result<bool> {
        let before = self.target.registers()?;
        for _ in 0..10 {
            std::thread::sleep(limits::REGISTERS);
            if self.target.registers()? != before {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Turns the error after this run has killed QEMU (`--sabotage kill-qemu`) into a failure of the guest, because the
/// smoke must fail with exit code 1. Otherwise it would be a failure of the host.
fn planted(error: Error) -> Error {
    if !Kind::Host.is(&error) {
        return error;
    }
    error.context(Failure::guest(
        "QEMU ended while the guest booted",
        "no action is needed: --sabotage kill-qemu killed it",
    ))
}

/// Records that KVM does not work for this machine. Returns the plan for emulation, or an error if the user requested
/// KVM by name.
fn without_kvm(run: &Run<'_>, plan: &Plan, reason: &str) -> Result<Plan> {
    // libvirt passes on all output of QEMU; the first line has the reason.
    let reason = reason.lines().next().unwrap_or(reason).to_owned();
    if plan.is_here() {
        kvm::remember_failure(&run.cache, plan.kvm_candidate(), &reason)?;
    }
    if !plan.may_fall_back() {
        return Err(Failure::host(reason, "leave out --accel to have the guest emulated").into());
    }
    run.ui.note(&format!("{reason}: starting again under emulation"));
    let plan = plan.under_tcg(&reason);
    run.times.set_kind(plan.kind());
    run.times.set_limit(plan.limits.boot());
    Ok(plan)
}

/// Changes the plan to emulation if KVM itself refuses to start the machine.
///
/// # Errors
/// Returns the error if it is not KVM's. Returns another error if the user requested KVM by name.
pub(super) fn emulate_instead(run: &Run<'_>, plan: &mut Plan, error: Error) -> Result<()> {
    // Other errors (no memory, a CPU model that KVM lacks) are not KVM's fault, and emulation would not help.
    if plan.accelerator() != Accelerator::Kvm || !blames_kvm(&error) {
        return Err(error);
    }
    *plan = without_kvm(run, plan, &format!("KVM does not start the machine: {error:#}"))?;
    Ok(())
}

/// Parts of the messages with which QEMU and libvirt refuse to start a machine under KVM. The word KVM alone is not
/// enough, because a path of the user may contain it.
const KVM_REFUSES: &[&str] = &[
    "failed to initialize kvm",
    "could not access kvm kernel module",
    "ioctl(kvm_",
    "kvm_init_vcpu",
    "kvm_buf_set_msrs",
    "kvm is not supported for this guest cpu type",
    "virtualization type 'kvm' is not supported",
    "type=kvm",
];

/// Returns whether KVM itself refuses to start the machine.
fn blames_kvm(error: &anyhow::Error) -> bool {
    let message = format!("{error:#}").to_lowercase();
    KVM_REFUSES.iter().any(|words| message.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kvms_own_words_blame_kvm() {
        for (message, blames) in [
            (
                "internal error: process exited while connecting to monitor: ioctl(KVM_CREATE_VM) failed: 16",
                true,
            ),
            ("qemu-system-x86_64: failed to initialize kvm: Operation not permitted", true),
            ("Could not access KVM kernel module: No such file or directory", true),
            ("../../target/i386/kvm/kvm.c:3183: kvm_buf_set_msrs: Assertion `ret == n' failed.", true),
            ("KVM is not supported for this guest CPU type", true),
            ("cannot access /srv/kvm/runs/1/w/disk.qcow2: No such file or directory", false),
            ("cannot set up guest memory 'pc.ram': Cannot allocate memory", false),
        ] {
            assert_eq!(
                blames_kvm(&anyhow::anyhow!("{message}").context("start the domain")),
                blames,
                "{message}"
            );
        }
    }
}
