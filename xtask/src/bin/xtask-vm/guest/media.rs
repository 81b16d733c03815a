//! The small disks of a run: FAT volumes that cloud-init and the installer read, made without root.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xtask_core::build::Agent;
use xtask_core::cli::Sabotage;
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::host::tools;
use xtask_core::limits;
use xtask_core::machine::seed::{self, PAYLOAD_LABEL, Restored, SEED_LABEL, Seed};
use xtask_core::workspace::Workspace;

use crate::guest::ssh::Keys;
use xtask_jobs::{Ui, child};

/// Room for the FAT itself, the directory and the last clusters.
const OVERHEAD_BYTES: u64 = 2 << 20;

/// What of `agent/dist` the installer installs or runs, and itself.
const INSTALLED: [&str; 12] = [
    "containers.conf",
    "install.sh",
    "iot-agent.service",
    "iot-agent.sysusers",
    "iot-agent.tmpfiles",
    "iot-podman.service",
    "iot-podman.socket",
    "iot-readahead.service",
    "iot-user.conf",
    "prerequisites.sh",
    "readahead.sh",
    "storage.conf",
];

/// What is installed in the guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PayloadDisk<'a> {
    /// The executable under test and the archive of the image that the fleet will have it run; a machine to work in has neither.
    pub(crate) subject: Option<(&'a Agent, &'a [u8])>,
    /// Its configuration.
    pub(crate) config: &'a str,
    /// A fault to plant.
    pub(crate) sabotage: Option<Sabotage>,
    /// Where the machine comes from a snapshot: how large its disk is, and the run's keys.
    pub(crate) restored: Option<(u64, Restored<'a>, &'a Keys)>,
}

/// Writes the cloud-init seed to `disk`.
pub(crate) fn make_seed(disk: &Path, seed: &Seed<'_>, work: &Path, ui: &Ui) -> Result<()> {
    let directory = work.join("seed");
    make_private_dir(&directory)?;
    let mut files = Vec::new();
    for (name, content) in seed.files() {
        write_private(&directory.join(name), content)?;
        files.push(directory.join(name));
    }
    make_fat(disk, SEED_LABEL, &files, 0, ui).context("make the cloud-init seed")
}

/// Writes the agent, its installer and its configuration to `disk`.
pub(crate) fn make_payload(
    disk: &Path,
    workspace: &Workspace,
    payload: &PayloadDisk<'_>,
    work: &Path,
    ui: &Ui,
) -> Result<()> {
    let PayloadDisk { subject, config, sabotage, restored } = *payload;
    let directory = work.join("payload");
    make_private_dir(&directory)?;
    let mut files = Vec::new();
    let mut add = |name: &str, content: &[u8]| -> Result<()> {
        write_private(&directory.join(name), content)?;
        files.push(directory.join(name));
        Ok(())
    };
    let script =
        seed::provision_script(sabotage, restored.map(|(_, restored, _)| restored), subject.is_some());
    add("provision.sh", script.as_bytes())?;
    if let Some((_, _, keys)) = restored {
        add("host_key", keys.host_private.as_bytes())?;
        add("host_key.pub", keys.host_public.as_bytes())?;
        add("user_key.pub", keys.user_public.as_bytes())?;
    }
    if let Some((agent, workload)) = subject {
        let mut executable = agent.content.clone();
        if sabotage == Some(Sabotage::OtherDigest) {
            // Behind the last section: the loader ignores it, the digest does not.
            executable.push(b'\n');
        }
        add("iot-agent", &executable)?;
        add(&crate::guest::workload::file_name(), workload)?;
        add("config.toml", config.as_bytes())?;
        for name in INSTALLED {
            let path = workspace.root().join("agent/dist").join(name);
            add(name, &std::fs::read(&path).with_context(|| format!("read {}", path.display()))?)?;
        }
    }
    let least = restored.map_or(0, |(bytes, ..)| bytes);
    make_fat(disk, PAYLOAD_LABEL, &files, least, ui).context("make the agent's payload disk")
}

/// A disk of so many bytes with nothing on it but an empty line: what will be a payload's, and is looked at by a shell until it is.
pub(crate) fn make_blank(disk: &Path, bytes: u64) -> Result<()> {
    write_private(disk, b"\n")?;
    let image = File::options().write(true).open(disk);
    image.and_then(|file| file.set_len(bytes)).with_context(|| format!("make {}", disk.display()))
}

/// A FAT volume of at least so many bytes with `files` in its root.
fn make_fat(disk: &Path, label: &str, files: &[PathBuf], least: u64, ui: &Ui) -> Result<()> {
    let mut bytes = OVERHEAD_BYTES;
    for file in files {
        bytes += file
            .metadata()
            .with_context(|| format!("look at {}", file.display()))?
            .len()
            .next_multiple_of(4096);
    }
    // It may hold a password.
    make_blank(disk, bytes.next_multiple_of(1 << 20).max(least))?;
    let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let mut format = words(&["-n", label]);
    format.push(disk.into());
    child::read(&tools::require("mkfs.vfat")?, &format, limits::SERVER_START, ui)?;
    let mut copy = words(&["-i"]);
    copy.push(disk.into());
    copy.extend(files.iter().map(OsString::from));
    copy.push("::".into());
    child::read(&tools::require("mcopy")?, &copy, limits::SERVER_START, ui)?;
    Ok(())
}
