//! The machine: QEMU without firmware, with the kernel, the initramfs, a port, and the shares or the disk.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use xtask_core::arch::VmArchitecture;
use xtask_core::error::Failure;
use xtask_core::image::Format;
use xtask_core::limits;
use xtask_core::runs::RunDir;
use xtask_jobs::Ui;
use xtask_jobs::child::{Child, Job, last_lines};

use crate::root::Root;

/// MiB of memory. QEMU takes memory from the host only when the guest uses it.
pub(crate) const MEMORY_MIB: u32 = 2048;
const VCPUS: u32 = 2;
/// The number of lines of the console, or of QEMU's own messages, that an error shows.
const SHOWN_LINES: usize = 12;
/// The number of lines in which the first line of a panic is looked for. Traces and registers follow it.
const READ_LINES: usize = 100;
/// The beginning of a panic (Linux, kernel/panic.c).
const PANIC: &str = "Kernel panic";

/// The parts of a machine.
pub(crate) struct Parts<'a> {
    pub(crate) arch: VmArchitecture,
    /// QEMU's name of the core.
    pub(crate) cpu: &'a str,
    pub(crate) emulator: &'a Path,
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    pub(crate) root: &'a Root,
    /// The directory with the program.
    pub(crate) share: Option<&'a Path>,
}

/// A machine that runs. It ends when this value is dropped.
pub(crate) struct Machine {
    child: Child,
    work: PathBuf,
}

impl Machine {
    /// Starts QEMU, and waits until it has connected its port. QEMU belongs to `run`.
    pub(crate) fn start(parts: &Parts<'_>, run: &RunDir, ui: &Ui) -> Result<(Self, UnixStream)> {
        let work = run.work();
        // QEMU connects to this socket. If QEMU listened, the first messages of the guest could precede the connection.
        let socket = work.join("port");
        let listener =
            UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
        listener.set_nonblocking(true).context("listen for QEMU")?;
        let (arguments, log) = (arguments(parts, &work), work.join("qemu.log"));
        ui.detail(&format!("{} {}", parts.emulator.display(), words(&arguments)));
        let job = Job { program: parts.emulator, arguments, owner: &work, log, environment: Vec::new() };
        let machine = Self { child: Child::start(&job)?, work };
        let deadline = Instant::now() + limits::SERVER_START;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).context("use QEMU's port")?;
                    return Ok((machine, stream));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("accept QEMU's connection"),
            }
            ui.check()?;
            if machine.child.ended()?.is_some() || Instant::now() > deadline {
                return Err(machine.fault("start QEMU"));
            }
            std::thread::sleep(limits::REAP);
        }
    }

    /// Returns a failure of the host with the last lines of the console and of QEMU.
    pub(crate) fn fault(&self, attempted: &str) -> anyhow::Error {
        let tail = |name: &str| telling(last_lines(&self.work.join(name), READ_LINES));
        let lines = [tail("console.log"), tail("qemu.log")].concat();
        let shown = if lines.is_empty() { "it has printed nothing".to_owned() } else { lines.join("\n    ") };
        Failure::host(
            format!("{attempted}; the machine's last lines:\n    {shown}"),
            "this says nothing about the program; run the command again, with -v for QEMU's command line",
        )
        .into()
    }

    pub(crate) fn stop(&self) -> Result<()> {
        self.child.stop()
    }
}

/// Returns the lines from the beginning of a panic, or the last lines if there is none.
fn telling(mut lines: Vec<String>) -> Vec<String> {
    let panic = lines.iter().position(|line| line.contains(PANIC));
    lines.drain(..panic.unwrap_or(lines.len().saturating_sub(SHOWN_LINES)));
    lines.truncate(SHOWN_LINES);
    lines
}

/// Returns QEMU's arguments; `work` is the directory for its files.
fn arguments(parts: &Parts<'_>, work: &Path) -> Vec<OsString> {
    let profile = parts.arch.profile();
    let (memory, vcpus) = (MEMORY_MIB.to_string(), VCPUS.to_string());
    // A panic restarts the machine, and `-no-reboot` then ends QEMU. The guest's first process starts the other
    // processors, which takes less time there than in the middle of the boot. The kernel's tests of its cryptography
    // take a fifth of the boot and say nothing about the program. On a busy host, the timer of an x86 machine is so
    // late that the kernel's check of it panics ("IO-APIC + timer doesn't work"); `no_timer_check` leaves this check
    // out. The kernels of other architectures pass this unknown word to the first process, which ignores it.
    let line = format!(
        "console={} quiet loglevel=1 panic=-1 maxcpus=1 cryptomgr.notests no_timer_check",
        profile.console
    );
    let mut words: Vec<OsString> = [
        "-no-user-config",
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
        "-nic",
        "none",
        "-machine",
        profile.machine_type,
        "-accel",
        "tcg",
        "-cpu",
        parts.cpu,
        "-m",
        &memory,
        "-smp",
        &vcpus,
        "-append",
        &line,
    ]
    .map(OsString::from)
    .into();
    let mut add = |flag: &str, value: OsString| words.extend([flag.into(), value]);
    add("-kernel", parts.kernel.into());
    add("-initrd", parts.initramfs.into());
    add("-serial", option("file:", &work.join("console.log"), ""));
    add("-device", "virtio-serial-pci".into());
    add("-chardev", option("socket,id=port,path=", &work.join("port"), ""));
    add("-device", "virtserialport,chardev=port,nr=1,name=iot-try".into());
    let mut share = |name: &str, directory: &Path| {
        let rest = ",security_model=none,readonly=on,multidevs=remap";
        add("-fsdev", option(&format!("local,id={name},path="), directory, rest));
        add("-device", format!("virtio-9p-pci,fsdev={name},mount_tag={name}").into());
    };
    if let Some(directory) = parts.share {
        share("program", directory);
    }
    match parts.root {
        Root::Nothing => {}
        Root::Directory { path, .. } => share("root", path),
        Root::Disk { disk, format, .. } => {
            let format = match format {
                Format::Raw => "raw",
                Format::Qcow2 => "qcow2",
            };
            let rest = format!(",if=none,id=disk,format={format},readonly=on");
            add("-drive", option("file=", disk, &rest));
            add("-device", "virtio-blk-pci,drive=disk".into());
        }
    }
    words
}

/// Returns a value with a path. QEMU separates the parts of a value by commas; a doubled comma is one of the path.
fn option(before: &str, path: &Path, after: &str) -> OsString {
    let mut value = before.as_bytes().to_vec();
    for byte in path.as_os_str().as_bytes() {
        value.extend(std::iter::repeat_n(*byte, if *byte == b',' { 2 } else { 1 }));
    }
    value.extend(after.bytes());
    OsString::from_vec(value)
}

fn words(arguments: &[OsString]) -> String {
    arguments.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(root: &Root, share: Option<&Path>) -> String {
        let parts = Parts {
            arch: VmArchitecture::Aarch64,
            cpu: "cortex-a76",
            emulator: Path::new("/usr/bin/qemu-system-aarch64"),
            kernel: Path::new("/k/vmlinuz"),
            initramfs: Path::new("/w/initramfs"),
            root,
            share,
        };
        words(&arguments(&parts, Path::new("/w")))
    }

    #[test]
    fn a_panic_is_shown_from_its_beginning() {
        let lines = |count: usize| (0..count).map(|number| format!("line {number}")).collect::<Vec<_>>();
        assert_eq!(telling(lines(3)), lines(3));
        assert_eq!(telling(lines(50)), lines(50)[50 - SHOWN_LINES..]);
        let mut trace = lines(50);
        trace[10] = format!("[ 20.1] {PANIC} - not syncing");
        assert_eq!(telling(trace.clone()), trace[10..10 + SHOWN_LINES]);
    }

    #[test]
    fn everything_of_the_host_is_read_only_and_there_is_no_network() {
        let disk = Root::Disk {
            name: "debian-12".to_owned(),
            directory: "/c".into(),
            disk: "/c/disk".into(),
            format: Format::Qcow2,
        };
        let directory = Root::Directory { path: "/a,b".into(), name: String::new() };
        let share = Some(Path::new("/programs"));
        for (root, share) in [(&Root::Nothing, share), (&directory, None), (&disk, share)] {
            let line = line(root, share);
            let shared = line.matches("-fsdev ").count() + line.matches("-drive ").count();
            assert_eq!(line.matches("readonly=on").count(), shared, "{line}");
            assert!(line.contains("-nic none") && line.contains("-cpu cortex-a76"), "{line}");
            // Without this, a machine for x86 panics on a busy host, which a test with a machine seldom meets.
            assert!(line.contains(" no_timer_check"), "{line}");
        }
        assert!(line(&directory, None).contains("path=/a,,b,security_model"), "a comma of a path");
    }
}
