//! Unpacks the programs that a distribution ships in its image. They are never run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The offset of the root file system in our disk layout, in MiB: it follows the first MiB and an ESP of 128 MiB.
const ROOT: &str = "129";

/// Unpacks the programs of an image into a directory. If the image is not in the cache, it is built.
pub(crate) fn unpack(image: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let fetched = Command::new(env!("CARGO_BIN_EXE_xtask-vm"))
        .args(["image", "fetch", image, "--arch", "aarch64"])
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(fetched.status.success());
    let disk = String::from_utf8(fetched.stdout).unwrap().trim().to_owned();
    let in_it = |name: &str| directory.path().join(name).display().to_string();
    run("qemu-img", &["convert", "-O", "raw", &disk, &in_it("raw")]);
    let (from, to) = (format!("if={}", in_it("raw")), format!("of={}", in_it("root")));
    run("dd", &[&from, &to, "bs=1M", &format!("skip={ROOT}"), "conv=sparse", "status=none"]);
    std::fs::remove_file(directory.path().join("raw")).unwrap();
    for below in ["bin", "sbin"] {
        let into = directory.path().join("usr");
        std::fs::create_dir_all(&into).unwrap();
        run("debugfs", &["-R", &format!("rdump /usr/{below} {}", into.display()), &in_it("root")]);
    }
    directory
}

fn run(program: &str, arguments: &[&str]) {
    let program = xtask_core::host::tools::require(program).unwrap();
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Returns every ELF file in the directories for programs below `root`.
pub(crate) fn programs(root: &Path) -> Vec<PathBuf> {
    let directories = ["usr/bin", "usr/sbin", "bin", "sbin"].map(|name| root.join(name));
    let entries = directories.iter().filter_map(|directory| std::fs::read_dir(directory).ok()).flatten();
    let files = entries.map(|entry| entry.unwrap().path()).filter(|path| {
        let meta = path.symlink_metadata();
        meta.is_ok_and(|meta| meta.is_file())
            && std::fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"\x7fELF"))
    });
    files.collect()
}
