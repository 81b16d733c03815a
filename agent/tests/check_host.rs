//! Tests `dist/check-host.sh` against directories that stand for the root directory of a host.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// Runs the script on a host with this version of podman. Returns whether it succeeds, and its output.
fn check(root: &Path, podman: &str) -> (bool, String) {
    write(root, "bin/dpkg-query", &format!("#!/bin/sh\necho '{podman}'\n"));
    std::fs::set_permissions(root.join("bin/dpkg-query"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", root.join("bin").display(), std::env::var("PATH").unwrap());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/check-host.sh");
    let output = Command::new("sh").arg(script).arg(root).env("PATH", path).output().unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_host_that_runs_no_containers_is_refused_with_the_reason() {
    const CONTROLLERS: &str = "sys/fs/cgroup/cgroup.controllers";
    const RESTRICTION: &str = "proc/sys/kernel/apparmor_restrict_unprivileged_userns";
    const PROFILES: &str = "sys/kernel/security/apparmor/profiles";
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    write(root, CONTROLLERS, "cpuset cpu io memory pids\n");
    assert_eq!(check(root, "4.3.1+ds1-8+deb12u1"), (true, String::new()));
    let (is_usable, said) = check(root, "3.4.4+ds1-1ubuntu1");
    assert!(!is_usable && said.contains("podman 3.4.4+ds1-1ubuntu1 is too old"), "{said}");

    write(root, RESTRICTION, "0\n");
    write(root, PROFILES, "podmanlike (enforce)\n");
    assert_eq!(check(root, "4.9.3+ds1-1ubuntu0.2"), (true, String::new()));
    write(root, RESTRICTION, "1\n");
    let (is_usable, said) = check(root, "4.9.3+ds1-1ubuntu0.2");
    assert!(!is_usable && said.contains("kernel.apparmor_restrict_unprivileged_userns=0"), "{said}");
    write(root, PROFILES, "man_groff (enforce)\npodman (unconfined)\n");
    assert_eq!(check(root, "4.9.3+ds1-1ubuntu0.2"), (true, String::new()));

    write(root, CONTROLLERS, "cpuset cpu io pids\n");
    let (is_usable, said) = check(root, "5.4.2+ds2-1");
    assert!(is_usable && said.contains("append cgroup_enable=memory"), "{said}");
}
