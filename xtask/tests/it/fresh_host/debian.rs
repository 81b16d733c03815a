//! Makes a Debian in memory that has only Rust. It has its own root directory and its own namespaces. With Linux 6.7
//! or newer, its table of executable formats is empty. The Debian ends with this process.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use xtask_core::arch::VmArchitecture;

use crate::scratch::{message, wait_until};

/// A shell script that waits until the namespace has its ids, and then starts the Debian.
const IDS: &str = r#"read -r go && exec unshare --mount --pid --fork --kill-child sh "$@""#;
/// The time in which a namespace must exist, which normally takes a moment.
const NAMESPACE: Duration = Duration::from_secs(10);
/// The time in which a process that was ended must be gone.
const ENDED: Duration = Duration::from_secs(10);
/// The map of ids if this process is root. They are this host's own ids, so that the host's files can be read.
const OWN_IDS: &str = "0 0 65536\n";

const ENVIRONMENT: &[(&str, &str)] = &[
    ("PATH", "/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("CARGO_HOME", "/cargo"),
    ("CARGO_TARGET_DIR", "/target"),
    ("CARGO_NET_OFFLINE", "true"),
];
/// The environment variables by which this host reaches its mirror, if apt's configuration names no proxy.
const PROXIES: &[&str] = &["http_proxy", "https_proxy", "no_proxy"];

/// The user who runs a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum As {
    Root,
    /// An account without sudo.
    Ordinary,
}

/// The running system. Dropping it ends all of its processes.
pub(crate) struct Debian {
    holder: Child,
    /// The pid of the system's first process, as this host sees it.
    first: String,
    /// True if the system has its own table of executable formats, which was empty at first.
    pub(crate) fresh_kernel: bool,
    _directory: tempfile::TempDir,
}

impl Debian {
    /// Makes a Debian of `suite`.
    pub(crate) fn new(suite: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let mut command = Command::new("unshare");
        command.arg("--user");
        let root = rustix::process::geteuid().is_root();
        if !root {
            command.args(["--map-root-user", "--map-auto"]);
        }
        let script = workspace.join("xtask/tests/it/fresh_host/debian.sh");
        command.args(["sh", "-c", IDS, "sh"]).arg(script).arg(suite).arg(directory.path()).arg(workspace);
        command.args([sysroot(), registry()]).arg(fresh_target());
        let mut holder = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        if root {
            give_ids(holder.id());
        }
        holder.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let fresh_kernel = match line.as_str() {
            "fresh\n" => true,
            "used\n" => false,
            _ => panic!("make a Debian {suite}: see the messages above; the script printed {line:?}"),
        };
        let children = format!("/proc/{0}/task/{0}/children", holder.id());
        let first = std::fs::read_to_string(children).unwrap().trim().to_owned();
        Self { holder, first, fresh_kernel, _directory: directory }
    }

    /// Runs a command in the project's directory.
    pub(crate) fn run(&self, who: As, command: &[&str]) -> Output {
        let mut enter = Command::new("nsenter");
        enter.args(["--target", &self.first, "--user", "--mount", "--pid", "--root"]).env_clear();
        enter.envs(ENVIRONMENT.iter().copied());
        enter.envs(PROXIES.iter().filter_map(|name| Some((*name, std::env::var_os(name)?))));
        match who {
            As::Root => enter.env("HOME", "/root"),
            As::Ordinary => {
                let words = ["setpriv", "--reuid", "ordinary", "--regid", "ordinary", "--init-groups"];
                enter.args(words).env("HOME", "/home/ordinary")
            }
        };
        enter.args(["env", "--chdir", "/project"]).args(command).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs a command as root and returns its stdout. Panics if the command fails.
    pub(crate) fn read(&self, command: &[&str]) -> String {
        let output = self.run(As::Root, command);
        assert!(output.status.success(), "{command:?}: {}", message(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Returns the digest of each file of apt's configuration.
    pub(crate) fn package_sources(&self) -> String {
        let files = self.read(&["find", "/etc/apt", "-type", "f", "-exec", "sha256sum", "{}", "+"]);
        assert!(files.contains("/etc/apt/"), "apt has no sources: {files:?}");
        let mut lines: Vec<_> = files.lines().collect();
        lines.sort_unstable();
        lines.join("\n")
    }

    /// Checks that no other processes than these run. A process that has just been ended may take a moment to end.
    #[track_caller]
    pub(crate) fn assert_runs_only(&self, processes: &BTreeMap<PathBuf, usize>) {
        let deadline = Instant::now() + ENDED;
        while self.processes() != *processes && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(self.processes(), *processes, "a process was left running");
    }

    /// Returns the number of processes of each program, without zombies.
    pub(crate) fn processes(&self) -> BTreeMap<PathBuf, usize> {
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = namespace(&self.first);
        assert!(own.is_some(), "the first process is gone");
        let mut running = BTreeMap::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let pid = entry.file_name().into_string().unwrap();
            if pid.bytes().all(|byte| byte.is_ascii_digit())
                && namespace(&pid) == own
                && let Ok(program) = std::fs::read_link(format!("/proc/{pid}/exe"))
            {
                *running.entry(program).or_default() += 1;
            }
        }
        running
    }
}

impl Drop for Debian {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        if let Err(error) = self.holder.wait() {
            eprintln!("warning: wait for a Debian's end: {error}");
        }
    }
}

/// Writes the namespace's map of ids. Root can do this itself. `unshare` would call newuidmap, which needs an entry in
/// /etc/subuid.
fn give_ids(pid: u32) {
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    wait_until("unshare --user makes a user namespace", NAMESPACE, || {
        namespace(&pid.to_string()) != namespace("self")
    });
    for map in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{pid}/{map}"), OWN_IDS).unwrap();
    }
}

fn sysroot() -> PathBuf {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().unwrap();
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

fn registry() -> PathBuf {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    home.unwrap_or_else(|| std::env::home_dir().unwrap().join(".cargo")).join("registry")
}

/// Returns the other architecture's target, whose standard library `rustup` does not install by default.
pub(crate) fn fresh_target() -> &'static str {
    let foreign = VmArchitecture::ALL.into_iter().find(|arch| Some(*arch) != VmArchitecture::of_host());
    foreign.unwrap().profile().triple
}
