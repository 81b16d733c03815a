//! Runs a real libvirtd in its own namespaces. It uses no file, socket, network or process of this machine. The daemon
//! and all processes that it starts are in one process namespace. The namespace ends when the value is dropped or the
//! test's thread ends.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use xtask_core::processes::processes_naming;

/// The state of the network `default` before the daemon starts. The network uses an existing bridge. Such a network
/// needs neither dnsmasq nor a firewall, and libvirt finds, starts and lists it like any other.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Network {
    Absent,
    Defined,
    Autostarted,
}

const NETWORK: &str =
    "<network><name>default</name><forward mode='bridge'/><bridge name='virbr0'/></network>";

/// The storage pool that preflight requires. `IMAGES` is replaced by a directory.
const POOL: &str = "<pool type='dir'><name>default</name><target><path>IMAGES</path></target></pool>";

/// libvirt's settings for an account that has no cgroups, mount namespaces or security driver, as in a container.
pub(crate) const QEMU_CONF: &str =
    "user = \"+0\"\ngroup = \"+0\"\nsecurity_driver = \"none\"\ncgroup_controllers = []\nnamespaces = []\n";

pub(crate) struct Daemon {
    /// The process of unshare(1). When it ends, its namespaces end too.
    child: Child,
    directory: tempfile::TempDir,
}

impl Daemon {
    /// Starts a daemon whose read-write socket has the octal permissions `rw`.
    pub(crate) fn start(network: Network, rw: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("iot-xtask-libvirt-").tempdir().unwrap();
        write_files(directory.path(), network, rw);
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare"]);
        if !root() {
            // Image builds do the same. With a single account in the namespace, libvirt cannot start emulators to
            // probe them.
            command.args(["--map-root-user", "--map-auto"]);
        }
        command.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh"]);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/connection/namespace.sh");
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
        command.arg(script).arg(directory.path()).env("PATH", path).stdin(Stdio::null());
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let mut daemon = Self { child, directory };
        daemon.wait();
        daemon
    }

    fn wait(&mut self) {
        let started = Instant::now();
        while !self.directory.path().join("run/libvirt-sock").exists() {
            let ended = self.child.try_wait().unwrap();
            if ended.is_some() || started.elapsed() > Duration::from_secs(30) {
                let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap();
                panic!(
                    "libvirtd does not start in namespaces of its own (`cargo xtask ci --fix` installs it): {log}"
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn uri(&self) -> String {
        self.socket("libvirt-sock")
    }

    pub(crate) fn read_only_uri(&self) -> String {
        self.socket("libvirt-sock-ro")
    }

    fn socket(&self, name: &str) -> String {
        format!("qemu+unix:///system?socket={}", self.path().join("run").join(name).display())
    }

    /// Writes a program that takes ssh's arguments, but runs the command in the daemon's namespace.
    pub(crate) fn fake_ssh(&self) -> PathBuf {
        let children = format!("/proc/{0}/task/{0}/children", self.child.id());
        let inside = std::fs::read_to_string(children).unwrap();
        let user = if root() { "" } else { "--user --preserve-credentials" };
        script(
            self.path(),
            &format!(
                // As in sshd, the words after the host are one line for the user's shell.
                "while [ \"$1\" != -- ]; do shift; done\nshift 2\n\
                 exec nsenter {user} --mount --target {} sh -c \"$*\"",
                inside.trim()
            ),
        )
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // The kernel kills the first process of the namespace together with `child`, but with a delay.
        let started = Instant::now();
        while !processes_naming(self.path()).is_empty() && started.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn write_files(directory: &Path, network: Network, rw: &str) {
    let networks = directory.join("etc/libvirt/qemu/networks");
    for made in [networks.join("autostart"), directory.join("run")] {
        std::fs::create_dir_all(made).unwrap();
    }
    for name in ["passwd", "group", "nsswitch.conf"] {
        // A host may lack nsswitch.conf.
        if let Ok(text) = std::fs::read(Path::new("/etc").join(name)) {
            std::fs::write(directory.join("etc").join(name), text).unwrap();
        }
    }
    std::fs::write(directory.join("etc/libvirt/qemu.conf"), QEMU_CONF).unwrap();
    let pools = directory.join("etc/libvirt/storage");
    std::fs::create_dir_all(pools.join("autostart")).unwrap();
    let images = directory.join("images");
    std::fs::create_dir_all(&images).unwrap();
    let pool = POOL.replace("IMAGES", images.to_str().unwrap());
    std::fs::write(pools.join("default.xml"), pool).unwrap();
    std::os::unix::fs::symlink("../default.xml", pools.join("autostart/default.xml")).unwrap();
    if network != Network::Absent {
        std::fs::write(networks.join("default.xml"), NETWORK).unwrap();
    }
    if network == Network::Autostarted {
        std::os::unix::fs::symlink("../default.xml", networks.join("autostart/default.xml")).unwrap();
    }
    let conf = format!(
        "unix_sock_dir = \"{}\"\nunix_sock_ro_perms = \"0777\"\nunix_sock_rw_perms = \"{rw}\"\n\
         auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n",
        directory.join("run").display()
    );
    std::fs::write(directory.join("libvirtd.conf"), conf).unwrap();
}

/// Writes the executable shell script `ssh` in `directory`.
pub(crate) fn script(directory: &Path, text: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = directory.join("ssh");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    path
}

pub(crate) fn root() -> bool {
    rustix::process::geteuid().is_root()
}
