//! The states in which a power cut can leave a disk, made from a log of the disk's writes. Thousands of states are made
//! from one boot, and are judged without another boot.
//!
//! # The log
//!
//! The log has the format of the kernel's dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst).
//! QEMU's filter `blklogwrites` writes it. The filter logs an operation after the operation has completed
//! (block/blklogwrites.c), so the order of the entries is the order of completion. QEMU 7.2 never sets the flag FUA. It
//! flushes after a write with FUA instead, and logs this flush.
//!
//! # Which states are legal
//!
//! A power cut at point `k` leaves the operations of the entries before `k`. The disk has a volatile cache, with the
//! semantics of the kernel's Documentation/block/writeback_cache_control.rst:
//!
//! - A flush makes all writes durable that have completed before it. A write that carries the flag FLUSH makes the writes
//!   before it durable, but not itself.
//! - A write with the flag FUA is durable itself. Other writes are not affected.
//! - The cache is coherent for each sector of 512 bytes. After the cut, a sector has its last durable version or any
//!   later one, independently of the other sectors. This includes each subset of the writes, each order in which the
//!   device may have written them, and torn writes. An older version never replaces a durable one.
//! - A discarded sector is indeterminate until it is written again. It has the content from before the discard, or
//!   zeroes. A flush does not settle which one. A write of zeroes is an ordinary write.
//!
//! A [`CrashState`] names the sectors of operations that are missing. The other operations are applied in the order of
//! the log, so the last operation on a sector that is not missing determines the sector's content. Each legal content of
//! a sector is the version of one operation, and is made if exactly the later operations on this sector are missing.
//! Therefore each legal state of the disk has such a list, and a list is legal if no sector has a version from before
//! its last durable write ([`CrashState::check`]).
//!
//! Two kinds of states that a device could leave are not made. A write that completes while a flush is in flight counts
//! as durable, although the flush need not include it. A write that has not completed is absent, although a part of it
//! may be on the disk. The states that are made are legal even so.
//!
//! The modules, each of which uses only those before it:
//!
//! ```text
//! versions log view state
//! generator shrink
//! disk
//! structures journal extents replay recovered
//! names records blame
//! ```

mod blame;
mod disk;
mod extents;
#[cfg(all(test, feature = "real"))]
mod file_systems;
mod generator;
mod journal;
mod log;
#[cfg(test)]
mod model;
mod names;
mod records;
mod recovered;
mod replay;
#[cfg(test)]
mod samples;
mod shrink;
mod state;
mod structures;
mod versions;
mod view;

pub use blame::{NO_FILE, describe};
pub use disk::{BaseDisk, Change, StateDisk};
pub use generator::Generator;
pub use log::{Entry, EntryKind, WriteLog, completed_entries};
pub use shrink::shrink;
pub use state::{CrashState, MissingWrite};

/// The unit in which a device writes atomically, in bytes.
pub const SECTOR: u64 = 512;
