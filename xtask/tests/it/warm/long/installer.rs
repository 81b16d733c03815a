//! Tests the agent's installer and uninstaller in an instance. The claims are in `installer.sh`, which runs in the guest.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use super::super::turn;
use crate::scratch::{XTASK, XTASK_VM, assert_code, message};

#[test]
fn the_agent_is_installed_upgraded_and_removed() {
    let warm = turn();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let bundle = warm.scratch.path().join("bundle");
    std::fs::create_dir(&bundle).unwrap();
    let agent = workspace.join("target/aarch64-unknown-linux-gnu/release/iot-agent");
    std::fs::copy(&agent, bundle.join("iot-agent"))
        .unwrap_or_else(|error| panic!("{}, which a smoke builds: {error}", agent.display()));
    for entry in std::fs::read_dir(workspace.join("agent/dist")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), bundle.join(entry.file_name())).unwrap();
    }
    std::fs::write(bundle.join("installer.sh"), include_str!("installer.sh")).unwrap();
    let archive = warm.scratch.path().join("bundle.tar");
    let mut packed = Command::new("tar");
    packed.arg("--create").arg("--file").arg(&archive).arg("--directory").arg(&bundle);
    assert!(packed.arg(".").status().unwrap().success());

    let up = warm.scratch.run(XTASK_VM, &["vm", "up", "device", "--arch", "aarch64", "--image", "debian-12"]);
    assert_code(&up, 0);
    let script = "mkdir bundle && cd bundle && tar --extract && sudo sh ./installer.sh";
    let mut command = warm.scratch.command(XTASK, &["vm", "exec", "--", "sh", "-c", script]);
    let tested = command.stdin(File::open(&archive).unwrap()).output().unwrap();
    let removed = warm.vm(&["rm", "device"]);
    let output = String::from_utf8_lossy(&tested.stdout);
    assert!(tested.status.success() && output.ends_with("all of it holds\n"), "{output}{}", message(&tested));
    assert_code(&removed, 0);
}
