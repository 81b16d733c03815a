//! Tests a whole smoke of a user without privileges. `cargo xtask soak --all` runs it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use xtask_core::cache::Cache;
use xtask_core::fs::directories;

use crate::scratch::{Scratch, XTASK_INSPECT, XTASK_VM, assert_code, message};

/// Returns a command that runs `program` in a checkout as a user without privileges. This user owns the checkout, and
/// can read the toolchain below `/mnt`.
pub(crate) fn as_ordinary_user(program: &str, checkout: &Path, scratch: &Path) -> Command {
    const USER: &str = "65534";
    let home = scratch.join("home");
    std::fs::create_dir(&home).unwrap();
    std::fs::copy(program, checkout.join("xtask-of-user")).unwrap();
    std::fs::set_permissions(scratch, std::fs::Permissions::from_mode(0o755)).unwrap();
    for path in [checkout, &home] {
        let owned = Command::new("chown").args(["--recursive", &format!("{USER}:{USER}")]).arg(path).status();
        assert!(owned.unwrap().success());
    }
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output().unwrap();
    let script = "mount --bind \"$2\" /mnt; user=$1; shift 2
        exec setpriv --reuid=$user --regid=$user --clear-groups env PATH=\"/mnt/bin:$PATH\" CARGO=/mnt/bin/cargo \"$@\"";
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "sh",
        "-ec",
        script,
        "sh",
        USER,
        String::from_utf8(sysroot.stdout).unwrap().trim(),
    ]);
    command.arg(checkout.join("xtask-of-user")).current_dir(checkout);
    command.env("HOME", &home).env_remove("IOT_XTASK_CACHE").env_remove("XDG_CACHE_HOME");
    command.env("CARGO_MANIFEST_DIR", checkout.join("xtask")).env_remove("CARGO_HOME");
    command
}

/// Copies the files from which cargo builds.
pub(crate) fn copy_checkout(to: &Path) {
    std::fs::create_dir(to).unwrap();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let parts = ["Cargo.toml", "Cargo.lock", ".cargo", "agent", "xtask"].map(|part| workspace.join(part));
    let copied = Command::new("cp").arg("-r").args(parts).arg(to).status().unwrap();
    assert!(copied.success());
}

#[test]
fn a_user_without_privileges_gets_the_verdict() {
    let scratch = Scratch::new();
    let checkout = scratch.path().join("checkout");
    copy_checkout(&checkout);
    let built = Command::new(XTASK_INSPECT).args(["build", "--arch", "aarch64"]).output().unwrap();
    assert_code(&built, 0);
    std::fs::copy(String::from_utf8(built.stdout).unwrap().trim(), checkout.join("iot-agent")).unwrap();
    // This user has no subordinate ids and therefore cannot build the image.
    let images = directories(&Cache::from_env().unwrap().images());
    let is_wanted = |path: &&std::path::PathBuf| path.to_string_lossy().contains("debian-12-aarch64");
    let image = images.iter().find(is_wanted).expect("a smoke has built the image before");
    let cache = checkout.join("c");
    std::fs::create_dir_all(cache.join("images")).unwrap();
    let copied = Command::new("cp").arg("-a").arg(image).arg(cache.join("images")).status().unwrap();
    assert!(copied.success());
    std::fs::set_permissions(&cache, std::fs::Permissions::from_mode(0o700)).unwrap();
    let mut smoke = as_ordinary_user(XTASK_VM, &checkout, scratch.path());
    smoke.args(["smoke", "--arch", "aarch64", "--image", "debian-12", "--agent", "iot-agent", "--fsck"]);
    let output = smoke.env("IOT_XTASK_CACHE", &cache).output().unwrap();
    assert_code(&output, 0);
    assert!(
        message(&output).contains("VERIFIED  iot-agent on aarch64, agent given as iot-agent, debian-12"),
        "{}",
        message(&output)
    );
}
