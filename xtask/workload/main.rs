//! The workload of the smoke test: the only program in its container. It tells each client the machine type, the
//! kernel's page size, the boot id, its generation and its number of starts. It is one file and uses only the standard
//! library. Therefore `rustc` makes a static executable of it without any crate.

use std::ffi::{CStr, c_char, c_int};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::TcpListener;
use std::path::Path;

/// The port in the container.
const PORT: u16 = 8080;
/// The volume with the number of starts.
const VOLUME: &str = "/data";
/// The number of SIGTERM on every Linux (signal(7)).
const SIGTERM: c_int = 15;

/// The size of each of the six fields in Linux' utsname(2), including the final zero.
const FIELD: usize = 65;
/// The index of the field with the machine.
const MACHINE: usize = 4;

unsafe extern "C" {
    fn uname(buffer: *mut [[c_char; FIELD]; 6]) -> c_int;
    fn getpagesize() -> c_int;
    fn signal(number: c_int, handler: extern "C" fn(c_int)) -> usize;
    fn _exit(code: c_int) -> !;
}

pub(crate) fn main() -> io::Result<()> {
    serve(count_start)
}

/// Counts this start with `count`, and answers each client.
pub(crate) fn serve(count: fn(&Path) -> io::Result<u64>) -> io::Result<()> {
    // The kernel drops a signal for which the first process of a container has no handler, and this is that process.
    // SAFETY: the handler has the signature that signal(2) wants, and does nothing that is not async-signal-safe.
    unsafe { signal(SIGTERM, end) };
    let starts = count(Path::new(VOLUME))?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let generation: u64 =
        std::env::var("GENERATION").ok().and_then(|text| text.parse().ok()).unwrap_or_default();
    let answer = format!(
        "{{\"machine\":{:?},\"page_size\":{},\"boot_id\":{:?},\"generation\":{generation},\"starts\":{starts}}}\n",
        machine()?,
        // SAFETY: getpagesize(2) has no preconditions.
        unsafe { getpagesize() },
        boot_id.trim()
    );
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    print!("{answer}");
    loop {
        // A client that has gone is no reason to end.
        let sent = listener.accept().and_then(|(mut stream, _)| stream.write_all(answer.as_bytes()));
        if let Err(error) = sent {
            eprintln!("cannot send an answer: {error}");
        }
    }
}

extern "C" fn end(_signal: c_int) {
    // SAFETY: _exit(2) is async-signal-safe, and nothing here has to be flushed.
    unsafe { _exit(0) }
}

/// Returns what `uname -m` prints: the machine that the kernel reports, not the one that this program was compiled for.
fn machine() -> io::Result<String> {
    let mut fields = [[0; FIELD]; 6];
    // SAFETY: the buffer has the size and the layout of Linux's struct utsname.
    if unsafe { uname(&raw mut fields) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let machine = &fields[MACHINE];
    // SAFETY: the kernel ends each field with a zero within its bounds.
    Ok(unsafe { CStr::from_ptr(machine.as_ptr()) }.to_string_lossy().into_owned())
}

/// Counts this start, and returns the number of starts with this volume. The number is on disk before any client gets
/// it.
fn count_start(volume: &Path) -> io::Result<u64> {
    let (path, beside) = (volume.join("starts"), volume.join("starts.new"));
    let before = match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(io::Error::other)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let starts: u64 = before + 1;
    let mut file = File::create(&beside)?;
    writeln!(file, "{starts}")?;
    file.sync_all()?;
    fs::rename(&beside, &path)?;
    File::open(volume)?.sync_all()?;
    Ok(starts)
}
