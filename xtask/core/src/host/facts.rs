//! Gathers the facts about this machine that depend on the guest, in parallel. [`LocalHost`] has the facts that do not
//! depend on the guest. The facts are evaluated in `preflight::findings`.

use std::path::{Path, PathBuf};
use std::thread;

use xshell::Shell;

use super::edk2::{Edk2, KnownBad, known_bad};
use super::firmware::{self, AarchFirmware, Rejected};
use super::kvm::{self, Candidate, Kvm};
use super::local::{LocalHost, Purpose};
use super::qemu::Emulator;
use super::tools;
use crate::arch::{Accelerator, VmArchitecture};
use crate::build::compiler;
use crate::build::configuration::Configuration;
use crate::build::linker::{Unfit, UnfitKind};
use crate::build::rust_target_installed;
use crate::cache::Cache;
use crate::cli::MachineArgs;
use crate::cpu::CpuModel;
use crate::error::Failure;
use crate::image::choice::Choice;
use crate::image::{Image, Source};
use crate::workspace::{NATIVE_LINKER, Workspace};

/// The facts about this machine for one guest. An `Err` contains the reason in words.
#[derive(Debug, Clone)]
pub struct Facts {
    pub arch: VmArchitecture,
    /// The facts that do not depend on the guest.
    pub host: LocalHost,
    /// The full-system emulator; `None` if it is missing. If it does not work, `Err` has its path and the reason.
    pub emulator: Option<Result<Emulator, (PathBuf, String)>>,
    /// The installed emulators for other architectures. They are searched only if the required emulator is missing.
    pub other_emulators: Vec<String>,
    pub firmware: Result<AarchFirmware, Vec<Rejected>>,
    /// The release of the firmware; `None` if its file does not name one.
    pub edk2: Option<Edk2>,
    /// `Ok(true)` if rustc has a standard library for the target.
    pub rust_target: Result<bool, String>,
    /// The libraries that the linker for the target finds.
    pub linker: Result<Linking, Unfit>,
    pub kvm: Kvm,
    /// True if this host's kernel can run programs of the guest's architecture, which an image build needs.
    pub runs_guest_programs: bool,
    /// True if QEMU's user emulator for the guest's architecture is installed, even if it is not registered with the
    /// kernel.
    pub user_emulator: bool,
    /// The command that registers the user emulator with the kernel. It is `update-binfmts` on Debian 12 and Ubuntu,
    /// and `systemd-binfmt` elsewhere, which works without a running systemd. `None` if neither is possible.
    pub registers_handler: Option<Vec<String>>,
    /// The requested guest.
    pub guest: Guest,
    /// The runs for which this machine is checked.
    pub purpose: Purpose,
    /// True if a libvirt daemon runs the guest (`--connect`), so that this host needs no QEMU.
    pub is_on_daemon: bool,
}

/// The libraries that a linker finds.
#[derive(Debug, Clone)]
pub struct Linking {
    /// The C library and its version.
    pub libc: Option<(PathBuf, String)>,
    /// True if the linker finds the static C library, which the smoke's workload needs.
    pub static_libc: bool,
}

/// The requested guest.
#[derive(Debug, Clone)]
pub struct Guest {
    pub machine: MachineArgs,
    /// The image and its fallback.
    pub choice: Choice,
    /// Which image is built from packages.
    pub built: Built,
    /// The size in bytes of the image that is downloaded; `None` if none is, and 0 if the size is unknown.
    pub download: Option<u64>,
}

/// The image that a run builds from packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Built {
    /// No image is built.
    No,
    /// The fallback image is built if the host of the chosen image cannot be reached.
    Fallback,
    /// The chosen image is built.
    Chosen,
}

impl Guest {
    /// Resolves the guest that the command line requests. An image that is in `cache` is neither built nor downloaded,
    /// and then no fallback image is needed.
    ///
    /// # Errors
    /// Returns a usage error if the requested image is not valid.
    pub fn from_args(
        machine: &MachineArgs,
        arch: VmArchitecture,
        cache: Option<&Cache>,
    ) -> Result<Self, Failure> {
        let choice = Choice::from_args(&machine.image, arch)?;
        let is_made = |image: &&Image| !cache.is_some_and(|cache| image.is_cached(cache));
        let made = Some(&choice.image).filter(is_made);
        let fallback = made.and(choice.fallback.as_ref()).filter(is_made);
        let built = match (made, fallback) {
            (Some(image), _) if image.is_built() => Built::Chosen,
            (_, Some(image)) if image.is_built() => Built::Fallback,
            _ => Built::No,
        };
        let download = made.and_then(|image| match &image.source {
            Source::Download(download) => Some(download.bytes.unwrap_or(0)),
            Source::Packages(_) | Source::File(_) => None,
        });
        Ok(Self { machine: machine.clone(), choice, built, download })
    }

    /// Returns the glibc version of the image or of its fallback image, whichever is older. Returns `None` if the
    /// catalogue states neither.
    pub fn glibc(&self) -> Option<&str> {
        let images = std::iter::once(&self.choice.image).chain(&self.choice.fallback);
        let glibc = images.filter_map(|image| Some(image.expected.as_ref()?.glibc.as_str()));
        glibc.min_by_key(|version| tools::release(version))
    }
}

impl Guest {
    fn kvm_candidate(&self, arch: VmArchitecture) -> Candidate<'_> {
        Candidate { arch, cpu: self.machine.cpu.as_deref(), image: &self.choice.image.name }
    }
}

impl Facts {
    /// Gathers the facts for guests of `arch`.
    pub fn gather(workspace: &Workspace, host: LocalHost, arch: VmArchitecture, guest: Guest) -> Self {
        let profile = arch.profile();
        let cache = Cache::from_env().ok();
        let cpu = guest.machine.cpu.clone();
        thread::scope(|scope| {
            let emulator = scope.spawn(|| {
                let path = tools::find(profile.emulator)?;
                Some(
                    Emulator::ask(&path, profile, cpu.as_deref())
                        .map_err(|error| (path, format!("{error:#}"))),
                )
            });
            let rust_target = scope.spawn(|| {
                let shell = Shell::new().map_err(|error| error.to_string())?;
                rust_target_installed(&shell, profile.triple).map_err(|error| format!("{error:#}"))
            });
            let linker = scope.spawn(|| linking(workspace, arch));
            let firmware = firmware::discover(arch, Path::new("/"));
            let edk2 = firmware.as_ref().ok().and_then(|pair| Edk2::read(&pair.code));
            let emulator = emulator.join().expect("a probe does not panic");
            let other_emulators =
                if emulator.is_none() { tools::find_all("qemu-system-") } else { Vec::new() };
            Self {
                arch,
                host,
                emulator,
                other_emulators,
                firmware,
                edk2,
                rust_target: rust_target.join().expect("a probe does not panic"),
                linker: linker.join().expect("a probe does not panic"),
                kvm: kvm::look(guest.kvm_candidate(arch), cache.as_ref()),
                runs_guest_programs: runs_guest_programs(arch),
                user_emulator: ["-static", ""]
                    .iter()
                    .any(|ending| tools::find(&format!("qemu-{}{ending}", profile.machine)).is_some()),
                registers_handler: registers_handler(arch),
                guest,
                purpose: Purpose::Run,
                is_on_daemon: false,
            }
        })
    }

    /// Returns the known fault that an emulated guest would have with this firmware, this emulator and the requested
    /// CPU.
    pub fn known_bad(&self) -> Option<&'static KnownBad> {
        let cpu = self.guest.machine.cpu.as_deref();
        let model = CpuModel::requested(self.arch, Accelerator::Tcg, cpu);
        known_bad(self.arch.profile().machine, self.working_emulator()?.release(), self.edk2, model.name())
    }

    /// Returns the emulator if it is installed and works.
    pub fn working_emulator(&self) -> Option<&Emulator> {
        self.emulator.as_ref()?.as_ref().ok()
    }
}

fn linking(workspace: &Workspace, arch: VmArchitecture) -> Result<Linking, Unfit> {
    let profile = arch.profile();
    let unreadable = |error: anyhow::Error| Unfit {
        kind: UnfitKind::Configuration,
        reason: format!("{error:#}"),
        remedy: "correct the syntax of that file".to_owned(),
        is_users: false,
    };
    let shell = Shell::new().map_err(|error| unreadable(error.into()))?;
    let configuration = Configuration::load(workspace).map_err(unreadable)?;
    let linker = configuration.linker(profile).map_err(unreadable)?;
    linker.check(&shell, profile)?;
    if let Some(host) = VmArchitecture::of_host().filter(|host| *host != arch) {
        compiler::check(&shell, &configuration, host.profile(), Path::new(NATIVE_LINKER))?;
    }
    compiler::check(&shell, &configuration, profile, &linker.program)?;
    Ok(Linking { libc: linker.libc(&shell), static_libc: linker.finds(&shell, "libc.a") })
}

/// Returns the command that registers the user emulator with the kernel. Debian 13's emulator can be registered only by
/// `systemd-binfmt` (binfmt.d(5)). If its argument is one file, this program does not change other formats.
fn registers_handler(arch: VmArchitecture) -> Option<Vec<String>> {
    let handler = format!("qemu-{}", arch.profile().machine);
    if let Some(program) = tools::find("update-binfmts")
        && Path::new("/usr/share/binfmts").join(&handler).exists()
    {
        return Some(vec![program.display().to_string(), "--enable".to_owned(), handler]);
    }
    let systemds = Path::new("/usr/lib/systemd/systemd-binfmt");
    let files = ["", "-static"].map(|ending| format!("{handler}{ending}.conf"));
    let file = files.into_iter().find(|file| Path::new("/usr/lib/binfmt.d").join(file).exists());
    file.filter(|_| systemds.exists()).map(|file| vec![systemds.display().to_string(), file])
}

fn runs_guest_programs(arch: VmArchitecture) -> bool {
    if VmArchitecture::of_host() == Some(arch) {
        return true;
    }
    let handler = format!("/proc/sys/fs/binfmt_misc/qemu-{}", arch.profile().machine);
    // The flag F is needed, because the file tree of a new image does not contain the emulator. With F, the kernel
    // opens the emulator when it is registered (Linux, Documentation/admin-guide/binfmt-misc.rst).
    let fixed = |text: &str| text.lines().any(|line| line.starts_with("flags:") && line.contains('F'));
    std::fs::read_to_string(handler).is_ok_and(|text| text.starts_with("enabled") && fixed(&text))
}
