//! Tests which file `inspect` takes: its name, and the architecture that it decides.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::process::Command;

use xtask_core::arch::VmArchitecture;

use super::corpus;
use crate::scratch::{XTASK_INSPECT, message};

#[test]
fn the_file_decides_its_architecture_and_may_have_any_name() {
    let corpus = corpus();
    let name = OsStr::from_bytes(b"sound-\xff");
    let path = corpus.directory.join("names").join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::copy(corpus.directory.join("sound-dynamic"), &path).unwrap();
    let root = corpus.root(VmArchitecture::Aarch64);
    let output = Command::new(XTASK_INSPECT)
        .args(["inspect", "--json", "--sysroot"])
        .args([root.as_os_str(), path.as_os_str()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", message(&output));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["target"]["arch"], "aarch64");
}
