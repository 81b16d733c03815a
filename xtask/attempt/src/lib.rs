//! `cargo xtask try`: runs a program on the kernel and the core of a device, in a machine that is up in seconds. The
//! machine has no firmware, no network and no init system. [`subject`] checks the program, [`container`] finds that of
//! a container image, [`root`] finds the file system below it, [`kernel`] and [`initramfs`] make what QEMU boots,
//! [`machine`] starts QEMU, and [`session`] talks to the guest in the protocol of [`wire`]. [`ending`] and [`report`]
//! say how the program ended. `guest/main.rs` is the guest's first process.

mod accounts;
mod container;
mod ending;
mod initramfs;
mod kernel;
mod machine;
mod report;
mod root;
mod session;
mod subject;
pub mod wire;

use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use inspect::device::Device;
use xtask_archives::Image;
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

use container::Container;
use ending::{Conclusion, Outcome};
use kernel::Use;
use machine::{Machine, Parts};
use report::{Report, Seen};
use root::{Base, Missing, Root};
use session::Session;
use subject::{Core, SHARE, Subject, is_image_at};
use wire::Job;

/// The guest's first process.
const GUEST: Standalone = Standalone {
    name: "guest",
    sources: &[
        "xtask/attempt/guest/main.rs",
        "xtask/attempt/guest/files.rs",
        "xtask/attempt/guest/user.rs",
        "xtask/attempt/src/wire.rs",
    ],
};

/// The directory of a run into which an archive is unpacked.
const UNPACKED: &str = "files";

/// Everything that is decided before anything slow starts.
struct Attempt<'a> {
    args: &'a TryArgs,
    cache: Cache,
    arch: VmArchitecture,
    device: Device,
    kernel: Kernel,
    plan: Plan,
    emulator: PathBuf,
}

/// The program and its file system, as far as they are known without unpacking an archive.
enum Plan {
    Ready(Program),
    /// The path is a container image.
    Image,
    /// The archive is the file system of the program.
    Sysroot(PathBuf, Subject),
}

/// What an attempt uses of this host.
#[derive(Clone, Copy)]
struct Host<'a> {
    workspace: &'a Workspace,
    run: &'a RunDir,
    ui: &'a Ui,
}

/// A program with its file system.
struct Program {
    root: Root,
    subject: Subject,
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
    if let Plan::Ready(program) = &attempt.plan
        && let Some(known) = program.check_runner(attempt.core())?
    {
        return Ok(known);
    }
    let ui = Ui::install(verbosity)?;
    let (run, collected) = RunDir::create(&attempt.cache, || ui.check())?;
    collected.iter().for_each(|dead| ui.note(&dead.to_string()));
    let conclusion = attempt.within(Host { workspace, run: &run, ui: &ui }, seen);
    // A run that was interrupted is deleted, too.
    let discarded = run.discard(|| Ok(()));
    let of_host =
        |error| host_fault(error, "run the machine", "see the causes; nothing is known about the program");
    let conclusion = conclusion.map_err(of_host)?;
    discarded.map_err(of_host)?;
    Ok(conclusion)
}

impl Program {
    /// Returns the conclusion if the program's dynamic loader or interpreter is known to be missing.
    ///
    /// # Errors
    /// Returns a failure of the host if the program needs a file system and there is none.
    fn check_runner(&self, core: Core<'_>) -> Result<Option<Conclusion>> {
        let Some(runner) = &self.subject.runner else { return Ok(None) };
        match self.root.check_has(runner, core) {
            Ok(()) => Ok(None),
            Err(Missing { sentence, remedy: Some(remedy) }) => Err(Failure::host(sentence, remedy).into()),
            Err(Missing { sentence, remedy: None }) => Ok(Some(Conclusion::missing(sentence))),
        }
    }
}

impl<'a> Attempt<'a> {
    fn prepare(args: &'a TryArgs) -> Result<Self> {
        let (arch, device) = device_named(&args.device)?;
        let cache = Cache::open()?;
        let core = Core { arch, device: &device.name };
        let plan = Plan::of(args, core, &cache)?;
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
        Ok(Self { args, cache, arch, device, kernel, plan, emulator })
    }

    fn core(&self) -> Core<'_> {
        Core { arch: self.arch, device: &self.device.name }
    }

    /// Unpacks the archive if there is one, and runs the program unless one of its files is missing.
    fn within(&self, host: Host<'_>, seen: &mut Seen) -> Result<Conclusion> {
        let unpacked;
        let program = match &self.plan {
            Plan::Ready(program) => program,
            Plan::Image => {
                let archive = &self.args.path;
                let (root, image) = self.unpack(archive, host)?;
                let config = image.context("read the configuration of the image")?.config;
                let container = Container { archive, root: &host.run.work().join(UNPACKED), config };
                match container.subject(self.args, self.core())? {
                    Ok(subject) => unpacked = Program { root, subject: subject.given(self.args) },
                    Err(sentence) => return Ok(Conclusion::missing(sentence)),
                }
                &unpacked
            }
            Plan::Sysroot(archive, subject) => {
                let (root, _) = self.unpack(archive, host)?;
                unpacked = Program { root, subject: subject.clone() };
                if let Some(known) = unpacked.check_runner(self.core())? {
                    return Ok(known);
                }
                &unpacked
            }
        };
        let outcome = self.make(program, host, seen)?;
        let runner = program.subject.runner.as_ref();
        Ok(Conclusion::of(outcome, runner, &program.root.name(), self.args.timeout))
    }

    /// Unpacks an archive into the directory of the run.
    fn unpack(&self, archive: &Path, Host { run, ui, .. }: Host<'_>) -> Result<(Root, Option<Image>)> {
        let step = Step { kind: "unpack", what: "archive", title: "unpack" };
        ui.step(&self.cache, step, || {
            let unpacked = container::unpack(archive, &run.work().join(UNPACKED), self.core(), ui)?;
            let name = archive.display().to_string();
            let detail = format!("{name}: {}", unpacked.kind);
            Ok(((Root::Directory { path: unpacked.root, name }, unpacked.image), detail))
        })
    }

    /// Boots the machine and runs the program.
    fn make(&self, program: &Program, host: Host<'_>, seen: &mut Seen) -> Result<Outcome> {
        let (Program { root, subject }, Host { workspace, run, ui }) = (program, host);
        if let Root::Disk { directory, .. } = root {
            run.uses_image(directory)?;
        }
        let kernel = kernel::ensure(&self.cache, self.kernel, &program.uses(), run, ui)?;
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
                root,
                share: subject.share.as_deref(),
            };
            let (machine, stream) = Machine::start(&parts, run, ui)?;
            let session = Session::begin(stream, &program.job()?)?;
            let about = session.wait_for_start(&machine, ui)?;
            Ok(((machine, session), format!("{about}, on {} with {}", self.device.name, root.name())))
        })?;
        let limit = Duration::from_secs(self.args.timeout);
        let outcome = session.follow(&machine, limit, seen, ui)?;
        machine.stop()?;
        Ok(outcome)
    }
}

impl Plan {
    /// # Errors
    /// Returns a usage error for a program or a flag that is not valid.
    fn of(args: &TryArgs, core: Core<'_>, cache: &Cache) -> Result<Self> {
        if is_image_at(&args.path)? {
            if args.sysroot.is_some() || args.image.is_some() {
                let path = args.path.display();
                let message = format!(
                    "try {path}: a container image has its own file system; leave out --sysroot and --image"
                );
                return Err(Failure::usage(message).into());
            }
            return Ok(Self::Image);
        }
        let subject = |root: &Root| Subject::of(&args.path, root, core).map(|subject| subject.given(args));
        Ok(match Base::from_args(args, core.arch, cache)? {
            Base::Ready(root) => Self::Ready(Program { subject: subject(&root)?, root }),
            Base::Archive(archive) => Self::Sysroot(archive, subject(&Root::Nothing)?),
        })
    }
}

impl Program {
    /// Returns what the machine needs modules for.
    fn uses(&self) -> Vec<Use> {
        let has_share = self.subject.share.is_some() || matches!(self.root, Root::Directory { .. });
        let has_disk = matches!(self.root, Root::Disk { .. });
        let all = [(Use::Always, true), (Use::Share, has_share), (Use::Disk, has_disk)];
        all.into_iter().filter(|(_, needed)| *needed).map(|(one, _)| one).collect()
    }

    fn job(&self) -> Result<Job> {
        let Subject { share, program, directory, environment, arguments, user, .. } = self.subject.clone();
        let root = match &self.root {
            Root::Nothing => "",
            Root::Directory { .. } => "root",
            Root::Disk { .. } => "disk",
        };
        Ok(Job {
            time: SystemTime::now().duration_since(UNIX_EPOCH).context("read this host's clock")?.as_secs(),
            root: root.to_owned(),
            share: share.map_or(String::new(), |_| SHARE.to_owned()),
            directory,
            program: program.into_os_string().into_vec(),
            environment,
            arguments,
            user,
        })
    }
}
