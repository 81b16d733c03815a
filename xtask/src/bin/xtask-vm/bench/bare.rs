//! The baseline of the claims: a boot until cloud-init has finished, under bare QEMU, which is started without
//! libvirt. Bare QEMU has the disk, CPU, firmware and network of a smoke, and a seed without the agent. Nothing else
//! is done to make this boot faster. UEFI therefore waits for a key (5 s on aarch64), which a smoke avoids.

use std::ffi::OsString;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use xtask_core::cli::{MachineArgs, PlaceArgs};
use xtask_core::error::Failure;
use xtask_core::fs::write_private;
use xtask_core::limits;
use xtask_core::machine::seed::{PayloadTime, Seed, marker};
use xtask_core::machine::{GUEST_MAC, RunFiles};
use xtask_core::plan::Plan;
use xtask_core::preflight::{Preflight, PreflightRequest, Purpose};
use xtask_core::report::PhaseStatus;
use xtask_core::runs::RunDir;
use xtask_core::snapshot::neutral_seed;
use xtask_images::{ReadyImage, Store};
use xtask_jobs::Ui;
use xtask_jobs::child::{Child, Job};

use super::Bench;
use crate::guest::console::Console;
use crate::guest::ssh::Keys;
use crate::guest::watch::{Deadline, Watch};
use crate::guest::{begin_run, media};
use crate::smoke::{ensure_or_fall_back, make_writable_files};

impl Bench<'_> {
    /// Calls `body` with the plan and the image of a smoke with default flags. Meanwhile, a run directory is recorded
    /// as a user of the image, so that no other process deletes the image.
    pub(super) fn with_image<T>(&self, body: impl FnOnce(&Plan, &ReadyImage) -> Result<T>) -> Result<T> {
        let machine = MachineArgs::default();
        let asked = PreflightRequest {
            architectures: &[self.args.arch],
            machine: &machine,
            place: &PlaceArgs::default(),
            purpose: Purpose::Run,
        };
        let preflight = Preflight::check(self.workspace, &asked)?;
        preflight.verdict()?;
        let facts = preflight.facts.first().context("preflight returned no facts")?;
        let mut plan = Plan::resolve(facts, 1.0)?;
        self.ui.start("image", None);
        let user = begin_run(&self.cache, self.ui)?;
        let store = Store { cache: &self.cache, ui: self.ui, offline: false, run: Some(&user) };
        let outcome = ensure_or_fall_back(&store, &mut plan).and_then(|(ready, _)| {
            self.ui.end(PhaseStatus::Passed, ready.how);
            body(&plan, &ready)
        });
        ended(user, self.ui, outcome)
    }
}

/// Deletes the directory of a run and returns `outcome`. If both fail, the error of `outcome` is returned.
fn ended<T>(run: RunDir, ui: &Ui, outcome: Result<T>) -> Result<T> {
    let gone = run.discard(|| ui.check());
    outcome.and_then(|outcome| gone.map(|()| outcome))
}

/// The settings of a QEMU that is started without libvirt.
pub(super) struct Bare<'a> {
    pub(super) bench: &'a Bench<'a>,
    pub(super) plan: &'a Plan,
    pub(super) image: &'a ReadyImage,
    /// The value of QEMU's `-cpu`.
    pub(super) cpu: &'a str,
}

/// A bare QEMU that runs.
pub(super) struct Started {
    pub(super) qemu: Child,
    pub(super) keys: Keys,
    files: RunFiles,
    at: Instant,
}

impl Bare<'_> {
    /// Boots once and returns the seconds from QEMU's start to cloud-init's last line.
    pub(super) fn boot(&self) -> Result<f64> {
        self.in_a_run(|run| {
            let started = self.start(run, "user,id=net0,ipv6=off", &[])?;
            let seconds = self.until_finished(&started)?;
            started.qemu.stop()?;
            Ok(seconds)
        })
    }

    /// Calls `body` with a new run directory. If this process dies, a later run deletes that directory.
    pub(super) fn in_a_run<T>(&self, body: impl FnOnce(&RunDir) -> Result<T>) -> Result<T> {
        let run = begin_run(&self.bench.cache, self.bench.ui)?;
        let outcome = body(&run);
        // The console log of a failed boot is kept.
        if outcome.is_ok() { ended(run, self.bench.ui, outcome) } else { run.clean().and(outcome) }
    }

    /// Starts QEMU for the first boot of the disk. `network` is the value of `-netdev`, and `more` are further
    /// arguments.
    pub(super) fn start(&self, run: &RunDir, network: &str, more: &[String]) -> Result<Started> {
        let (plan, ui, work) = (self.plan, self.bench.ui, run.work());
        let keys = Keys::make(&work, &plan.image.login_user, ui)?;
        let files = RunFiles::of_run(&work, run.path().join("console.log"))?;
        let seed = Seed { payload: PayloadTime::Never, ..neutral_seed(plan) };
        media::make_seed(&files.seed, &keys.seed(run.id(), &seed), &work, ui)?;
        make_writable_files(plan, &files, &self.image.base(), ui)?;
        write_private(&files.console_log, "")?;
        let firmware = &plan.own_firmware()?.code;
        let own = self.arguments(&files, firmware, network);
        let arguments = own.iter().chain(more).map(OsString::from).collect();
        let log = work.join("qemu.log");
        let job = Job { program: &plan.emulator, owner: &work, arguments, log, environment: Vec::new() };
        let at = Instant::now();
        Ok(Started { qemu: Child::start(&job)?, keys, files, at })
    }

    fn arguments(&self, files: &RunFiles, firmware: &Path, network: &str) -> Vec<String> {
        let (plan, profile) = (self.plan, self.plan.spec.architecture.profile());
        let drive = |options: &str, file: &Path| ("-drive", format!("if={options},file={}", file.display()));
        let options = [
            ("-machine", profile.machine_type.to_owned()),
            ("-accel", plan.accelerator().to_string()),
            ("-cpu", self.cpu.to_owned()),
            ("-smp", plan.spec.vcpus.to_string()),
            ("-m", plan.spec.memory_mib.to_string()),
            drive("pflash,format=raw,readonly=on", firmware),
            drive("pflash,format=raw", &files.nvram),
            drive("virtio,format=qcow2,cache=none", &files.overlay),
            drive("virtio,format=raw,readonly=on", &files.seed),
            ("-netdev", network.to_owned()),
            ("-device", format!("virtio-net-pci,netdev=net0,mac={GUEST_MAC},romfile=")),
            ("-display", "none".to_owned()),
            ("-monitor", "none".to_owned()),
            ("-serial", format!("file:{}", files.console_log.display())),
        ];
        options.into_iter().flat_map(|(option, value)| [option.to_owned(), value]).collect()
    }

    /// Waits for cloud-init's last line and returns the seconds since QEMU's start.
    pub(super) fn until_finished(&self, started: &Started) -> Result<f64> {
        let log = &started.files.console_log;
        let hint = format!("read its console, {}", log.display());
        let what = "cloud-init to finish";
        let watch =
            Watch { ui: self.bench.ui, what, deadline: Deadline::after(limits::BARE_BOOT), hint: &hint };
        let finished = watch.until(&mut Console::new(log), |console| {
            if console.line_with(marker::CLOUD_INIT_FINISHED).is_some() {
                return Ok(Some(started.at.elapsed().as_secs_f64()));
            }
            match started.qemu.ended()? {
                None => Ok(None),
                Some(_) => Err(Failure::host("QEMU ended", &*hint).into()),
            }
        });
        finished.context("boot bare QEMU")
    }
}
