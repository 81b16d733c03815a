//! The first process of the machine of `cargo xtask try`. It loads the modules of the initramfs, receives the job from
//! the host, makes the file system of the program, runs the program, and reports its output and its end. It is a static
//! executable without dependencies, because the initramfs has no other file than this one and the modules.
//!
//! If it fails before the port works, it writes the reason to the console and stops the machine. The host then shows
//! the last lines of the console.

#[path = "../src/wire.rs"]
#[expect(dead_code, unreachable_pub, reason = "the crate of the host uses the rest of this file")]
mod wire;

mod user;

use std::ffi::{CString, OsStr, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use user::become_user;
use wire::{End, Job, Kind, User};

/// The port of the host (Linux, drivers/char/virtio_console.c: device 0, port 1).
const PORT: &str = "/dev/vport0p1";
/// The root of the program's file system.
const ROOT: &str = "/new";
/// The time in which the devices and the shares must appear.
const PATIENCE: Duration = Duration::from_secs(20);
/// The pause between two looks for them.
const PAUSE: Duration = Duration::from_millis(20);
/// The time in which the host must end the machine after the program's end.
const FAREWELL: Duration = Duration::from_secs(10);

/// mount(2).
const MS_RDONLY: c_ulong = 1;
/// finit_module(2).
#[cfg(target_arch = "aarch64")]
const SYS_FINIT_MODULE: c_long = 273;
#[cfg(target_arch = "x86_64")]
const SYS_FINIT_MODULE: c_long = 313;
/// reboot(2).
const RB_POWER_OFF: c_int = 0x4321_fedc;
/// kill(2): -1 stands for every process except the caller.
const EVERY_PROCESS: c_int = -1;
const SIGKILL: c_int = 9;
/// sysconf(3), in glibc.
const SC_PAGESIZE: c_int = 30;
/// netdevice(7).
const SIOCSIFFLAGS: c_ulong = 0x8914;
const IFF_UP: u8 = 1;

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn reboot(command: c_int) -> c_int;
    fn kill(pid: c_int, signal: c_int) -> c_int;
    fn sysconf(name: c_int) -> c_long;
    fn settimeofday(time: *const [i64; 2], zone: *const c_void) -> c_int;
    fn ioctl(descriptor: c_int, request: c_ulong, ...) -> c_int;
}

fn main() {
    if let Err(reason) = boot() {
        eprintln!("cargo xtask try: {reason}");
    }
    // SAFETY: the call has no pointer. The kernel panics if the first process ends, so it must not return.
    unsafe { reboot(RB_POWER_OFF) };
}

/// Prepares the port, runs the job, and sends its end. Then waits for the host, which ends the machine.
fn boot() -> Result<(), String> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mounted(kind, place, kind, 0, "")?;
    }
    let mut modules: Vec<_> =
        fs::read_dir("/modules").map_err(|error| format!("/modules: {error}"))?.collect();
    modules.sort_by_key(|entry| entry.as_ref().map(fs::DirEntry::file_name).ok());
    for module in modules {
        load(&module.map_err(|error| format!("/modules: {error}"))?.path())?;
    }
    let port =
        || File::options().read(true).write(true).open(PORT).map_err(|error| format!("{PORT}: {error}"));
    let port = patiently(port)?;
    let shared = Arc::new(Mutex::new(port.try_clone().map_err(|error| format!("{PORT}: {error}"))?));
    let outcome = work(port, &shared);
    let (kind, content) = match outcome {
        Ok(end) => (Kind::End, end.encode()),
        Err(reason) => (Kind::Failed, reason),
    };
    say(&shared, kind, content.as_bytes()).map_err(|error| format!("{PORT}: {error}"))?;
    thread::sleep(FAREWELL);
    Ok(())
}

fn work(mut port: File, shared: &Arc<Mutex<File>>) -> Result<End, String> {
    // Until the driver knows that the host has connected, a read returns the end of the file.
    let received =
        patiently(|| wire::receive(&mut port).map_err(|error| format!("receive the job: {error}")))?;
    let job = match received {
        (Kind::Job, content) => Job::decode(&content).ok_or("the job is not complete")?,
        (kind, _) => return Err(format!("the host began with {kind:?}")),
    };
    // This may wait for the other processor while this one mounts.
    let processors = thread::spawn(start_processors);
    set_time(job.time);
    let_loopback_up().map_err(|error| format!("start the interface lo: {error}"))?;
    enter(&job)?;
    processors.join().map_err(|_panic| "start the processors: the thread panicked")??;
    say(shared, Kind::Started, kernel().as_bytes()).map_err(|error| format!("{PORT}: {error}"))?;
    run(&job, port, shared).map_err(|error| format!("run the program: {error}"))
}

/// Starts the processors that the kernel has not started, because of `maxcpus=1` on its command line.
fn start_processors() -> Result<(), String> {
    let place = "/sys/devices/system/cpu";
    let entries = fs::read_dir(place).map_err(|error| format!("{place}: {error}"))?;
    // The processor that cannot be stopped has no such file, nor have the other entries.
    let switches = entries.flatten().map(|entry| entry.path().join("online"));
    for switch in switches.filter(|path| fs::read(path).is_ok_and(|state| state.starts_with(b"0"))) {
        fs::write(&switch, "1").map_err(|error| format!("start {}: {error}", switch.display()))?;
    }
    Ok(())
}

/// Makes the file system of the program, and changes to it.
fn enter(job: &Job) -> Result<(), String> {
    for directory in ["/lower", "/share", "/rw", ROOT] {
        made(directory)?;
    }
    mounted("tmpfs", "/rw", "tmpfs", 0, "mode=755")?;
    match job.root.as_str() {
        "" => mounted("tmpfs", ROOT, "tmpfs", 0, "mode=755")?,
        "disk" => {
            patiently(|| mount_system("/lower"))?;
            overlaid("/lower", "root", ROOT)?;
        }
        tag => {
            shared(tag, "/lower")?;
            overlaid("/lower", "root", ROOT)?;
        }
    }
    for (kind, place) in [("proc", "proc"), ("sysfs", "sys"), ("devtmpfs", "dev")] {
        let place = format!("{ROOT}/{place}");
        made(&place)?;
        mounted(kind, &place, kind, 0, "")?;
    }
    for (kind, place) in [("devpts", "dev/pts"), ("tmpfs", "dev/shm"), ("tmpfs", "tmp"), ("tmpfs", "run")] {
        let place = format!("{ROOT}/{place}");
        made(&place)?;
        mounted(kind, &place, kind, 0, if kind == "tmpfs" { "mode=1777" } else { "" })?;
    }
    for (link, target) in
        [("fd", "self/fd"), ("stdin", "self/fd/0"), ("stdout", "self/fd/1"), ("stderr", "self/fd/2")]
    {
        let link = format!("{ROOT}/dev/{link}");
        std::os::unix::fs::symlink(format!("/proc/{target}"), &link)
            .map_err(|error| format!("{link}: {error}"))?;
    }
    if !job.share.is_empty() {
        shared("program", "/share")?;
        let place = format!("{ROOT}{}", job.share);
        made(&place)?;
        overlaid("/share", "share", &place)?;
    }
    std::os::unix::fs::chroot(ROOT).map_err(|error| format!("change the root to {ROOT}: {error}"))?;
    // podman also makes the working directory of a container.
    let directory = OsStr::from_bytes(&job.directory);
    let attempt = |error: io::Error| format!("change to {}: {error}", directory.display());
    fs::create_dir_all(directory).map_err(attempt)?;
    std::env::set_current_dir(directory).map_err(attempt)
}

/// Mounts the partition of the disk that has a system. An image may have a partition of its own for `/boot`.
fn mount_system(place: &str) -> Result<(), String> {
    let text =
        fs::read_to_string("/proc/partitions").map_err(|error| format!("/proc/partitions: {error}"))?;
    let mut tried = Vec::new();
    for name in
        text.lines().filter_map(|line| line.split_whitespace().nth(3)).filter(|name| name.starts_with("vd"))
    {
        // Without `noload`, ext4 does not mount a file system read-only whose journal is not empty.
        match mounted(&format!("/dev/{name}"), place, "ext4", MS_RDONLY, "noload") {
            Ok(()) if Path::new(place).join("usr/lib").exists() => return Ok(()),
            Ok(()) => tried.push(format!("{name} has no /usr/lib")),
            Err(error) => tried.push(error),
        }
    }
    Err(format!("find the image's system on its disk: {}", tried.join("; ")))
}

/// Runs the program to its end. After that, ends the processes that it left, so that they close their pipes.
fn run(job: &Job, port: File, shared: &Arc<Mutex<File>>) -> io::Result<End> {
    let mut command = Command::new(OsStr::from_bytes(&job.program));
    let mut arguments = job.arguments.iter().map(|word| OsStr::from_bytes(word));
    command.arg0(arguments.next().unwrap_or_default()).args(arguments).env_clear();
    for variable in &job.environment {
        let at = variable.iter().position(|byte| *byte == b'=').unwrap_or(variable.len());
        let value = variable.get(at + 1..).unwrap_or_default();
        command.env(OsStr::from_bytes(&variable[..at]), OsStr::from_bytes(value));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if job.user != User::default() {
        let user = job.user.clone();
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(move || become_user(&user)) };
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return error.raw_os_error().map(End::Refused).ok_or(error),
    };
    let stdin = child.stdin.take();
    thread::spawn(move || feed(port, stdin));
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let pumps = [
        stdout.map(|pipe| pump(pipe, Kind::Output, shared)),
        stderr.map(|pipe| pump(pipe, Kind::Error, shared)),
    ];
    let status = child.wait()?;
    // SAFETY: the call has no pointer. It does not signal this process.
    unsafe { kill(EVERY_PROCESS, SIGKILL) };
    for pump in pumps.into_iter().flatten() {
        pump.join().map_err(|_panic| io::Error::other("the transfer of the output panicked"))??;
    }
    // A signal or an exit code is below 256 (wait(2)).
    Ok(match (status.code(), status.signal()) {
        (Some(code), _) => End::Exit(code as u8),
        (None, signal) => End::Signal(signal.unwrap_or_default() as u8),
    })
}

fn pump(
    mut from: impl Read + Send + 'static,
    kind: Kind,
    port: &Arc<Mutex<File>>,
) -> thread::JoinHandle<io::Result<()>> {
    let port = Arc::clone(port);
    thread::spawn(move || {
        let mut buffer = vec![0; wire::MOST];
        loop {
            match from.read(&mut buffer)? {
                0 => return Ok(()),
                length => say(&port, kind, &buffer[..length])?,
            }
        }
    })
}

/// Passes the host's input on. A program that has closed its standard input gets no more.
fn feed(mut port: File, mut stdin: Option<ChildStdin>) {
    while let Ok((Kind::Input, content)) = wire::receive(&mut port) {
        let open = stdin.as_mut().is_some_and(|pipe| io::Write::write_all(pipe, &content).is_ok());
        if content.is_empty() || !open {
            stdin = None;
        }
    }
}

fn say(port: &Mutex<File>, kind: Kind, content: &[u8]) -> io::Result<()> {
    wire::send(&mut *port.lock().unwrap_or_else(PoisonError::into_inner), kind, content)
}

/// Repeats an attempt until it succeeds or the patience ends: devices appear some time after their driver.
fn patiently<T>(mut attempt: impl FnMut() -> Result<T, String>) -> Result<T, String> {
    let started = std::time::Instant::now();
    loop {
        match attempt() {
            Err(_) if started.elapsed() < PATIENCE => thread::sleep(PAUSE),
            other => return other,
        }
    }
}

fn load(path: &Path) -> Result<(), String> {
    let attempt = |error: io::Error| format!("load the module {}: {error}", path.display());
    let file = File::open(path).map_err(attempt)?;
    let flags: c_int = 0;
    // SAFETY: the descriptor is open, and the parameters are a string with a final zero.
    let result = unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), flags) };
    if result == 0 { Ok(()) } else { Err(attempt(io::Error::last_os_error())) }
}

fn shared(tag: &str, place: &str) -> Result<(), String> {
    let options = "trans=virtio,version=9p2000.L,cache=loose,msize=512000";
    patiently(|| mounted(tag, place, "9p", MS_RDONLY, options))
}

/// Mounts a writable layer in memory above a directory.
fn overlaid(lower: &str, name: &str, place: &str) -> Result<(), String> {
    let [upper, work] = ["upper", "work"].map(|part| format!("/rw/{name}/{part}"));
    made(&upper)?;
    made(&work)?;
    mounted("overlay", place, "overlay", 0, &format!("lowerdir={lower},upperdir={upper},workdir={work}"))
}

fn made(directory: &str) -> Result<(), String> {
    fs::create_dir_all(directory).map_err(|error| format!("make {directory}: {error}"))
}

fn mounted(source: &str, target: &str, kind: &str, flags: c_ulong, data: &str) -> Result<(), String> {
    made(target)?;
    let text = |word: &str| CString::new(word).map_err(|error| format!("mount {source}: {error}"));
    let (from, to, of, with) = (text(source)?, text(target)?, text(kind)?, text(data)?);
    // SAFETY: each pointer is a string with a final zero, which lives until the call returns.
    let result = unsafe { mount(from.as_ptr(), to.as_ptr(), of.as_ptr(), flags, with.as_ptr().cast()) };
    let error = io::Error::last_os_error();
    if result == 0 { Ok(()) } else { Err(format!("mount {source} ({kind}) at {target}: {error}")) }
}

fn set_time(seconds: u64) {
    let time = [i64::try_from(seconds).unwrap_or_default(), 0];
    // SAFETY: the structure is a timeval (settimeofday(2)), and the time zone may be null.
    unsafe { settimeofday(&raw const time, std::ptr::null()) };
}

/// Lets programs use 127.0.0.1. The machine has no other interface.
fn let_loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let mut request = [0u8; 40];
    request[..2].copy_from_slice(b"lo");
    request[16] = IFF_UP;
    // SAFETY: the request is a structure ifreq (netdevice(7)), and the call does not keep it.
    let result = unsafe { ioctl(socket.as_raw_fd(), SIOCSIFFLAGS, request.as_ptr()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Describes the kernel, for messages.
fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // SAFETY: the call has no pointer.
    let page = unsafe { sysconf(SC_PAGESIZE) };
    format!("Linux {}, pages of {} KiB", release.trim(), page / 1024)
}
