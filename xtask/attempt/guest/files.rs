//! The file system of the program: its root, the share with the program, and the file systems of the kernel.

use std::ffi::{CString, OsStr, c_char, c_int, c_ulong, c_void};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use crate::retry;
use crate::wire::Job;

/// The root of the program's file system.
const ROOT: &str = "/new";
/// The name of the machine. Each hosts(5) file has an entry for it.
const HOST: &str = "localhost";
const HOSTS: &str = "/etc/hosts";

/// mount(2).
const MS_RDONLY: c_ulong = 1;

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn sethostname(name: *const c_char, length: usize) -> c_int;
}

/// Makes the file system of the program, and changes to it.
pub(crate) fn enter(job: &Job) -> Result<(), String> {
    for directory in ["/lower", "/share", "/rw", ROOT] {
        make_directory(directory)?;
    }
    mount_at("tmpfs", "/rw", "tmpfs", 0, "mode=755")?;
    match job.root.as_str() {
        "" => mount_at("tmpfs", ROOT, "tmpfs", 0, "mode=755")?,
        "disk" => {
            retry(|| mount_system("/lower"))?;
            mount_overlay("/lower", "root", ROOT)?;
        }
        tag => {
            mount_share(tag, "/lower")?;
            mount_overlay("/lower", "root", ROOT)?;
        }
    }
    if !job.share.is_empty() {
        mount_share("program", "/share")?;
        let place = format!("{ROOT}{}", job.share);
        make_directory(&place)?;
        mount_overlay("/share", "share", &place)?;
    }
    std::os::unix::fs::chroot(ROOT).map_err(|error| format!("change the root to {ROOT}: {error}"))?;
    std::env::set_current_dir("/").map_err(|error| format!("change to /: {error}"))?;
    mount_kernel_systems()?;
    for place in ["/tmp", "/run"] {
        // The files that a sysroot or an image has there are a part of it.
        let is_used = fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_some());
        if !is_used {
            mount_at("tmpfs", place, "tmpfs", 0, "mode=1777")?;
        }
    }
    name_host();
    // podman also makes the working directory of a container.
    let directory = OsStr::from_bytes(&job.directory);
    let attempt = |error: io::Error| format!("change to {}: {error}", directory.display());
    fs::create_dir_all(directory).map_err(attempt)?;
    std::env::set_current_dir(directory).map_err(attempt)
}

/// Mounts the file systems of the kernel below the program's root, which is the root of this process now: a link of the
/// program's file system leads to one of its own directories.
fn mount_kernel_systems() -> Result<(), String> {
    for (kind, place, data) in [
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devtmpfs", "/dev", ""),
        ("devpts", "/dev/pts", ""),
        ("tmpfs", "/dev/shm", "mode=1777"),
    ] {
        mount_at(kind, place, kind, 0, data)?;
    }
    for (link, target) in
        [("fd", "self/fd"), ("stdin", "self/fd/0"), ("stdout", "self/fd/1"), ("stderr", "self/fd/2")]
    {
        let link = format!("/dev/{link}");
        std::os::unix::fs::symlink(format!("/proc/{target}"), &link)
            .map_err(|error| format!("{link}: {error}"))?;
    }
    Ok(())
}

/// Gives the machine a name. If the program's file system has no `/etc/hosts`, makes one, as podman does: otherwise a
/// server that listens on `localhost` fails. Most programs need none of this, so errors are ignored.
fn name_host() {
    // SAFETY: the pointer is valid for the length of the name.
    unsafe { sethostname(HOST.as_ptr().cast(), HOST.len()) };
    if fs::metadata(HOSTS).map_or(0, |about| about.len()) == 0 {
        let text = format!("127.0.0.1 {HOST}\n::1 {HOST}\n");
        drop(fs::create_dir_all("/etc").and_then(|()| fs::write(HOSTS, text)));
    }
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
        match mount_at(&format!("/dev/{name}"), place, "ext4", MS_RDONLY, "noload") {
            Ok(()) if Path::new(place).join("usr/lib").exists() => return Ok(()),
            Ok(()) => tried.push(format!("{name} has no /usr/lib")),
            Err(error) => tried.push(error),
        }
    }
    Err(format!("find the image's system on its disk: {}", tried.join("; ")))
}

fn mount_share(tag: &str, place: &str) -> Result<(), String> {
    let options = "trans=virtio,version=9p2000.L,cache=loose,msize=512000";
    retry(|| mount_at(tag, place, "9p", MS_RDONLY, options))
}

/// Mounts a writable layer in memory above a directory.
fn mount_overlay(lower: &str, name: &str, place: &str) -> Result<(), String> {
    let [upper, work] = ["upper", "work"].map(|part| format!("/rw/{name}/{part}"));
    make_directory(&upper)?;
    make_directory(&work)?;
    mount_at("overlay", place, "overlay", 0, &format!("lowerdir={lower},upperdir={upper},workdir={work}"))
}

/// Makes a directory. If its path is a link, the directory to which the link leads is made.
fn make_directory(directory: &str) -> Result<(), String> {
    let path = Path::new(directory);
    let target = fs::read_link(path).map_or(path.to_owned(), |target| path.with_file_name("").join(target));
    fs::create_dir_all(target).map_err(|error| format!("make {directory}: {error}"))
}

pub(crate) fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: c_ulong,
    data: &str,
) -> Result<(), String> {
    make_directory(target)?;
    let text = |word: &str| CString::new(word).map_err(|error| format!("mount {source}: {error}"));
    let (from, to, of, with) = (text(source)?, text(target)?, text(kind)?, text(data)?);
    // SAFETY: each pointer is a string with a final zero, which lives until the call returns.
    let result = unsafe { mount(from.as_ptr(), to.as_ptr(), of.as_ptr(), flags, with.as_ptr().cast()) };
    let error = io::Error::last_os_error();
    if result == 0 { Ok(()) } else { Err(format!("mount {source} ({kind}) at {target}: {error}")) }
}
