//! Tests `dist/install.sh` with directories that stand for those of a device, and without systemd.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

const SCRIPT: &str = include_str!("../dist/install.sh");
const FILES: [&str; 4] = ["iot-agent.service", "iot-readahead.service", "readahead.sh", "uninstall.sh"];

/// Writes a bundle whose agent runs `check` in place of the check of the configuration.
fn bundle(root: &Path, name: &str, check: &str) -> PathBuf {
    let (bundle, place) = (root.join(name), root.display());
    std::fs::create_dir_all(&bundle).unwrap();
    let group = Command::new("id").arg("-gn").output().unwrap().stdout;
    let group = String::from_utf8(group).unwrap();
    let script = SCRIPT
        .replace("user=iot-agent", &format!("user={}", group.trim()))
        .replace("/usr/local/", &format!("{place}/usr/local/"))
        .replace("/etc/", &format!("{place}/etc/"))
        .replace("/var/lib/", &format!("{place}/var/lib/"))
        .replace("/run/iot-agent", &place.to_string())
        .replace("\nsync\n", "\n");
    std::fs::write(bundle.join("install.sh"), script).unwrap();
    std::fs::write(bundle.join("prerequisites.sh"), "").unwrap();
    for file in FILES {
        std::fs::write(bundle.join(file), "").unwrap();
    }
    std::fs::write(bundle.join("iot-agent"), format!("#!/bin/sh\n# {name}\n{check}\n")).unwrap();
    bundle
}

fn install(root: &Path, bundle: &Path) {
    let path = format!("{}:{}", root.join("bin").display(), std::env::var("PATH").unwrap());
    let output = Command::new("sh").arg(bundle.join("install.sh")).env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn an_installation_keeps_the_executable_before_it_and_the_devices_secrets() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::create_dir_all(root.join("usr/local/bin")).unwrap();
    std::fs::write(root.join("bin/systemctl"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(root.join("bin/systemctl"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let _socket = UnixListener::bind(root.join("podman.sock")).unwrap();
    let secrets = root.join("etc/iot-agent/secrets");
    let first = bundle(root, "first", "");
    std::fs::write(first.join("config.toml"), "").unwrap();
    install(root, &first);
    std::fs::write(root.join("ca.pem"), "").unwrap();
    symlink(root.join("ca.pem"), secrets.join("ca.pem")).unwrap();
    std::fs::write(secrets.join("token"), "old").unwrap();
    let unreadable = secrets.join("old/key");
    std::fs::create_dir(secrets.join("old")).unwrap();
    std::fs::write(&unreadable, "").unwrap();
    std::fs::set_permissions(&unreadable, std::fs::Permissions::from_mode(0o600)).unwrap();
    // The token is replaced while the new configuration is checked. The check sees the rights of the device's files.
    let staged = root.join("etc/iot-agent/staged/secrets");
    let check = format!(
        "printf new > {}/token; test $(stat -c %a {}) = 600 || exit 1",
        secrets.display(),
        staged.join("old/key").display()
    );
    let second = bundle(root, "second", &check);
    std::fs::create_dir_all(second.join("secrets/pki")).unwrap();
    std::fs::write(second.join("secrets/pki/.ca.pem"), "").unwrap();
    // Without a configuration in the bundle, the device's own one stays, even if it is a link.
    let config = root.join("etc/iot-agent/config.toml");
    std::fs::rename(&config, root.join("config.toml")).unwrap();
    symlink(root.join("config.toml"), &config).unwrap();
    for _ in 0..2 {
        std::fs::write(secrets.join("token"), "old").unwrap();
        install(root, &second);
        assert_eq!(std::fs::read_to_string(secrets.join("token")).unwrap(), "new");
        assert!(secrets.join("ca.pem").is_symlink() && config.is_symlink());
        assert_eq!(mode(&secrets.join("pki")), 0o750);
        assert_eq!(mode(&secrets.join("pki/.ca.pem")), 0o640);
        assert_eq!(mode(&unreadable), 0o600);
        let versions = std::fs::read_dir(root.join("usr/local/lib/iot-agent/versions")).unwrap();
        assert_eq!(versions.count(), 2);
    }
}
