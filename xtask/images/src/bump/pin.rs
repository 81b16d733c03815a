//! A pin: the file of an image for one architecture, with its URL and its digest.

use serde::Serialize;
use xtask_core::arch::VmArchitecture;
use xtask_core::digest::Digest;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Pin {
    pub(super) arch: VmArchitecture,
    pub(super) url: String,
    pub(super) digest: Digest,
    pub(super) bytes: Option<u64>,
}
