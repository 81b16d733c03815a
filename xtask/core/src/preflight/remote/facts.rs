//! What was seen of another libvirt.

use super::capabilities::{DomainOffer, GuestOffer};
use super::refusal::Refusal;
use crate::arch::VmArchitecture;
use crate::libvirt_uri::ConnectUri;

/// The network and the storage pool that libvirt's tools use where none is named.
pub const DEFAULT: &str = "default";

/// What was seen of one libvirt.
#[derive(Debug, Clone)]
pub struct ConnectionFacts {
    pub uri: ConnectUri,
    /// What it offers, or why it could not be asked.
    pub answer: Result<ConnectionOffer, Refusal>,
}

/// What a libvirt that answers offers. `Err` holds the reason in libvirt's words.
#[derive(Debug, Clone)]
pub struct ConnectionOffer {
    /// What this user may do.
    pub access: Access,
    /// Its driver and the version of that driver's hypervisor: `QEMU 7.2.22`.
    pub hypervisor: Result<String, String>,
    /// libvirt's version there.
    pub libvirt: Result<String, String>,
    pub host_name: Result<String, String>,
    pub node: Result<Node, String>,
    /// Bytes that a new guest may have there without swapping.
    pub free_memory: Result<u64, String>,
    /// What kinds of guests it runs.
    pub guests: Result<Vec<GuestOffer>, String>,
    /// What a guest of each asked architecture could have there; those alone that it runs at all, and none
    /// where this user may only look.
    pub domains: Vec<(VmArchitecture, Result<DomainOffer, String>)>,
    /// The network [`DEFAULT`], `None` where there is none.
    pub network: Result<Option<Network>, String>,
    /// The storage pool [`DEFAULT`], `None` where there is none.
    pub pool: Result<Option<Pool>, String>,
}

/// What a user may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Start guests.
    Full,
    /// Look; the reason why not more.
    ReadOnly(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its processors' architecture, as libvirt calls it.
    pub machine: String,
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
}

/// A virtual network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// Whether guests can use it now.
    pub active: bool,
    /// Whether it starts with the host.
    pub autostart: bool,
}

/// A storage pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Whether guests can use it now.
    pub active: bool,
    /// Free bytes; 0 where it is not active.
    pub free: u64,
}
