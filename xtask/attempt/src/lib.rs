//! `cargo xtask try`: runs a program on the kernel and the core of a device, in a machine that is up in seconds. The
//! machine has no firmware, no network and no init system. [`subject`] checks the program, [`root`] finds the file
//! system below it, [`kernel`] and [`initramfs`] make what QEMU boots, [`machine`] starts QEMU, and [`session`] talks to
//! the guest in the protocol of [`wire`]. [`ending`] and [`report`] say how the program ended. `guest/main.rs` is the
//! guest's first process.

mod ending;
mod initramfs;
mod kernel;
mod machine;
mod report;
mod root;
mod session;
mod subject;
pub mod wire;

use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use inspect::device::Device;
use xtask_core::arch::VmArchitecture;
use xtask_core::build::standalone::Standalone;
use xtask_core::cache::Cache;
use xtask_core::cli::{TryArgs, Verbosity};
use xtask_core::error::{Failure, host_fault};
use xtask_core::fs::write_private;
use xtask_core::host::tools;
use xtask_core::kernel::Kernel;
use xtask_core::message;
use xtask_core::runs::RunDir;
use xtask_core::workspace::Workspace;
use xtask_inspection::device_named;
use xtask_jobs::{Step, Ui};

use ending::{Conclusion, Outcome};
use machine::{Machine, Parts};
use report::{Report, Seen};
use root::{Missing, Root};
use session::Session;
use subject::{Core, SHARE, Subject};
use wire::Job;

/// The guest's first process.
const GUEST: Standalone =
    Standalone { name: "guest", sources: &["xtask/attempt/guest/main.rs", "xtask/attempt/src/wire.rs"] };

/// The environment of the program, before `--env`.
const ENVIRONMENT: [&str; 4] = [
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "LANG=C.UTF-8",
    "TERM=dumb",
];

/// Everything that is decided before anything slow starts.
struct Attempt<'a> {
    args: &'a TryArgs,
    cache: Cache,
    arch: VmArchitecture,
    device: Device,
    kernel: Kernel,
    root: Root,
    subject: Subject,
    emulator: std::path::PathBuf,
}

/// Runs the program, and fails with its exit code unless that is 0.
///
/// # Errors
/// Returns a usage error for a program or a flag that is not valid, a failure of the host if no machine can run, and
/// otherwise the exit code of the program.
pub fn run(workspace: &Workspace, args: &TryArgs, verbosity: Verbosity) -> Result<()> {
    let report = args.report.as_deref().map(Report::begin).transpose()?;
    let mut seen = Seen::default();
    let result = conclude(workspace, args, verbosity, &mut seen);
    let written = report.map_or(Ok(()), |report| report.end(&result, &seen));
    let Conclusion { code, sentence, .. } = result?;
    if let Some(sentence) = sentence {
        message!("{}: {sentence}", args.path.display());
    }
    written?;
    if code == 0 { Ok(()) } else { Err(Failure::reported(code).into()) }
}

fn conclude(
    workspace: &Workspace,
    args: &TryArgs,
    verbosity: Verbosity,
    seen: &mut Seen,
) -> Result<Conclusion> {
    let attempt = Attempt::prepare(args)?;
    if let Some(known) = attempt.check_runner()? {
        return Ok(known);
    }
    let ui = Ui::install(verbosity)?;
    let (run, collected) = RunDir::create(&attempt.cache, || ui.check())?;
    collected.iter().for_each(|dead| ui.note(&dead.to_string()));
    let outcome = attempt.make(workspace, &run, seen, &ui);
    // A run that was interrupted is deleted, too.
    let discarded = run.discard(|| Ok(()));
    let of_host =
        |error| host_fault(error, "run the machine", "see the causes; nothing is known about the program");
    let outcome = outcome.map_err(of_host)?;
    discarded.map_err(of_host)?;
    Ok(Conclusion::of(outcome, attempt.subject.runner.as_ref(), &attempt.root.name(), args.timeout))
}

impl<'a> Attempt<'a> {
    fn prepare(args: &'a TryArgs) -> Result<Self> {
        let (arch, device) = device_named(&args.device)?;
        let cache = Cache::open()?;
        let root = Root::from_args(args, arch, &cache)?;
        let subject = Subject::of(&args.path, &root, Core { arch, device: &device.name })?;
        let name = &device.name;
        let unable = |what: &str| Failure::usage(format!("--device {name}: {what}; choose another device"));
        let kernel = Kernel::for_pages(arch, &device.page_sizes);
        let kernel = kernel.ok_or_else(|| unable("Debian has no kernel with one of its page sizes"))?;
        if device.cpu.is_none() {
            return Err(unable("it is no single core, so QEMU cannot emulate it").into());
        }
        let name = arch.profile().emulator;
        let remedy = "run cargo xtask preflight --fix";
        let emulator =
            tools::find(name).ok_or_else(|| Failure::host(format!("find {name} on PATH"), remedy))?;
        Ok(Self { args, cache, arch, device, kernel, root, subject, emulator })
    }

    /// Returns the conclusion if the program's dynamic loader or interpreter is known to be missing.
    ///
    /// # Errors
    /// Returns a failure of the host if the program needs a file system and there is none.
    fn check_runner(&self) -> Result<Option<Conclusion>> {
        let Some(runner) = &self.subject.runner else { return Ok(None) };
        match self.root.check_has(&runner.file, runner.what, self.arch) {
            Ok(()) => Ok(None),
            Err(Missing { sentence, remedy: Some(remedy) }) => Err(Failure::host(sentence, remedy).into()),
            Err(Missing { sentence, remedy: None }) => Ok(Some(Conclusion::missing(sentence))),
        }
    }

    /// Boots the machine and runs the program.
    fn make(&self, workspace: &Workspace, run: &RunDir, seen: &mut Seen, ui: &Ui) -> Result<Outcome> {
        if let Root::Disk { directory, .. } = &self.root {
            run.uses_image(directory)?;
        }
        let kernel = kernel::ensure(&self.cache, self.kernel, run, ui)?;
        let step = Step { kind: "try", what: &self.device.name, title: "boot" };
        let (machine, session) = ui.step(&self.cache, step, || {
            ui.tick("the guest's first process is compiled")?;
            let (init, _) = GUEST.executable(workspace, &self.cache, self.arch)?;
            let initramfs = run.work().join("initramfs");
            write_private(&initramfs, initramfs::archive(&init, &kernel.modules))?;
            let parts = Parts {
                arch: self.arch,
                cpu: self.device.cpu.as_deref().unwrap_or_default(),
                emulator: &self.emulator,
                kernel: &kernel.image,
                initramfs: &initramfs,
                root: &self.root,
                share: self.subject.share.as_deref(),
            };
            let (machine, stream) = Machine::start(&parts, run, ui)?;
            let session = Session::begin(stream, &self.job()?)?;
            let about = session.wait_for_start(&machine, ui)?;
            Ok(((machine, session), format!("{about}, on {} with {}", self.device.name, self.root.name())))
        })?;
        let limit = Duration::from_secs(self.args.timeout);
        let outcome = session.follow(&machine, limit, seen, ui)?;
        machine.stop()?;
        Ok(outcome)
    }

    fn job(&self) -> Result<Job> {
        let bytes = |word: &std::ffi::OsStr| word.as_bytes().to_vec();
        let own_name = self.args.path.file_name().unwrap_or_default();
        let name = self.subject.program.with_file_name(own_name);
        let environment = ENVIRONMENT.into_iter().chain(self.args.env.iter().map(String::as_str));
        let arguments = self.args.arguments.iter().map(|word| word.clone().into_vec());
        let root = match &self.root {
            Root::Nothing => "",
            Root::Directory(_) => "root",
            Root::Disk { .. } => "disk",
        };
        Ok(Job {
            time: SystemTime::now().duration_since(UNIX_EPOCH).context("read this host's clock")?.as_secs(),
            root: root.to_owned(),
            share: self.subject.share.as_ref().map_or(String::new(), |_| SHARE.to_owned()),
            directory: self.subject.directory.clone(),
            program: bytes(self.subject.program.as_os_str()),
            environment: environment.map(|variable| variable.as_bytes().to_vec()).collect(),
            arguments: std::iter::once(bytes(name.as_os_str())).chain(arguments).collect(),
        })
    }
}
