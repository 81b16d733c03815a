//! Deletes the directory of a build.

use std::ffi::OsString;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};
use xtask_core::fs::remove_tree;
use xtask_core::host::tools;
use xtask_core::limits;
use xtask_jobs::{Ui, child};

/// Deletes the directory of a build. An ordinary user's tree contains files of subordinate ids, which only a process in
/// a user namespace can delete.
pub fn discard(directory: &Path, ui: &Ui) -> Result<()> {
    let mounts = fs_err::read_to_string("/proc/self/mountinfo")?;
    if let Some(mount) = mount_below(&mounts, directory) {
        bail!("delete {}: {mount} is mounted in it; unmount that first, then run again", directory.display());
    }
    let tree = directory.join("tree");
    if !rustix::process::geteuid().is_root() && tree.exists() {
        let words = ["--map-root-user", "--map-auto", "rm", "-rf", "--"].map(OsString::from);
        let arguments: Vec<_> = words.into_iter().chain([tree.into()]).collect();
        child::read(&tools::require("unshare")?, &arguments, limits::SERVER_START, ui)?;
    }
    // Killed processes need a moment to end, and until then they may write into the tree.
    let deadline = Instant::now() + limits::CHILD_STOP;
    loop {
        match remove_tree(directory) {
            Err(_busy) if Instant::now() < deadline => std::thread::sleep(limits::POLL),
            done => return done,
        }
    }
}

/// Returns the first mount point below `directory` (proc(5), mountinfo: the fifth field). Deleting through a mount
/// point would delete the mounted files.
fn mount_below<'a>(mountinfo: &'a str, directory: &Path) -> Option<&'a str> {
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4));
    points.into_iter().find(|point| Path::new(point).starts_with(directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_deleted_through_a_mount() {
        let mounts =
            "22 1 0:21 / /proc rw - proc proc rw\n90 1 0:21 / /c/x.building/t/proc rw - proc proc rw\n";
        assert_eq!(mount_below(mounts, Path::new("/c/x.building")), Some("/c/x.building/t/proc"));
        assert_eq!(mount_below(mounts, Path::new("/c/y.building")), None);
    }
}
