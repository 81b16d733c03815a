//! What a smoke is measured against: the same disk under bare QEMU until cloud-init has finished. Bare means: QEMU with the same
//! CPU, disk, firmware and network, a seed without the agent, and nothing of this workflow but the stopwatch; so UEFI waits for a
//! key there (on aarch64 5 s), which a smoke spares.

use std::ffi::OsString;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use xtask_core::cache::Cache;
use xtask_core::cli::{BenchArgs, MachineArgs};
use xtask_core::fs::write_private;
use xtask_core::limits;
use xtask_core::machine::seed::{PayloadTime, Seed, marker};
use xtask_core::machine::{GUEST_MAC, RunFiles};
use xtask_core::preflight::{Preflight, PreflightRequest};
use xtask_core::report::PhaseStatus;
use xtask_core::workspace::Workspace;

use crate::guest::console::Console;
use crate::guest::media;
use crate::guest::ssh::Keys;
use crate::smoke::{ensure_or_fall_back, make_writable_files};
use xtask_core::plan::Plan;
use xtask_core::runs::RunDir;
use xtask_images::{ReadyImage, Store};
use xtask_jobs::Ui;
use xtask_jobs::child::{Child, Job};

/// The machine and the image of a smoke that nobody gave flags, and a run that boots nothing: as long as it is there nobody deletes
/// the image.
pub(super) fn prepare(
    workspace: &Workspace,
    args: &BenchArgs,
    cache: &Cache,
    ui: &Ui,
) -> Result<(Plan, ReadyImage, RunDir)> {
    let machine = MachineArgs::default();
    let asked = PreflightRequest { architectures: &[args.arch], machine: &machine, for_ci: false };
    let preflight = Preflight::check(workspace, &asked)?;
    preflight.verdict()?;
    let facts = preflight.facts.first().context("one architecture was asked for")?;
    let mut plan = Plan::resolve(facts, 1.0)?;
    ui.start("image", None);
    let (user, collected) = RunDir::create(cache)?;
    for dead in collected {
        ui.line(&dead.to_string());
    }
    let store = Store { cache, ui, offline: false, run: Some(&user) };
    match ensure_or_fall_back(&store, &mut plan) {
        Ok((ready, _)) => {
            ui.end(PhaseStatus::Passed, ready.how);
            Ok((plan, ready, user))
        }
        Err(error) => ended(user, Err(error)),
    }
}

/// The run is over, whatever came of it, and leaves nothing; first of all what went wrong in it is told.
pub(super) fn ended<T>(run: RunDir, outcome: Result<T>) -> Result<T> {
    let gone = run.discard();
    outcome.and_then(|outcome| gone.map(|()| outcome))
}

/// QEMU as anybody would call it.
pub(super) struct Bare<'a> {
    pub(super) cache: &'a Cache,
    pub(super) plan: &'a Plan,
    pub(super) image: &'a ReadyImage,
    /// As QEMU's `-cpu` takes it.
    pub(super) cpu: &'a str,
}

/// One that has started.
pub(super) struct Started {
    pub(super) qemu: Child,
    pub(super) keys: Keys,
    files: RunFiles,
    at: Instant,
}

impl Bare<'_> {
    /// Seconds from QEMU's start to cloud-init's last line.
    pub(super) fn boot(&self, ui: &Ui) -> Result<f64> {
        self.in_a_run(ui, |run| {
            let started = self.start(run, "user,id=net0,ipv6=off", Vec::new(), ui)?;
            let seconds = started.until_finished(ui)?;
            started.qemu.stop()?;
            Ok(seconds)
        })
    }

    /// With a directory that the next run collects, if this one dies.
    pub(super) fn in_a_run<T>(&self, ui: &Ui, body: impl FnOnce(&RunDir) -> Result<T>) -> Result<T> {
        let (run, collected) = RunDir::create(self.cache)?;
        for dead in collected {
            ui.line(&dead.to_string());
        }
        let outcome = body(&run);
        // What the console said of one that failed is of use.
        if outcome.is_ok() {
            return ended(run, outcome);
        }
        run.clean().and(outcome)
    }

    /// Its first boot begins; with this network (`-netdev`), and with more arguments.
    pub(super) fn start(&self, run: &RunDir, network: &str, more: Vec<String>, ui: &Ui) -> Result<Started> {
        let Bare { plan, image, .. } = *self;
        let work = run.work();
        let keys = Keys::make(&work, &plan.image.login_user, ui)?;
        let files = RunFiles::of_run(&work, run.path().join("console.log"))?;
        let seed = Seed {
            instance_id: run.id(),
            login_user: &plan.image.login_user,
            authorized_key: &keys.user_public,
            host_private_key: &keys.host_private,
            host_public_key: &keys.host_public,
            sabotage: None,
            payload: PayloadTime::Never,
        };
        media::make_seed(&files.seed, &seed, &work, ui)?;
        make_writable_files(plan, &files, &image.base(), ui)?;
        write_private(&files.console_log, "")?;
        let mut arguments = self.arguments(&files, network);
        arguments.extend(more);
        let arguments = arguments.into_iter().map(OsString::from).collect();
        let log = work.join("qemu.log");
        let job = Job { program: &plan.emulator, owner: &work, arguments, log, environment: Vec::new() };
        let at = Instant::now();
        Ok(Started { qemu: Child::start(&job)?, keys, files, at })
    }

    fn arguments(&self, files: &RunFiles, network: &str) -> Vec<String> {
        let plan = self.plan;
        let profile = plan.spec.architecture.profile();
        let mut words = vec![
            "-machine".to_owned(),
            profile.machine_type.to_owned(),
            "-accel".to_owned(),
            plan.accelerator().to_string(),
            "-cpu".to_owned(),
            self.cpu.to_owned(),
            "-smp".to_owned(),
            plan.spec.vcpus.to_string(),
            "-m".to_owned(),
            plan.spec.memory_mib.to_string(),
        ];
        let flash = |path: &Path, how: &str| format!("if=pflash,format=raw,{how}file={}", path.display());
        words.extend(["-drive".to_owned(), flash(&plan.firmware.code, "readonly=on,")]);
        words.extend(["-drive".to_owned(), flash(&files.nvram, "")]);
        let disk = format!("if=virtio,format=qcow2,cache=none,file={}", files.overlay.display());
        let seed = format!("if=virtio,format=raw,readonly=on,file={}", files.seed.display());
        words.extend(["-drive".to_owned(), disk, "-drive".to_owned(), seed]);
        words.extend(["-netdev".to_owned(), network.to_owned()]);
        words.extend(["-device".to_owned(), format!("virtio-net-pci,netdev=net0,mac={GUEST_MAC},romfile=")]);
        words.extend(["-display", "none", "-monitor", "none", "-serial"].map(str::to_owned));
        words.push(format!("file:{}", files.console_log.display()));
        words
    }
}

impl Started {
    /// Seconds from QEMU's start to cloud-init's last line.
    pub(super) fn until_finished(&self, ui: &Ui) -> Result<f64> {
        let mut console = Console::new(&self.files.console_log);
        loop {
            ui.tick(console.last())?;
            console.read()?;
            if console.line_with(marker::CLOUD_INIT_FINISHED).is_some() {
                return Ok(self.at.elapsed().as_secs_f64());
            }
            if let Some(fault) = console.fault() {
                bail!("the bare boot: {}", fault.what);
            }
            ensure!(
                self.qemu.ended()?.is_none(),
                "the bare boot: QEMU ended; the console is {}",
                self.files.console_log.display()
            );
            ensure!(
                self.at.elapsed() < limits::BARE_BOOT,
                "the bare boot: cloud-init has not finished in time"
            );
            std::thread::sleep(limits::POLL);
        }
    }
}
