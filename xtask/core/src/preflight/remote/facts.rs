//! The facts about the libvirt that `--connect` names. `xtask-vm` gathers them.

use super::capabilities::{DomainOffer, GuestOffer};
use super::refusal::Refusal;
use crate::arch::VmArchitecture;
use crate::libvirt_uri::ConnectUri;

/// The facts about one libvirt.
#[derive(Debug, Clone)]
pub struct ConnectionFacts {
    pub uri: ConnectUri,
    /// The capabilities of this libvirt, or the reason why it could not be queried.
    pub answer: Result<ConnectionOffer, Refusal>,
}

/// The capabilities of a libvirt that answers. If a query failed, `Err` contains libvirt's message.
#[derive(Debug, Clone)]
pub struct ConnectionOffer {
    /// The rights of this user.
    pub access: Access,
    /// The name and the version of the hypervisor: `QEMU 7.2.22`.
    pub hypervisor: Result<String, String>,
    pub libvirt: Result<String, String>,
    pub host_name: Result<String, String>,
    pub node: Result<Node, String>,
    /// The memory in bytes that a new guest can have on that host without swapping.
    pub free_memory: Result<u64, String>,
    /// The kinds of guests that this libvirt runs.
    pub guests: Result<Vec<GuestOffer>, String>,
    /// The features of a guest of each requested architecture. An architecture that this libvirt does not run is not in
    /// the list. If this user has read-only access, the list is empty.
    pub domains: Vec<(VmArchitecture, Result<DomainOffer, String>)>,
    /// The network of `--network nat:NAME`, or the network `default`. `None` if it does not exist.
    pub network: Result<Option<Network>, String>,
    /// The storage pool of `--pool`, or the pool `default`. `None` if it does not exist.
    pub pool: Result<Option<Pool>, String>,
}

/// The rights of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// The user may start guests.
    Full,
    /// The user may only read. The text is the reason.
    ReadOnly(String),
}

impl ConnectionOffer {
    /// Returns the features of a guest of this architecture, if they are known.
    pub fn domain(&self, arch: VmArchitecture) -> Option<&DomainOffer> {
        self.domains.iter().find(|(of, _)| *of == arch)?.1.as_ref().ok()
    }

    /// Returns the kind of guests of this architecture, if this libvirt runs such guests.
    pub fn guest(&self, arch: VmArchitecture) -> Option<&GuestOffer> {
        self.guests.as_ref().ok()?.iter().find(|guest| guest.machine == arch.profile().machine)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// The architecture of the processors, in libvirt's notation.
    pub machine: String,
    pub cpus: u32,
    /// The memory in bytes.
    pub memory: u64,
}

/// A virtual network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// True if guests can use it now.
    pub active: bool,
    /// True if the network starts with the host.
    pub autostart: bool,
}

/// A storage pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// True if guests can use it now.
    pub active: bool,
    /// The free space in bytes; 0 if the pool is not active.
    pub free: u64,
}
