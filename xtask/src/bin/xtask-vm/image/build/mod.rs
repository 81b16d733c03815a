//! A distribution's disk, built from its packages: mmdebstrap makes the tree, the rest makes a disk of it without
//! loop devices. As root directly, as an ordinary user in a user namespace.
//!
//! [`bootstrap`] calls mmdebstrap, [`sources`] finds the mirror, [`progress`] reads mmdebstrap's log; what runs in the tree are the shell scripts beside this
//! file, each of which says what it is for.

pub(crate) mod bootstrap;
mod progress;
mod sources;

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};
use xtask::digest::hex;
use xtask::fs::remove_tree;
use xtask::fs::write_private;
use xtask::host::tools;
use xtask::image::{Image, Recipe};
use xtask::limits;

use super::Store;
use crate::child::{self, Job};
use crate::interrupt::Interrupt;
use bootstrap::Speed;
use progress::Follower;

/// Makes the disk out of the packed tree.
const ASSEMBLE: &str = include_str!("assemble.sh");

/// The texts that decide what an image contains: part of its key.
pub(super) const SCRIPTS: &[&str] = &[
    bootstrap::AHEAD,
    bootstrap::STORE,
    bootstrap::LATER,
    bootstrap::FINISH,
    bootstrap::ACCELERATE,
    bootstrap::TOOLS,
    bootstrap::CUSTOMIZE,
    bootstrap::INITRAMFS,
    bootstrap::RESTORE,
    ASSEMBLE,
];

/// Leaves `disk` and the manifest's raw facts in `directory`; returns where it came from.
pub(super) fn build(
    store: &mut Store<'_>,
    directory: &Path,
    image: &Image,
    recipe: &Recipe,
) -> Result<String> {
    store.screen.note(&format!(
        "building the image {} for {} from {} packages and their dependencies",
        image.name,
        image.arch,
        recipe.packages.len()
    ));
    bootstrap::bootstrap(store, directory, image, recipe, Speed::Full)?;
    assemble(store, directory, image, recipe)?;
    let qemu_img = tools::require("qemu-img")?;
    let (raw, disk) = (directory.join("disk.raw"), directory.join(super::DISK));
    let convert = ["convert", "-f", "raw", "-O", "qcow2"].map(OsString::from).into_iter();
    let arguments = convert.chain([raw.clone().into(), disk.into()]).collect();
    run(store, &qemu_img, arguments, directory, "convert.log", Vec::new())?;
    std::fs::remove_file(&raw).with_context(|| format!("delete {}", raw.display()))?;
    Ok(format!("packages of {}", recipe.suite))
}

fn assemble(store: &mut Store<'_>, directory: &Path, image: &Image, recipe: &Recipe) -> Result<()> {
    let script = directory.join("assemble.sh");
    write_private(&script, ASSEMBLE)?;
    let disk = directory.join("disk.raw");
    let file = File::create(&disk).with_context(|| format!("make {}", disk.display()))?;
    file.set_len(recipe.disk_mib << 20).with_context(|| format!("size {}", disk.display()))?;
    let profile = image.arch.profile();
    let systemd_boot = format!("usr/lib/systemd/boot/efi/{}", profile.systemd_boot_file);
    let loader = match recipe.layout {
        xtask::image::Layout::SystemdBoot => systemd_boot,
        xtask::image::Layout::Grub => profile.grub_file.to_owned(),
    };
    // mkfs.vfat and sfdisk are called by name in the script, and an ordinary user's PATH does not hold them.
    let search = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let environment = [
        ("PATH", search),
        ("IOT_LAYOUT", recipe.layout.name().to_owned()),
        ("IOT_CONSOLE", profile.console.to_owned()),
        ("IOT_DISK_MIB", recipe.disk_mib.to_string()),
        ("IOT_EFI_FILE", profile.efi_boot_file.to_owned()),
        ("IOT_LOADER_FILE", loader),
        ("IOT_UUID", uuid(&image.key(SCRIPTS))),
        ("IOT_TMPFS", bootstrap::in_memory(store).unwrap_or_default().to_owned()),
    ];
    let environment = environment.map(|(name, value)| (name, OsString::from(value))).into();
    let mut arguments: Vec<OsString> = Vec::new();
    if bootstrap::can_have_own_mounts() {
        arguments.push("--mount".into());
    }
    if !rustix::process::geteuid().is_root() {
        // Root's files become this user's own, the others' subordinate ids: what mke2fs reads is what the guest gets.
        arguments.extend(["--map-root-user", "--map-auto"].map(OsString::from));
    }
    arguments.extend([OsString::from("sh"), script.into(), directory.into()]);
    run(store, &tools::require("unshare")?, arguments, directory, "assemble.log", environment)
}

/// The same for the same image (RFC 9562, version 8).
fn uuid(key: &str) -> String {
    let digits = hex(&Sha256::digest(key));
    format!(
        "{}-{}-8{}-8{}-{}",
        &digits[..8],
        &digits[8..12],
        &digits[13..16],
        &digits[17..20],
        &digits[20..32]
    )
}

fn run(
    store: &mut Store<'_>,
    program: &Path,
    arguments: Vec<OsString>,
    directory: &Path,
    log: &str,
    environment: Vec<(&'static str, OsString)>,
) -> Result<()> {
    let log = directory.join(log);
    let mut follower = Follower::new(&log);
    let job = Job { program, owner: directory, arguments, log, environment };
    let screen = &mut *store.screen;
    child::run(&job, store.interrupt, |_| screen.alive(&follower.describe()))
}

/// Deletes what a build left. An ordinary user's tree has files of subordinate ids, which only their namespace may
/// delete.
pub(crate) fn discard(directory: &Path, interrupt: &Interrupt) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    if let Some(mount) = mount_below(&mounts, directory) {
        bail!("delete {}: {mount} is mounted in it; unmount that first, then run again", directory.display());
    }
    let tree = directory.join("tree");
    if !rustix::process::geteuid().is_root() && tree.exists() {
        let words = ["--map-root-user", "--map-auto", "rm", "-rf", "--"].map(OsString::from);
        let arguments: Vec<_> = words.into_iter().chain([tree.into()]).collect();
        child::read(&tools::require("unshare")?, &arguments, limits::SERVER_START, interrupt)?;
    }
    // Killed processes take a moment to be gone, and what still runs in the tree writes to it until then.
    let deadline = Instant::now() + limits::CHILD_STOP;
    loop {
        match remove_tree(directory) {
            Err(_busy) if Instant::now() < deadline => std::thread::sleep(limits::POLL),
            done => return done,
        }
    }
}

/// The first mount point below `directory` (proc(5), mountinfo: the fifth field). To delete through one would be to
/// delete what is mounted.
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
