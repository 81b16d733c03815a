//! The machine while it runs, with its broker: started, watched by every wait, cut off, entered, stopped.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use xtask::agent_build::Agent;
use xtask::arch::Accelerator;
use xtask::cli::Sabotage;
use xtask::domain::seed::{Seed, marker};
use xtask::domain::{DomainXmlParams, RunFiles, xml};
use xtask::exit::{Diagnosis, Interrupted, Unavailable};
use xtask::host::{kvm, tools};
use xtask::image::Image;
use xtask::limits::{self, Limits};
use xtask::paths::{processes_naming, write_private};

use super::Session;
use super::verify::Judgement;
use crate::broker::{Broker, Seen};
use crate::child;
use crate::console::Console;
use crate::guest::Keys;
use crate::hypervisor::{Hypervisor, Machine};
use crate::image::ReadyImage;
use crate::media;
use crate::plan::Plan;
use crate::run_dir::RunDir;
use crate::screen::Screen;

/// Everything that lives while the guest does.
pub(crate) struct RunningVm {
    plan: Plan,
    files: RunFiles,
    xml: String,
    hypervisor: Hypervisor,
    machine: Machine,
    keys: Keys,
    device_id: String,
    libvirt_root: PathBuf,
    /// The guest's console.
    pub(crate) console: Console,
    /// The fleet bus.
    pub(crate) broker: Broker,
}

/// The kernel's first line, and one of a kernel whose log level hides that.
const FIRST_KERNEL_LINES: [&str; 2] = ["Linux version", "] Booting Linux"];
/// A getty on the console: the guest can be entered.
const LOGIN_PROMPT: &str = " login:";

impl RunningVm {
    /// From nothing to a guest whose userspace runs cloud-init's last stage.
    pub(crate) fn boot(
        session: &mut Session<'_>,
        plan: Plan,
        agent: &Agent,
        image: &ReadyImage,
    ) -> Result<(Self, String)> {
        let mut vm = Self::start(session, plan, agent, image)?;
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
    fn start(session: &mut Session<'_>, mut plan: Plan, agent: &Agent, image: &ReadyImage) -> Result<Self> {
        let sabotage = session.args.sabotage;
        let work = session.run.work();
        let device_id = format!("dev-{}", session.run.id());
        let files = RunFiles::of_run(&work, session.run.path().join("console.log"))?;
        let broker = Broker::start(&work, &device_id, sabotage, &session.interrupt)?;
        let keys = Keys::make(&work)?;
        let seed = Seed {
            instance_id: session.run.id(),
            authorized_key: &keys.user_public,
            host_private_key: &keys.host_private,
            host_public_key: &keys.host_public,
            sabotage,
            payload: true,
        };
        media::make_seed(&files.seed, &seed, &work)?;
        let config = broker.agent_config();
        media::make_payload(&files.payload, session.workspace, agent, &config, sabotage, &work)?;
        make_writable_files(&plan, &files, image)?;
        let libvirt_root = session.run.libvirt_root();
        let hypervisor = Hypervisor::open(&libvirt_root)?;
        session.report.host.libvirt = Some(hypervisor.version()?);
        let mut xml = write_xml(&plan, &files, &work)?;
        let machine = match hypervisor.start(&xml) {
            Err(error) if plan.accelerator == Accelerator::Kvm => {
                give_up_kvm(session, &mut plan, &format!("KVM does not start the machine: {error:#}"))?;
                xml = write_xml(&plan, &files, &work)?;
                hypervisor.start(&xml)
            }
            started => started,
        }?;
        let console = Console::new(&files.console_log);
        Ok(Self { plan, files, xml, hypervisor, machine, keys, device_id, libvirt_root, console, broker })
    }

    fn reach_userspace(&mut self, session: &mut Session<'_>, image: &ReadyImage) -> Result<String> {
        if self.plan.accelerator == Accelerator::Kvm {
            self.see_kvm_work(session, image)?;
        }
        let kill = session.args.sabotage == Some(Sabotage::KillQemu);
        let root = self.libvirt_root.clone();
        self.wait(session, "the guest's userspace", self.limits().boot(), |vm| {
            if kill && vm.kernel_has_spoken() {
                for pid in processes_naming(&root) {
                    rustix::process::kill_process(pid, rustix::process::Signal::KILL)
                        .context("plant the fault")?;
                }
            }
            Ok(vm.console.line_with(marker::STARTED).map(drop))
        })?;
        Ok(format!("{}, {}", self.plan.accelerator, session.report.guest.cpu))
    }

    /// A KVM that never runs the kernel is written down and, where KVM was not asked for by name, replaced.
    fn see_kvm_work(&mut self, session: &mut Session<'_>, image: &ReadyImage) -> Result<()> {
        let limit = self.limits().first_kernel_line();
        let waited = self.wait(session, "the kernel's first line under KVM", limit, |vm| {
            Ok(vm.kernel_has_spoken().then_some(()))
        });
        let Err(error) = waited else { return Ok(()) };
        // A firmware that says that the image does not boot has run, and would say so under emulation too.
        if error.is::<Interrupted>() || self.console.fault().is_some() {
            return Err(error);
        }
        let reason = format!("/dev/kvm opens and does not run the guest's kernel: {error}");
        self.machine.destroy()?;
        give_up_kvm(session, &mut self.plan, &reason)?;
        make_writable_files(&self.plan, &self.files, image)?;
        self.xml = write_xml(&self.plan, &self.files, &session.run.work())?;
        self.console.new_boot()?;
        self.machine = self.hypervisor.start(&self.xml)?;
        Ok(())
    }

    fn kernel_has_spoken(&self) -> bool {
        FIRST_KERNEL_LINES.iter().any(|line| self.console.line_with(line).is_some())
    }

    /// Looks again and again until `probe` has something; ends at once on Ctrl-C, a dead QEMU or broker, and on a
    /// console that says that the guest will never be up. A probe's error is kept and told if time runs out, since
    /// a guest that is slow fails in many ways; a [`Diagnosis`] ends the wait.
    pub(crate) fn wait<T>(
        &mut self,
        session: &mut Session<'_>,
        what: &str,
        limit: Duration,
        mut probe: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        let mut last_error = None;
        loop {
            session.interrupt.check()?;
            for line in self.console.read()? {
                session.screen.detail(&format!("    | {line}"));
            }
            if let Some(fault) = self.console.fault() {
                // The lines behind the first one say where it happened.
                std::thread::sleep(limits::BROKER_SETTLE);
                self.console.read()?;
                return Err(Diagnosis::new(fault.what, fault.hint).into());
            }
            self.broker.check()?;
            match probe(self) {
                Ok(Some(value)) => return Ok(value),
                Ok(None) => {}
                Err(error) if error.is::<Diagnosis>() => return Err(error),
                Err(error) => last_error = Some(error),
            }
            if !self.machine.is_running() {
                self.console.read()?;
                return Err(Diagnosis::new(
                    format!("QEMU ended while waiting for {what}"),
                    "qemu.log in the report's directory has its last words; a QEMU that was killed has none",
                )
                .into());
            }
            if Instant::now() > deadline {
                let late = format!("no sign of {what} within {} s", limit.as_secs());
                let late = Diagnosis::new(late, "a slow host: --timeout-scale 2; else see console.log");
                return Err(match last_error {
                    Some(error) => error.context(late),
                    None => late.into(),
                });
            }
            session.screen.alive(self.console.last());
            std::thread::sleep(limits::POLL);
        }
    }

    /// [`RunningVm::wait`] for a status that `judge` takes for proof. Meanwhile the broker's log and, now and then, the
    /// guest's systemd are asked whether it can still come.
    pub(crate) fn wait_for_status(
        &mut self,
        session: &mut Session<'_>,
        what: &str,
        limit: Duration,
        judge: impl Fn(&Seen) -> Judgement,
    ) -> Result<Seen> {
        let refusals_before = self.broker.refusals();
        let mut asked = Instant::now();
        self.wait(session, what, limit, |vm| {
            if let Some(seen) = vm.broker.latest()? {
                match judge(&seen) {
                    Judgement::Proven => return Ok(Some(seen)),
                    Judgement::Refuted(diagnosis) => return Err(diagnosis.into()),
                    Judgement::NotYet => {}
                }
            }
            // Twice: the first may be a connection that the power cut tore.
            if vm.broker.refusals() >= refusals_before + 2 {
                return Err(Diagnosis::new(
                    "the broker refuses the device's credentials",
                    "compare [credentials] in the agent's configuration with the broker's users; nats.log has the refusals",
                )
                .into());
            }
            if asked.elapsed() > limits::GUEST_QUESTION && vm.can_be_entered() {
                let state = vm.keys.unit_state(vm.machine.ssh_port()?, vm.limits().guest_command());
                asked = Instant::now();
                if let Some((error, hint)) = state?.hopeless() {
                    return Err(Diagnosis::new(error, hint).into());
                }
            }
            Ok(None)
        })
    }

    fn can_be_entered(&self) -> bool {
        [LOGIN_PROMPT, marker::DONE].iter().any(|sign| self.console.line_with(sign).is_some())
            || self.console.prompts(LOGIN_PROMPT)
    }

    /// What the guest says of the agent's installation.
    pub(crate) fn provisioned(&self) -> Result<Option<()>> {
        if let Some(line) = self.console.line_with(marker::FAILED) {
            let (_, reason) = line.split_once(marker::FAILED).unwrap_or(("", line));
            let hint = "agent/dist/install.sh failed in the guest; run it there by hand: smoke --keep";
            return Err(Diagnosis::new(format!("the agent did not install:{reason}"), hint).into());
        }
        Ok(self.console.line_with(marker::DONE).map(drop))
    }

    /// The plug is pulled: no shutdown, no flush.
    pub(crate) fn cut_power(&mut self) -> Result<()> {
        self.machine.destroy()?;
        self.console.new_boot()
    }

    /// The same machine again.
    pub(crate) fn power_on(&mut self) -> Result<()> {
        self.machine = self.hypervisor.start(&self.xml)?;
        Ok(())
    }

    pub(crate) fn limits(&self) -> Limits {
        self.plan.limits()
    }

    pub(crate) fn image(&self) -> &Image {
        &self.plan.image
    }

    pub(crate) fn device_id(&self) -> &str {
        &self.device_id
    }

    /// The guest's journal, where it can still be had.
    pub(crate) fn fetch_journal(&self, path: &Path, screen: &mut Screen) {
        if !self.machine.is_running() || !self.can_be_entered() {
            return;
        }
        let fetched = self.machine.ssh_port().and_then(|port| {
            let command = "journalctl --boot --no-pager --output short-monotonic --lines 2000";
            self.keys.run_as_root(port, command, self.limits().guest_command())
        });
        let written = fetched.and_then(|journal| write_private(path, journal));
        if let Err(error) = written {
            screen.note(&format!("the guest's journal could not be had: {error:#}"));
        }
    }

    /// The machine, then the broker.
    pub(crate) fn stop(self) -> Result<()> {
        let destroyed = self.machine.destroy();
        self.broker.stop()?;
        destroyed
    }

    /// Leaves the machine running; how a person enters and removes it.
    pub(crate) fn release(self, run: &RunDir) -> Result<String> {
        let how = if self.machine.is_running() {
            format!(
                "kept: {id}\n  enter:   {ssh}\n  console: tail -f {console}\n  remove:  cargo xtask vm rm {id}\n  \
                 the broker has ended: the agent in there is offline",
                id = run.id(),
                ssh = self.keys.command_line(self.machine.ssh_port()?),
                console = self.files.console_log.display(),
            )
        } else {
            bail!("keep the machine: its QEMU has ended");
        };
        run.keep(&how)?;
        self.broker.stop()?;
        Ok(how)
    }
}

/// Writes down that KVM does not work here, and goes over to emulation where KVM was not asked for by name.
fn give_up_kvm(session: &mut Session<'_>, plan: &mut Plan, reason: &str) -> Result<()> {
    // libvirt passes on all that QEMU said; its first line says why.
    let reason = reason.lines().next().unwrap_or(reason).to_owned();
    kvm::remember_failure(&session.cache, &reason)?;
    if !plan.may_fall_back {
        let hint = "leave --accel out: the guest is then emulated".to_owned();
        return Err(Unavailable { error: reason, hint }.into());
    }
    session.screen.line(&format!("{reason}: starting again under emulation"));
    plan.fall_back(&reason);
    session.describe_accelerator(plan);
    session.limit = Some(plan.limits().boot());
    Ok(())
}

/// What the guest writes to, fresh: the overlay over the image, the NVRAM as the firmware's template has it.
pub(crate) fn make_writable_files(plan: &Plan, files: &RunFiles, image: &ReadyImage) -> Result<()> {
    let qemu_img = tools::require("qemu-img")?;
    let mut arguments = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"].map(Into::into).to_vec();
    arguments.extend([image.disk.clone().into_os_string(), files.overlay.clone().into_os_string()]);
    child::read(&qemu_img, &arguments, limits::SERVER_START).context("make the disk's overlay")?;
    if let Some(firmware) = &plan.firmware {
        let template = std::fs::read(&firmware.vars_template)
            .with_context(|| format!("read {}", firmware.vars_template.display()))?;
        write_private(&files.nvram, template)?;
    }
    Ok(())
}

fn write_xml(plan: &Plan, files: &RunFiles, work: &Path) -> Result<String> {
    let firmware = plan.firmware.as_ref();
    let params = DomainXmlParams::resolve(&plan.spec, plan.accelerator, &plan.emulator, firmware, files);
    let xml = xml::domain_xml(&params);
    write_private(&work.join("domain.xml"), &xml)?;
    Ok(xml)
}
