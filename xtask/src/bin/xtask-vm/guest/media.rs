//! The small disks of a run: FAT volumes that cloud-init and the installer read. They are made without root.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use fs_err::File;
use xtask_core::arch::VmArchitecture;
use xtask_core::build::Agent;
use xtask_core::cache::Cache;
use xtask_core::cli::Sabotage;
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::host::tools;
use xtask_core::limits;
use xtask_core::machine::durability;
use xtask_core::machine::seed::{self, PAYLOAD_LABEL, PlantedFault, Restored, SEED_LABEL, Seed};
use xtask_core::workspace::Workspace;
use xtask_jobs::{Ui, child};

use crate::guest::ssh::Keys;

/// The space for the FAT itself, the directory and the last clusters.
const OVERHEAD_BYTES: u64 = 2 << 20;

/// The files of `agent/dist` that the payload disk needs: the installer, and what it installs or runs.
const INSTALLED: [&str; 14] = [
    "check-host.sh",
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
    "uninstall.sh",
];

/// The executable under test, and the archive of the container image that the fleet deploys; `None` for `vm up`.
pub(crate) type Delivered<'a> = Option<(&'a Agent, &'a [u8])>;

/// The content of a payload disk, from which the guest is provisioned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PayloadDisk<'a> {
    pub(crate) subject: Delivered<'a>,
    /// The lines to add to apt's sources in a machine without the agent.
    pub(crate) apt_sources: &'a [String],
    /// The agent's configuration.
    pub(crate) config: &'a str,
    /// The certificate authority that the configuration names, as PEM.
    pub(crate) ca: &'a str,
    /// The fault to plant, if any.
    pub(crate) sabotage: Option<Sabotage>,
    /// The fault of `torture` to plant, if any, with the library that it needs.
    pub(crate) plant: Option<&'a Plant>,
    /// Podman's configuration for the registry of the run, if it has one.
    pub(crate) registries: Option<&'a str>,
    /// For a machine that is restored from a snapshot: the size of its payload disk in bytes, the values that the run
    /// sets in the machine, and the run's keys.
    pub(crate) restored: Option<(u64, Restored<'a>, &'a Keys)>,
}

/// A fault that `torture` plants, and the files that it adds to the payload.
#[derive(Debug)]
pub(crate) struct Plant {
    fault: PlantedFault,
    files: Vec<(&'static str, Vec<u8>)>,
}

impl Plant {
    /// Compiles the library for `arch` if the fault needs it.
    ///
    /// # Errors
    /// Returns an error if rustc fails.
    pub(crate) fn make(
        fault: PlantedFault,
        workspace: &Workspace,
        cache: &Cache,
        arch: VmArchitecture,
    ) -> Result<Self> {
        let mut files = Vec::new();
        if let PlantedFault::Durability(fault) = fault
            && durability::needs_library(fault)
        {
            let compiled = durability::LIBRARY.shared_library(workspace, cache, arch);
            let (library, _) = compiled.context("compile the library of the planted fault")?;
            files.push((durability::LIBRARY_FILE, library));
        }
        Ok(Self { fault, files })
    }
}

/// Writes the cloud-init seed to `disk`.
pub(crate) fn make_seed(disk: &Path, seed: &Seed<'_>, work: &Path, ui: &Ui) -> Result<()> {
    let files = seed.files().map(|(name, content)| (name.to_owned(), content.into_bytes()));
    make_fat(disk, SEED_LABEL, &written(&work.join("seed"), files.into())?, 0, ui)
        .context("make the cloud-init seed")
}

/// Writes the agent, its installer and its configuration to `disk`.
pub(crate) fn make_payload(
    disk: &Path,
    workspace: &Workspace,
    payload: &PayloadDisk<'_>,
    work: &Path,
    ui: &Ui,
) -> Result<()> {
    let PayloadDisk { subject, apt_sources, config, ca, sabotage, plant, registries, restored } = *payload;
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |name: &str, content: &[u8]| files.push((name.to_owned(), content.to_owned()));
    let apt_sources = subject.is_none().then_some(apt_sources);
    let fault = plant.map(|plant| plant.fault).or(sabotage.map(PlantedFault::Smoke));
    let of_run = restored.map(|(_, restored, _)| restored);
    add("provision.sh", seed::provision_script(fault, registries, of_run, apt_sources).as_bytes());
    for (name, content) in plant.map_or(&[][..], |plant| &plant.files) {
        add(name, content);
    }
    if let Some((_, _, keys)) = restored {
        add("host_key", keys.host_private.as_bytes());
        add("host_key.pub", keys.host_public.as_bytes());
        add("user_key.pub", keys.user_public.as_bytes());
    }
    if let Some((agent, workload)) = subject {
        // A byte after the last section changes the digest, but the loader ignores it.
        let more: &[u8] = if sabotage == Some(Sabotage::OtherDigest) { b"\n" } else { b"" };
        add("iot-agent", &[&agent.content, more].concat());
        add(&crate::guest::workload::file_name(), workload);
        add("config.toml", config.as_bytes());
        add("secrets/ca.pem", ca.as_bytes());
        for name in INSTALLED {
            add(name, &fs_err::read(workspace.root().join("agent/dist").join(name))?);
        }
    }
    let least = restored.map_or(0, |(bytes, ..)| bytes);
    make_fat(disk, PAYLOAD_LABEL, &written(&work.join("payload"), files)?, least, ui)
        .context("make the agent's payload disk")
}

/// Writes these files to `directory`, in which a name may have one directory, and returns the paths of its entries.
fn written(directory: &Path, files: Vec<(String, Vec<u8>)>) -> Result<Vec<PathBuf>> {
    make_private_dir(directory)?;
    let mut entries = Vec::new();
    for (name, content) in files {
        let path = directory.join(&name);
        match name.split_once('/') {
            Some((parent, _)) => {
                make_private_dir(&directory.join(parent))?;
                entries.push(directory.join(parent));
            }
            None => entries.push(path.clone()),
        }
        write_private(&path, content)?;
    }
    entries.dedup();
    Ok(entries)
}

/// Makes a disk of `bytes` bytes that is blank except for an empty first line. A shell in the guest reads this line
/// until the payload has been written to the disk.
pub(crate) fn make_blank(disk: &Path, bytes: u64) -> Result<()> {
    write_private(disk, b"\n")?;
    Ok(File::options().write(true).open(disk)?.set_len(bytes)?)
}

/// Makes a FAT volume of at least `least` bytes with `files` in its root directory. Directories are copied with their
/// files, for whose sizes [`OVERHEAD_BYTES`] is enough.
fn make_fat(disk: &Path, label: &str, files: &[PathBuf], least: u64, ui: &Ui) -> Result<()> {
    let mut bytes = OVERHEAD_BYTES;
    for file in files {
        bytes += fs_err::metadata(file)?.len().next_multiple_of(4096);
    }
    // The file must be private, because the volume may hold a password.
    make_blank(disk, bytes.next_multiple_of(1 << 20).max(least))?;
    let disk = disk.as_os_str();
    let format = ["-n".as_ref(), label.as_ref(), disk].map(OsStr::to_owned);
    child::read(&tools::require("mkfs.vfat")?, &format, limits::SERVER_START, ui)?;
    let files = files.iter().map(|file| file.as_os_str());
    let copy = ["-s".as_ref(), "-i".as_ref(), disk].into_iter().chain(files).chain(["::".as_ref()]);
    let copy: Vec<_> = copy.map(OsStr::to_owned).collect();
    child::read(&tools::require("mcopy")?, &copy, limits::SERVER_START, ui).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_has_the_library_of_a_planted_fault() {
        use xtask_core::cli::DurabilityFault::{PullWithoutSync, StateWithoutSync};
        let directory = tempfile::tempdir().unwrap();
        let (workspace, ui) = (Workspace::find().unwrap(), Ui::quiet());
        let cache = Cache::at(&directory.path().join("cache"));
        let host = VmArchitecture::of_host().unwrap();
        let (disk, work) = (directory.path().join("payload.img"), directory.path().join("w"));
        make_private_dir(&work).unwrap();
        for kind in [StateWithoutSync, PullWithoutSync] {
            let fault = PlantedFault::Durability(kind);
            let plant = Plant::make(fault, &workspace, &cache, host).unwrap();
            let payload = PayloadDisk {
                subject: None,
                apt_sources: &[],
                config: "",
                ca: "",
                sabotage: None,
                plant: Some(&plant),
                registries: Some("insecure = true\n"),
                restored: None,
            };
            make_payload(&disk, &workspace, &payload, &work, &ui).unwrap();
            let read = |name: &str| {
                let mut mtype = std::process::Command::new(tools::require("mtype").unwrap());
                mtype.arg("-i").arg(&disk).arg(format!("::{name}")).output().unwrap().stdout
            };
            let script = String::from_utf8(read("provision.sh")).unwrap();
            assert!(script.contains("iot-agent.service.d/plant.conf"), "{fault:?}: {script}");
            assert!(script.contains("<<'END'\ninsecure = true\nEND\n"), "{script}");
            let library = read(durability::LIBRARY_FILE);
            assert_eq!(library.starts_with(b"\x7fELF"), durability::needs_library(kind), "{fault:?}");
            std::fs::remove_dir_all(work.join("payload")).unwrap();
        }
    }
}
