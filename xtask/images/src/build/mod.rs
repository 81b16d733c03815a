//! Builds a distribution's disk from its packages. mmdebstrap makes a directory tree, and a script makes a disk of the
//! tree without loop devices. If the user is not root, both run in a user namespace.
//!
//! [`bootstrap`] calls mmdebstrap, and [`progress`] reads mmdebstrap's log. The shell scripts beside this file run in the
//! tree. Each script begins with its purpose.

pub mod bootstrap;
mod progress;

use std::ffi::OsString;
use std::path::Path;

use anyhow::Result;
use xtask_core::digest::Algorithm;
use xtask_core::format::name_of;
use xtask_core::fs::write_private;
use xtask_core::host::mounts::can_have_own_mounts;
use xtask_core::host::tools;
pub(crate) use xtask_core::image::scripts::SCRIPTS;
use xtask_core::image::{Image, Layout, Recipe};

use crate::store::Store;
use bootstrap::Speed;
use progress::Follower;
use xtask_jobs::child::{self, Job};

/// The script that makes the disk from the packed tree.
const ASSEMBLE: &str = include_str!("assemble.sh");

/// Builds the image's `disk` in `directory`, beside the files from which the manifest is made. Returns a description
/// of the image's source.
pub(crate) fn build(store: &Store<'_>, directory: &Path, image: &Image, recipe: &Recipe) -> Result<String> {
    let (name, arch, count) = (&image.name, image.arch, recipe.packages.len());
    let note = format!("building the image {name} for {arch} from {count} packages and their dependencies");
    store.ui.note(&note);
    bootstrap::bootstrap(store, directory, image, recipe, Speed::Full)?;
    assemble(store, directory, image, recipe)?;
    let qemu_img = tools::require("qemu-img")?;
    let (raw, disk) = (directory.join("disk.raw"), directory.join(crate::store::DISK));
    let convert = ["convert", "-f", "raw", "-O", "qcow2"].map(OsString::from).into_iter();
    let arguments = convert.chain([raw.clone().into(), disk.into()]).collect();
    let log = directory.join("convert.log");
    let job = Job { program: &qemu_img, owner: directory, arguments, log, environment: Vec::new() };
    run(store, &job)?;
    fs_err::remove_file(&raw)?;
    Ok(format!("packages of {}", recipe.suite))
}

fn assemble(store: &Store<'_>, directory: &Path, image: &Image, recipe: &Recipe) -> Result<()> {
    let script = directory.join("assemble.sh");
    write_private(&script, ASSEMBLE)?;
    let disk = directory.join("disk.raw");
    fs_err::File::create(&disk)?.set_len(recipe.disk_mib << 20)?;
    let profile = image.arch.profile();
    let loader = match recipe.layout {
        Layout::SystemdBoot => format!("usr/lib/systemd/boot/efi/{}", profile.systemd_boot_file),
        Layout::Grub => profile.grub_file.to_owned(),
    };
    // The script calls mkfs.vfat and sfdisk by name, and an ordinary user's PATH does not contain their directories.
    let search = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let environment = [
        ("PATH", search),
        ("IOT_LAYOUT", name_of(&recipe.layout)),
        ("IOT_CONSOLE", profile.console.to_owned()),
        ("IOT_DISK_MIB", recipe.disk_mib.to_string()),
        ("IOT_EFI_FILE", profile.efi_boot_file.to_owned()),
        ("IOT_LOADER_FILE", loader),
        ("IOT_UUID", uuid(&image.key(SCRIPTS))),
        ("IOT_TMPFS", bootstrap::in_memory(store).unwrap_or_default().to_owned()),
    ];
    let environment = environment.map(|(name, value)| (name, OsString::from(value))).into();
    let mut arguments: Vec<OsString> = Vec::new();
    if can_have_own_mounts() {
        arguments.push("--mount".into());
    }
    if !rustix::process::geteuid().is_root() {
        // In this namespace, root's files belong to this user, and the files of others to the user's subordinate ids.
        // mke2fs then reads the owners that the guest must see.
        arguments.extend(["--map-root-user", "--map-auto"].map(OsString::from));
    }
    arguments.extend([OsString::from("sh"), script.into(), directory.into()]);
    let (unshare, log) = (tools::require("unshare")?, directory.join("assemble.log"));
    run(store, &Job { program: &unshare, owner: directory, arguments, log, environment })
}

/// Returns a UUID that depends only on the image's key (RFC 9562, version 8).
fn uuid(key: &str) -> String {
    let digest = Algorithm::Sha256.of(key.as_bytes());
    let hex = digest.hex();
    format!("{}-{}-8{}-8{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..32])
}

fn run(store: &Store<'_>, job: &Job<'_>) -> Result<()> {
    let mut follower = Follower::new(&job.log);
    child::run(job, store.ui, || follower.describe())
}

#[cfg(test)]
mod tests {
    use xtask_core::image::scripts::TOOLS;

    use super::*;

    #[test]
    fn the_key_contains_the_texts_that_a_build_uses() {
        use bootstrap::{ACCELERATE, AHEAD, CUSTOMIZE, FINISH, INITRAMFS, LATER, RESTORE, STORE};
        for text in [AHEAD, STORE, LATER, FINISH, ACCELERATE, TOOLS, CUSTOMIZE, INITRAMFS, RESTORE, ASSEMBLE]
        {
            assert!(SCRIPTS.contains(&text), "{text}");
        }
        assert_eq!(SCRIPTS.len(), 10);
    }
}
