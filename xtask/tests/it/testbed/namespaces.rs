//! The namespaces of the host and of its client, and the ways into them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid};
use xtask_core::cache::CACHE_VARIABLE;

use super::files::{self, introduce, write_files};
use super::virsh::Virsh;
use crate::scratch::{command, message, signal, wait_until};

/// The host's libvirtd, as the client reaches it.
pub(crate) const SSH: &str = "qemu+ssh://root@10.77.0.2/system";
/// An address in the client's network that no host has.
pub(crate) const SSH_TO_NOBODY: &str = "qemu+ssh://root@10.77.0.9/system";
/// The account of [`Testbed::as_user`]: `nobody`, which exists everywhere, owns nothing and is in no group.
pub(crate) const USER: u32 = 65534;

/// The paths at which [`USER`] sees the checkout and Rust's toolchain.
const CHECKOUT: &str = "/run/checkout";
const TOOLCHAIN: &str = "/run/toolchain";

/// The time until all daemons run. It takes a second on a quiet machine.
const START: Duration = Duration::from_secs(60);

pub(crate) struct Testbed {
    /// The shell of `host.sh`. It is in the host's mount and network namespaces.
    shell: Child,
    /// The process that holds the client's namespaces.
    client: Pid,
    /// The first process of the daemons' process namespace.
    daemons: Pid,
    /// The network namespaces of the host and of the client, as links in `/proc` name them.
    networks: Vec<PathBuf>,
    /// Is set when [`USER`] sees the checkout.
    for_user: OnceLock<()>,
    directory: tempfile::TempDir,
}

impl Testbed {
    /// Starts the host and its client. Panics with the log if a daemon does not start.
    pub(crate) fn open() -> Self {
        assert!(
            geteuid().is_root(),
            "the tests in testbed:: need root, because they make network namespaces; run them with sudo"
        );
        let directory = directory();
        write_files(directory.path());
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "TERM", "unshare", "--mount", "--net", "sh"])
            .arg(files::script("host.sh"));
        command.arg(directory.path()).env("PATH", path()).stdin(Stdio::null());
        let shell = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let mut testbed = Self {
            client: Pid::from_child(&shell),
            daemons: Pid::from_child(&shell),
            networks: Vec::new(),
            for_user: OnceLock::new(),
            shell,
            directory,
        };
        testbed.wait();
        testbed
    }

    fn wait(&mut self) {
        let directory = self.path().to_owned();
        let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap_or_default();
        let mut until = |what: &str, holds: &mut dyn FnMut(&Self) -> bool| {
            wait_until(what, START, || {
                let ended = self.shell.try_wait().unwrap();
                assert!(ended.is_none(), "the testbed ended with {ended:?}: {}", self.log());
                holds(self)
            });
        };
        let (mut client, mut daemons) = (None, None);
        until("the client has its address", &mut |_| {
            client = pid_of(&read("client/up"));
            client.is_some()
        });
        until("the daemons have their namespace", &mut |_| {
            // This is the pid of unshare(1), which only waits for the namespace's first process.
            let unshare = pid_of(&read("daemons"));
            daemons = unshare.and_then(|pid| {
                let pid = pid.as_raw_nonzero();
                pid_of(&std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?)
            });
            daemons.is_some()
        });
        // libvirtd creates its socket before it answers, and starts the network afterwards.
        until("the network `default` starts", &mut |testbed| {
            let asked = testbed.system().try_run(&["net-info default"]);
            asked.status.success()
                && message(&asked).lines().any(|line| line.starts_with("Active:") && line.ends_with("yes"))
        });
        (self.client, self.daemons) = (client.unwrap(), daemons.unwrap());
        let holders = [Pid::from_child(&self.shell), self.client];
        self.networks = holders.map(|pid| network_of(pid).unwrap()).to_vec();
    }

    /// Returns the test's directory. It has the same path in all namespaces, and each user may enter it.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Returns the network namespaces of the testbed, for [`processes_in`].
    pub(super) fn networks(&self) -> &[PathBuf] {
        &self.networks
    }

    /// Returns the directory of the pool `default`, as the machine sees it.
    pub(crate) fn images(&self) -> PathBuf {
        self.path().join("lib/images")
    }

    /// Returns the output of the testbed's daemons and scripts, and sshd's log.
    pub(crate) fn log(&self) -> String {
        ["log", "sshd/log"]
            .map(|name| std::fs::read_to_string(self.path().join(name)).unwrap_or_default())
            .concat()
    }

    /// Runs `command` on the host.
    pub(crate) fn here(&self, command: &Command) -> Command {
        enter(Pid::from_child(&self.shell), &[], command)
    }

    /// Runs `command` on the client.
    pub(crate) fn beside(&self, command: &Command) -> Command {
        enter(self.client, &[], command)
    }

    /// Runs `command` on the host as [`USER`], in a checkout that this user may read but not change. The program, the
    /// checkout and the toolchain may be in directories that this user may not enter.
    pub(crate) fn as_user(&self, command: &Command) -> Command {
        let program = Path::new(command.get_program());
        let name = program.file_name().unwrap();
        let mut own = Command::new(name);
        if program.is_absolute() {
            let seen = Path::new("/run/programs").join(name);
            self.expose(program, &seen);
            own = Command::new(seen);
        }
        self.for_user.get_or_init(|| {
            let sysroot = done(Command::new("rustc").args(["--print", "sysroot"]));
            self.expose(Path::new(sysroot.trim()), Path::new(TOOLCHAIN));
            self.expose(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap(), Path::new(CHECKOUT));
        });
        own.args(command.get_args()).current_dir(command.get_current_dir().unwrap_or(Path::new(CHECKOUT)));
        own.env("HOME", self.home()).env("XDG_RUNTIME_DIR", "/run/user/65534").env("USER", "nobody");
        own.env("CARGO_MANIFEST_DIR", Path::new(CHECKOUT).join("xtask")).env_remove("CARGO_HOME");
        own.env("CARGO", Path::new(TOOLCHAIN).join("bin/cargo"));
        own.env("PATH", format!("{TOOLCHAIN}/bin:{}", path()));
        for name in ["XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", CACHE_VARIABLE] {
            own.env_remove(name);
        }
        set_environment(&mut own, command);
        let user = USER.to_string();
        let before = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "--inh-caps=-all"];
        enter(Pid::from_child(&self.shell), &before, &own)
    }

    /// Returns the home directory of [`USER`].
    pub(crate) fn home(&self) -> PathBuf {
        self.path().join("home")
    }

    /// Makes a file or directory visible at the path `seen`, whose parent each user may enter.
    pub(crate) fn expose(&self, path: &Path, seen: &Path) {
        let script = "if [ -e \"$2\" ]; then exit; fi
            if [ -d \"$1\" ]; then mkdir \"$2\"; else : >\"$2\"; fi
            mount --bind \"$1\" \"$2\"";
        done(&mut self.here(command("sh", &["-euc", script, "sh"]).arg(path).arg(seen)));
    }

    /// Connects the client to the host of another testbed, and returns the URI with which the client reaches that host's
    /// libvirtd. A testbed has one such connection at most.
    pub(crate) fn connect(&self, other: &Self) -> &'static str {
        const SCRIPT: &str = "ip link add client1 type veth peer name host1 netns \"$1\"
            ip address add 10.78.0.1/24 dev client1
            ip link set client1 up
            nsenter --target \"$1\" --net ip address add 10.78.0.2/24 dev host1
            nsenter --target \"$1\" --net ip link set host1 up";
        introduce(self.path(), other.path(), "10.78.0.2");
        // The script needs the client's network namespace and the machine's process namespace.
        let (client, host) = (self.client.as_raw_nonzero().to_string(), other.shell.id().to_string());
        done(&mut command("nsenter", &["--target", &client, "--net", "sh", "-euc", SCRIPT, "sh", &host]));
        "qemu+ssh://root@10.78.0.2/system"
    }

    /// Runs `command` as root beside the host's daemons, in their process namespace.
    pub(crate) fn daemons(&self, command: &Command) -> Command {
        enter(self.daemons, &["--pid"], command)
    }

    /// Returns the host's libvirtd.
    pub(crate) fn system(&self) -> Virsh<'_> {
        Virsh { testbed: self, is_session: false }
    }

    /// Returns the libvirtd of [`USER`]'s session. It starts at the first question.
    pub(crate) fn session(&self) -> Virsh<'_> {
        Virsh { testbed: self, is_session: true }
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        // host.sh ends all processes of the namespaces, and then itself.
        signal(&self.shell, Signal::TERM);
        self.shell.wait().unwrap();
        // The kernel ends the daemons' namespace with its first process, but with a delay.
        let started = Instant::now();
        while !processes_in(&self.networks).is_empty() && started.elapsed() < START {
            std::thread::sleep(Duration::from_millis(5));
        }
        // A second panic would end all tests.
        if !std::thread::panicking() {
            assert_eq!(processes_in(&self.networks), [], "these processes of the testbed do not end");
        }
    }
}

/// Returns the network namespace of a process.
fn network_of(pid: Pid) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{}/ns/net", pid.as_raw_nonzero())).ok()
}

/// Returns all processes in these network namespaces.
pub(super) fn processes_in(networks: &[PathBuf]) -> Vec<Pid> {
    let names = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().file_name());
    let pids = names.filter_map(|name| Pid::from_raw(name.to_str()?.parse().ok()?));
    pids.filter(|pid| network_of(*pid).is_some_and(|network| networks.contains(&network))).collect()
}

/// Makes the test's directory on a disk, because QEMU opens volumes with O_DIRECT and an image has a gigabyte.
fn directory() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt as _;
    let mut parent = std::env::temp_dir();
    let mut stat = Command::new("stat");
    stat.args(["--file-system", "--format", "%T"]).arg(&parent);
    if String::from_utf8_lossy(&stat.output().unwrap().stdout).trim() == "tmpfs" {
        parent = PathBuf::from("/var/tmp");
    }
    let directory = tempfile::Builder::new().prefix("ih-").tempdir_in(parent).unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    directory
}

/// Returns a command that runs `command` in the namespaces of `of`. `words` are more options of nsenter(1), or the
/// beginning of the command.
fn enter(of: Pid, words: &[&str], command: &Command) -> Command {
    let mut entered = Command::new("nsenter");
    entered.args(["--target", &of.as_raw_nonzero().to_string(), "--mount", "--net"]).args(words);
    // nsenter(1) changes to the root directory of the namespace.
    let directory =
        command.get_current_dir().map_or_else(|| std::env::current_dir().unwrap(), Path::to_owned);
    entered.args(["env", "--chdir"]).arg(directory);
    entered.arg(command.get_program()).args(command.get_args()).stdin(Stdio::null()).env("PATH", path());
    set_environment(&mut entered, command);
    entered
}

fn set_environment(command: &mut Command, of: &Command) {
    for (name, value) in of.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
}

/// Returns the search path with the directories in which libvirtd, sshd and ip(8) are.
fn path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap())
}

/// Reads a pid from a line. A shell may not yet have written the line.
fn pid_of(line: &str) -> Option<Pid> {
    Pid::from_raw(line.strip_suffix(['\n', ' '])?.parse().ok()?)
}

/// Runs a command that must succeed, and returns its stdout.
#[track_caller]
pub(super) fn done(command: &mut Command) -> String {
    let output: Output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", message(&output));
    String::from_utf8(output.stdout).unwrap()
}
