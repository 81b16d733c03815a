//! Describes a machine in three stages: the request ([`VmSpec`]), the resolved parameters ([`DomainXmlParams`]), and
//! the domain XML with the cloud-init seed. The functions only return texts. Therefore golden files can test both
//! architectures on any host.

pub mod durability;
pub mod proxies;
mod registry;
mod sabotage;
pub mod seed;
pub mod volume;
pub mod xml;

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::arch::{Accelerator, VmArchitecture};
use crate::cli::{MachineArgs, Network};
use crate::cpu::Cpu;
use crate::host::firmware::AarchFirmware;
use crate::image::Format;
use crate::runs::owner::Owner;

/// The name of each run's domain. It is short, because it is part of the paths of sockets, which have at most 107
/// bytes.
pub const DOMAIN_NAME: &str = "vm";

/// The MAC address of the guest's network card. cloud-init finds the card by this address.
pub const GUEST_MAC: &str = "52:54:00:69:6f:74";

/// The address at which a guest with QEMU's user-mode network reaches this host's loopback (QEMU, -netdev user).
pub const HOST_FROM_GUEST: &str = "10.0.2.2";

/// The port of the guest's sshd.
pub const SSH_PORT: u16 = 22;

/// The ports of the guest on which the smoke's three deployments are published. The first deployment is never deleted.
/// The second one is deleted and then added again. The third one is deleted just before the power cut.
pub const WORKLOAD_PORTS: [u16; 3] = [8080, 8081, 8082];

/// The device of the payload's disk in the guest, which is the third disk. A guest that waits for its payload cannot
/// find this disk by its label, because the disk is still empty.
pub const PAYLOAD_DEVICE: &str = "/dev/vdc";

/// The file name of the serial console's socket.
pub const CONSOLE_SOCKET: &str = "console.sock";

/// The name of the virtio-serial port to which the guest writes its markers ([`seed::marker`]). No other output goes to
/// this port. On the serial console, the kernel can write between the letters of a marker.
pub const MARKER_PORT: &str = "iot-xtask.markers";

/// The name of the virtio-serial port on which the guest runs the commands of the smoke as root.
pub const ROOT_PORT: &str = "iot-xtask.root";

/// The file name of the socket of [`ROOT_PORT`], in the directory of the machine's own files.
pub const ROOT_SOCKET: &str = "root.sock";

/// The ports of the guest that QEMU forwards from this host's loopback. The kernel chooses the ports of the host.
pub const FORWARDED_PORTS: [u16; 4] = [SSH_PORT, WORKLOAD_PORTS[0], WORKLOAD_PORTS[1], WORKLOAD_PORTS[2]];

/// A machine as requested on the command line.
#[derive(Debug, Clone)]
pub struct VmSpec {
    pub architecture: VmArchitecture,
    pub vcpus: u32,
    /// The memory in MiB.
    pub memory_mib: u64,
    /// The value of `--cpu`; `None` means the fastest CPU.
    pub cpu: Option<String>,
}

impl VmSpec {
    pub fn from_args(architecture: VmArchitecture, args: &MachineArgs) -> Self {
        Self { architecture, vcpus: args.vcpus, memory_mib: args.memory, cpu: args.cpu.clone() }
    }
}

/// The resolved parameters of a machine: everything that [`xml::domain_xml`] needs.
#[derive(Debug, Clone)]
pub struct DomainXmlParams {
    pub spec: VmSpec,
    pub accelerator: Accelerator,
    pub cpu: Cpu,
    /// The full-system emulator.
    pub emulator: PathBuf,
    /// The UEFI firmware; `None` if the machine boots by BIOS.
    pub firmware: Option<AarchFirmware>,
    pub files: RunFiles,
    /// The additional parameters of a domain on a libvirt daemon; `None` for the embedded driver.
    pub daemon: Option<DaemonDomain>,
}

/// The parameters of a domain on a libvirt daemon that a domain of the embedded driver does not have. The disks of
/// such a domain are volumes of a storage pool, libvirt selects the firmware by the descriptors of its host, and
/// consoles and ports are streams of libvirt.
#[derive(Debug, Clone)]
pub struct DaemonDomain {
    /// The record of the domain's owner. The name of the domain is derived from it.
    pub owner: Owner,
    pub pool: String,
    /// The names of the volumes of the disks, in the order of [`DomainXmlParams::disks`].
    pub volumes: [String; 3],
    pub network: Network,
    /// The MAC address of the network card. Other guests may be in the same network.
    pub mac: String,
    /// The architecture of the daemon's host; `None` if it is neither of the two or not known.
    pub host: Option<VmArchitecture>,
    /// True if the user-mode network gives the guest no access to this host and the internet.
    pub is_restricted: bool,
    /// True if QEMU waits for the memory of a saved machine instead of booting (QEMU, `-incoming defer`).
    pub is_incoming: bool,
}

impl DomainXmlParams {
    /// Returns the disks in the order in which the guest sees them. The guest boots from the first one.
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

/// A disk of the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Disk {
    pub path: PathBuf,
    pub format: Format,
    pub read_only: bool,
    /// The backing files of this disk, from top to bottom. The list is empty if there are none, or if they are not
    /// known.
    pub backing: Vec<PathBuf>,
}

/// The files of a run that the run's domain uses.
#[derive(Debug, Clone)]
pub struct RunFiles {
    /// The qcow2 file to which the guest writes. It contains only the changes to the first backing file.
    pub overlay: PathBuf,
    /// The backing files of the overlay, from top to bottom: the disk of the snapshot, if the run uses one, and the
    /// image.
    pub backing: Vec<PathBuf>,
    /// The cloud-init NoCloud seed.
    pub seed: PathBuf,
    /// The disk with the agent and its installer.
    pub payload: PathBuf,
    /// The file with the domain's UEFI variables.
    pub nvram: PathBuf,
    pub console_log: PathBuf,
    /// The socket of the serial console, to which a user can attach.
    pub console_socket: PathBuf,
    /// The log of [`MARKER_PORT`].
    pub markers_log: PathBuf,
    /// The socket of [`ROOT_PORT`].
    pub root_socket: PathBuf,
    pub uuid: String,
}

impl RunFiles {
    /// Returns the files of a run with the working directory `work` and the console log `console_log`.
    ///
    /// # Errors
    /// Returns an error if the kernel's file with a random UUID cannot be read.
    pub fn of_run(work: &Path, console_log: PathBuf) -> Result<Self> {
        const UUID: &str = "/proc/sys/kernel/random/uuid";
        Ok(Self {
            overlay: work.join("disk.qcow2"),
            backing: Vec::new(),
            seed: work.join("seed.img"),
            payload: work.join("payload.img"),
            nvram: work.join("nvram.fd"),
            console_socket: work.join(CONSOLE_SOCKET),
            markers_log: console_log.with_file_name("markers.log"),
            root_socket: work.join(ROOT_SOCKET),
            console_log,
            uuid: fs_err::read_to_string(UUID)?.trim().to_owned(),
        })
    }
}
