//! The machine, from what was asked ([`VmSpec`]) over what was resolved ([`DomainXmlParams`]) to the domain XML and
//! the cloud-init seed. Pure: golden files for both architectures are tested on any host.

mod sabotage;
pub mod seed;
pub mod xml;

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::arch::{Accelerator, VmArchitecture};
use crate::cli::MachineArgs;
use crate::cpu::Cpu;
use crate::host::firmware::AarchFirmware;
use crate::image::Format;

/// The domain's name in its own libvirt root; short, because it is part of socket paths of at most 107 bytes.
pub const DOMAIN_NAME: &str = "vm";

/// The guest's network card, so that cloud-init can name it.
pub const GUEST_MAC: &str = "52:54:00:69:6f:74";

/// Where a guest of QEMU's user-mode network reaches this host's loopback (QEMU, -netdev user).
pub const HOST_FROM_GUEST: &str = "10.0.2.2";

/// Where the guest's ssh listens.
pub const SSH_PORT: u16 = 22;

/// Where the guest publishes its workloads: the one that is kept, and the one that is deleted.
pub const WORKLOAD_PORTS: [u16; 2] = [8080, 8081];

/// The payload's disk in the guest: the third one. A guest that has booted without its content does not find it by its label.
pub const PAYLOAD_DEVICE: &str = "/dev/vdc";

/// The serial console's socket, in the directory of the machine's own files.
pub const CONSOLE_SOCKET: &str = "console.sock";

/// The guest's ports that this host's loopback leads to, each from a port of the kernel's choice.
pub const FORWARDED_PORTS: [u16; 3] = [SSH_PORT, WORKLOAD_PORTS[0], WORKLOAD_PORTS[1]];

/// The machine as it was asked for.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// The guest's architecture.
    pub architecture: VmArchitecture,
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// `--cpu`, `None` for the fastest.
    pub cpu: Option<String>,
}

impl VmSpec {
    /// From the command line.
    pub fn from_args(architecture: VmArchitecture, args: &MachineArgs) -> Self {
        Self { architecture, vcpus: args.vcpus, memory_mib: args.memory, cpu: args.cpu.clone() }
    }
}

/// The machine with everything resolved; [`xml::domain_xml`] needs nothing else.
#[derive(Debug, Clone)]
pub struct DomainXmlParams {
    pub spec: VmSpec,
    pub accelerator: Accelerator,
    pub cpu: Cpu,
    /// The full-system emulator.
    pub emulator: PathBuf,
    /// UEFI; `None` boots by BIOS.
    pub firmware: Option<AarchFirmware>,
    pub files: RunFiles,
}

impl DomainXmlParams {
    /// The block devices in the guest's order; the first one boots.
    pub fn disks(&self) -> [Disk; 3] {
        let RunFiles { overlay, backing, seed, payload, .. } = &self.files;
        let disk = |path: &PathBuf, format, read_only, backing: &[PathBuf]| Disk {
            path: path.clone(),
            format,
            read_only,
            backing: backing.to_vec(),
        };
        [
            disk(overlay, Format::Qcow2, false, backing),
            disk(seed, Format::Raw, true, &[]),
            disk(payload, Format::Raw, true, &[]),
        ]
    }
}

/// A block device.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Disk {
    /// The file.
    pub path: PathBuf,
    pub format: Format,
    /// Whether the guest may write.
    pub read_only: bool,
    /// What it lies on, from the next layer down; empty where it lies on nothing, or that is not known.
    pub backing: Vec<PathBuf>,
}

/// The files of one run that its domain uses.
#[derive(Debug, Clone)]
pub struct RunFiles {
    /// The qcow2 layer over the image; all that the guest writes.
    pub overlay: PathBuf,
    /// What that lies on, from the next layer down: the image, and between them a snapshot's disk.
    pub backing: Vec<PathBuf>,
    /// The cloud-init NoCloud seed.
    pub seed: PathBuf,
    /// The agent and its installer.
    pub payload: PathBuf,
    /// The domain's variable store.
    pub nvram: PathBuf,
    /// What the serial console says.
    pub console_log: PathBuf,
    /// Where somebody may attach to it.
    pub console_socket: PathBuf,
    /// The machine's identity.
    pub uuid: String,
}

impl RunFiles {
    /// The files of a run with the working directory `work` and its console in `console_log`.
    ///
    /// # Errors
    /// Where the kernel gives no random identity.
    pub fn of_run(work: &Path, console_log: PathBuf) -> Result<Self> {
        const UUID: &str = "/proc/sys/kernel/random/uuid";
        Ok(Self {
            overlay: work.join("disk.qcow2"),
            backing: Vec::new(),
            seed: work.join("seed.img"),
            payload: work.join("payload.img"),
            nvram: work.join("nvram.fd"),
            console_log,
            console_socket: work.join(CONSOLE_SOCKET),
            uuid: fs_err::read_to_string(UUID)?.trim().to_owned(),
        })
    }
}
