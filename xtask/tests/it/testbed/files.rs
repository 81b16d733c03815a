//! The files of the testbed: the settings of libvirtd and sshd, and the client's keys.

use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::namespaces::{USER, done};
use crate::connection::daemon::QEMU_CONF;

/// The network that libvirt's packages install.
const NETWORK: &str = "<network><name>default</name><forward mode='nat'/>\
    <bridge name='virbr0' stp='on' delay='0'/>\
    <ip address='192.168.122.1' netmask='255.255.255.0'>\
    <dhcp><range start='192.168.122.2' end='192.168.122.254'/></dhcp></ip></network>";

const POOL: &str =
    "<pool type='dir'><name>default</name><target><path>/var/lib/libvirt/images</path></target></pool>";

/// polkit, which usually decides who may use the socket, does not run in the testbed. The socket admits only root.
const LIBVIRTD: &str = "auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nunix_sock_rw_perms = \"0770\"\n";

/// The client's settings for ssh(1), which must not ask questions.
const CLIENT: &str = "BatchMode yes\nConnectTimeout 10\n";

pub(super) fn write_files(directory: &Path) {
    for made in [
        "etc/qemu/networks/autostart",
        "etc/storage/autostart",
        "lib/images",
        "sshd",
        "client/home/.ssh",
        "home",
    ] {
        std::fs::create_dir_all(directory.join(made)).unwrap();
    }
    chown(directory.join("home"), Some(USER), Some(USER)).unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.join(name), text).unwrap();
    write("etc/libvirtd.conf", LIBVIRTD);
    write("etc/qemu.conf", QEMU_CONF);
    for (name, text) in [("qemu/networks", NETWORK), ("storage", POOL)] {
        write(&format!("etc/{name}/default.xml"), text);
        symlink("../default.xml", directory.join(format!("etc/{name}/autostart/default.xml"))).unwrap();
    }
    write_keys(directory);
    let sshd = directory.join("sshd");
    write(
        "sshd/config",
        &format!(
            "ListenAddress 0.0.0.0\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized_keys\nUsePAM no\n\
             PermitRootLogin yes\nStrictModes no\nPidFile /run/sshd.pid\nAllowTcpForwarding yes\n\
             AllowStreamLocalForwarding yes\nPrintMotd no\nPrintLastLog no\n",
            sshd.display()
        ),
    );
    write("client/home/.ssh/config", CLIENT);
    write("client/passwd", &passwd(&directory.join("client/home")));
}

/// Writes the host's key, the client's key, which the host accepts, and a key that the host refuses.
fn write_keys(directory: &Path) {
    let ssh = directory.join("client/home/.ssh");
    for (path, words) in [
        (directory.join("sshd/host"), "the host"),
        (ssh.join("id_ed25519"), "the client"),
        (ssh.join("wrong"), "refused"),
    ] {
        let mut keygen = Command::new("ssh-keygen");
        done(keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", words, "-f"]).arg(path));
    }
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o700)).unwrap();
    let host = std::fs::read_to_string(directory.join("sshd/host.pub")).unwrap();
    std::fs::write(ssh.join("known_hosts"), format!("10.77.0.2 {host}10.77.0.9 {host}")).unwrap();
    accept_key(directory, true);
}

/// Lets sshd accept the client's key or no key. sshd reads the file at each login.
pub(super) fn accept_key(directory: &Path, accept: bool) {
    let key = std::fs::read(directory.join("client/home/.ssh/id_ed25519.pub")).unwrap();
    std::fs::write(directory.join("sshd/authorized_keys"), if accept { &key } else { [].as_slice() })
        .unwrap();
}

/// Introduces the client of the testbed `from` to another host: the host accepts the client's key, and the client knows
/// the host's key.
pub(super) fn introduce(from: &Path, to: &Path, address: &str) {
    let append = |path: PathBuf, text: String| {
        let whole = std::fs::read_to_string(&path).unwrap() + &text;
        std::fs::write(path, whole).unwrap();
    };
    let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
    append(to.join("sshd/authorized_keys"), read(from.join("client/home/.ssh/id_ed25519.pub")));
    append(
        from.join("client/home/.ssh/known_hosts"),
        format!("{address} {}", read(to.join("sshd/host.pub"))),
    );
}

/// Returns the machine's accounts, but root with the home directory `home`.
fn passwd(home: &Path) -> String {
    let lines = std::fs::read_to_string("/etc/passwd").unwrap();
    let with_home = |line: &str| match line.split(':').collect::<Vec<_>>().as_mut_slice() {
        fields @ ["root", _, _, _, _, _, _] => {
            let home = home.display().to_string();
            fields[5] = &home;
            fields.join(":")
        }
        _ => line.to_owned(),
    };
    lines.lines().map(|line| with_home(line) + "\n").collect()
}

/// Returns the path of one of the testbed's shell scripts.
pub(super) fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/testbed").join(name)
}
