//! The first process of the machine of `cargo xtask try`. It loads the modules of the initramfs, receives the job from
//! the host, makes the file system of the program, runs the program, and reports its output and its end. It is a static
//! executable without dependencies, because the initramfs has no other file than this one and the modules.
//!
//! If it fails before the port works, it writes the reason to the console and stops the machine. The host then shows
//! the last lines of the console.

#[path = "../src/wire.rs"]
#[expect(dead_code, unreachable_pub, reason = "the crate of the host uses the rest of this file")]
mod wire;

mod files;
mod user;

use std::ffi::{OsStr, c_int, c_long, c_ulong, c_void};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use files::{enter, mount_at};
use user::become_user;
use wire::{End, Job, Kind, User};

/// The port of the host (Linux, drivers/char/virtio_console.c: device 0, port 1).
const PORT: &str = "/dev/vport0p1";
/// The time in which the devices and the shares must appear.
const DEVICE_WAIT: Duration = Duration::from_secs(20);
/// The pause between two looks for them.
const RETRY_PAUSE: Duration = Duration::from_millis(20);
/// The time in which the host must end the machine after the program's end.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(10);

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
        mount_at(kind, place, kind, 0, "")?;
    }
    let mut modules: Vec<_> =
        fs::read_dir("/modules").map_err(|error| format!("/modules: {error}"))?.collect();
    modules.sort_by_key(|entry| entry.as_ref().map(fs::DirEntry::file_name).ok());
    for module in modules {
        load(&module.map_err(|error| format!("/modules: {error}"))?.path())?;
    }
    let port =
        || File::options().read(true).write(true).open(PORT).map_err(|error| format!("{PORT}: {error}"));
    let port = retry(port)?;
    let shared = Arc::new(Mutex::new(port.try_clone().map_err(|error| format!("{PORT}: {error}"))?));
    let outcome = serve(port, &shared);
    let (kind, content) = match outcome {
        Ok(end) => (Kind::End, end.encode()),
        Err(reason) => (Kind::Failed, reason),
    };
    send(&shared, kind, content.as_bytes()).map_err(|error| format!("{PORT}: {error}"))?;
    thread::sleep(SHUTDOWN_WAIT);
    Ok(())
}

fn serve(mut port: File, shared: &Arc<Mutex<File>>) -> Result<End, String> {
    // Until the driver knows that the host has connected, a read returns the end of the file.
    let received = retry(|| wire::receive(&mut port).map_err(|error| format!("receive the job: {error}")))?;
    let job = match received {
        (Kind::Job, content) => Job::decode(&content).ok_or("the job is not complete")?,
        (kind, _) => return Err(format!("the host began with {kind:?}")),
    };
    let stopped = stopped_processors()?;
    // This may wait for the other processor while this one mounts.
    let processors = thread::spawn(|| start_processors(stopped));
    set_time(job.time);
    start_loopback().map_err(|error| format!("start the interface lo: {error}"))?;
    enter(&job)?;
    processors.join().map_err(|_panic| "start the processors: the thread panicked")??;
    send(shared, Kind::Started, kernel().as_bytes()).map_err(|error| format!("{PORT}: {error}"))?;
    run(&job, port, shared).map_err(|error| format!("run the program: {error}"))
}

/// Opens the switch of each processor that the kernel has not started, because of `maxcpus=1` on its command line. The
/// paths of the switches are not valid while this process changes its root.
fn stopped_processors() -> Result<Vec<(PathBuf, File)>, String> {
    let place = "/sys/devices/system/cpu";
    let entries = fs::read_dir(place).map_err(|error| format!("{place}: {error}"))?;
    // The processor that cannot be stopped has no such file, nor have the other entries.
    let switches = entries.flatten().map(|entry| entry.path().join("online"));
    let stopped = switches.filter(|path| fs::read(path).is_ok_and(|state| state.starts_with(b"0")));
    let open = |path: PathBuf| match File::options().write(true).open(&path) {
        Ok(file) => Ok((path, file)),
        Err(error) => Err(format!("{}: {error}", path.display())),
    };
    stopped.map(open).collect()
}

fn start_processors(switches: Vec<(PathBuf, File)>) -> Result<(), String> {
    for (path, mut switch) in switches {
        switch.write_all(b"1").map_err(|error| format!("start {}: {error}", path.display()))?;
    }
    Ok(())
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
    let has_reader = Arc::new(AtomicBool::new(true));
    let of_input = Arc::clone(&has_reader);
    thread::spawn(move || forward_input(port, stdin, &of_input));
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let pumps = [
        stdout.map(|pipe| forward_output(pipe, Kind::Output, shared, has_reader)),
        stderr.map(|pipe| forward_output(pipe, Kind::Error, shared, Arc::new(AtomicBool::new(true)))),
    ];
    let status = child.wait()?;
    let is_starved = status.signal() == Some(SIGKILL) && memory_was_full();
    // SAFETY: the call has no pointer. It does not signal this process.
    unsafe { kill(EVERY_PROCESS, SIGKILL) };
    for pump in pumps.into_iter().flatten() {
        pump.join().map_err(|_panic| io::Error::other("the transfer of the output panicked"))??;
    }
    // A signal or an exit code is below 256 (wait(2)).
    Ok(match (status.code(), status.signal()) {
        _ if is_starved => End::Starved,
        (Some(code), _) => End::Exit(code as u8),
        (None, signal) => End::Signal(signal.unwrap_or_default() as u8),
    })
}

/// Returns whether the kernel has killed a process because the memory was full.
fn memory_was_full() -> bool {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let mut counts = text.lines().filter_map(|line| line.strip_prefix("oom_kill "));
    counts.next().is_some_and(|count| count != "0")
}

/// Passes the program's output on. If it has no reader any more, the pipe is closed: the program's next write fails.
fn forward_output(
    mut from: impl Read + Send + 'static,
    kind: Kind,
    port: &Arc<Mutex<File>>,
    has_reader: Arc<AtomicBool>,
) -> thread::JoinHandle<io::Result<()>> {
    let port = Arc::clone(port);
    thread::spawn(move || {
        let mut buffer = vec![0; wire::MOST];
        loop {
            match from.read(&mut buffer)? {
                0 => return Ok(()),
                _ if !has_reader.load(Ordering::Relaxed) => return Ok(()),
                length => send(&port, kind, &buffer[..length])?,
            }
        }
    })
}

/// Passes the host's input on. A program that has closed its standard input gets no more.
fn forward_input(mut port: File, mut stdin: Option<ChildStdin>, has_reader: &AtomicBool) {
    while let Ok((kind, content)) = wire::receive(&mut port) {
        if kind == Kind::Closed {
            has_reader.store(false, Ordering::Relaxed);
            continue;
        }
        let open = stdin.as_mut().is_some_and(|pipe| pipe.write_all(&content).is_ok());
        if content.is_empty() || !open {
            stdin = None;
        }
    }
}

fn send(port: &Mutex<File>, kind: Kind, content: &[u8]) -> io::Result<()> {
    wire::send(&mut *port.lock().unwrap_or_else(PoisonError::into_inner), kind, content)
}

/// Repeats an attempt until it succeeds or the time for it is over: devices appear some time after their driver.
fn retry<T>(mut attempt: impl FnMut() -> Result<T, String>) -> Result<T, String> {
    let started = std::time::Instant::now();
    loop {
        match attempt() {
            Err(_) if started.elapsed() < DEVICE_WAIT => thread::sleep(RETRY_PAUSE),
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

fn set_time(seconds: u64) {
    let time = [i64::try_from(seconds).unwrap_or_default(), 0];
    // SAFETY: the structure is a timeval (settimeofday(2)), and the time zone may be null.
    unsafe { settimeofday(&raw const time, std::ptr::null()) };
}

/// Lets programs use 127.0.0.1. The machine has no other interface.
fn start_loopback() -> io::Result<()> {
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
