//! The findings about the cache, the free disk space and memory, the clock, and the files of dead runs.

use super::finding::Finding;
use crate::cache::{CACHE_VARIABLE, Unusable};
use crate::format::gib;
use crate::host::facts::{Built, Facts};

pub(crate) const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The disk space in bytes for an image, a run's overlay, and the temporary files of an image build.
const DISK_TO_BUILD: u64 = 4 * GIB;
/// The disk space in bytes for a run's overlay and a snapshot.
const DISK_TO_RUN: u64 = 2 * GIB;
/// The disk space in bytes for a downloaded image, which is unpacked to list its libraries.
const DISK_TO_UNPACK: u64 = 2 * GIB;
/// The memory in bytes that QEMU needs in addition to the guest's memory.
pub(crate) const MEMORY_BESIDE: u64 = 512 * MIB;
/// The number of seconds by which the clock may be behind the build time of this program without a finding. File
/// systems and hosts round times.
const CLOCK_SLACK: u64 = 3600;

pub(super) fn evaluate(facts: &Facts, findings: &mut Vec<Finding>) {
    findings.extend(cache(facts));
    findings.extend(disk(facts));
    if !facts.is_on_daemon {
        findings.extend(direct_io(facts));
        findings.extend(memory(facts));
    }
    findings.extend(clock(facts));
    let dead = &facts.host.dead_runs;
    if !dead.is_empty() {
        let sentence = format!("{} run(s) died and left files", dead.len());
        let remedy = "no action is needed: the next smoke ends their processes and deletes their files";
        findings.push(Finding::informs("stale-run", sentence, dead.join(", ")).with(remedy));
    }
}

fn cache(facts: &Facts) -> Option<Finding> {
    let set = |why: &str| format!("set {CACHE_VARIABLE} to {why}");
    let own = set("choose a directory of this user");
    match (&facts.host.cache, &facts.host.cache_access) {
        (Ok(_), Ok(())) => None,
        (Err(error @ Unusable::TooLong(..)), _) => {
            let sentence = "the cache's path is too long for the sockets of libvirt";
            Some(Finding::blocks("cache-path", sentence, error.to_string(), set("a shorter directory")))
        }
        (Err(error), _) => {
            let sentence = match error {
                Unusable::Nowhere => "no directory for the cache is known",
                _ => "the cache cannot be used",
            };
            Some(Finding::blocks("cache", sentence, error.to_string(), error.remedy()))
        }
        (Ok(cache), Err(error)) => {
            let cache = cache.display();
            let sentence = format!("this user, which is also QEMU's user, may not use the cache {cache}");
            Some(Finding::blocks("cache-access", sentence, error, own))
        }
    }
}

fn disk(facts: &Facts) -> Option<Finding> {
    let (cache, free) = (facts.host.cache.as_ref().ok()?, facts.host.free_disk?);
    let download = facts.guest.download.map_or(0, |bytes| bytes + DISK_TO_UNPACK);
    let build = if facts.guest.built == Built::No { 0 } else { DISK_TO_BUILD };
    let needed = build.max(download + DISK_TO_RUN);
    (free < needed).then(|| {
        let sentence = format!("{} free for images and runs, {} needed", gib(free), gib(needed));
        let remedy =
            format!("free space (cargo xtask image prune), or set {CACHE_VARIABLE} to a larger file system");
        Finding::blocks("disk", sentence, cache.display().to_string(), remedy)
    })
}

fn memory(facts: &Facts) -> Option<Finding> {
    let (free, asked) = (facts.host.free_memory.as_ref()?, facts.guest.machine.memory);
    let needed = asked * MIB + MEMORY_BESIDE;
    (free.bytes < needed).then(|| {
        let (bytes, needed) = (gib(free.bytes), gib(needed));
        let sentence = format!(
            "{bytes} of memory available, {needed} wanted for QEMU and a guest with --memory {asked}"
        );
        let remedy = "close other programs, or use a smaller guest: --memory 1024";
        Finding::degrades("memory", sentence, &free.source, remedy)
    })
}

/// Returns a finding if the cache's file system refuses O_DIRECT. QEMU then does not open the guest's disks.
fn direct_io(facts: &Facts) -> Option<Finding> {
    let error = facts.host.direct_io.as_ref().err()?;
    let sentence = "QEMU cannot use disks in the cache, because its file system does not support O_DIRECT";
    let remedy = format!(
        "set {CACHE_VARIABLE} to a directory on a disk, with a file system such as ext4, XFS or Btrfs"
    );
    Some(Finding::blocks("cache-direct", sentence, error, remedy))
}

/// Returns a finding if the clock is behind the time at which this program was built. Certificates and package indexes
/// then appear to be from the future and are rejected.
fn clock(facts: &Facts) -> Option<Finding> {
    let (now, built) = (facts.host.now, facts.host.built);
    (now + CLOCK_SLACK < built).then(|| {
        let hours = (built - now) / 3600;
        let sentence = format!("this machine's clock is {hours} hours behind this program's own file");
        let evidence = format!("{now} s since 1970, and the file was written at {built} s");
        Finding::blocks("clock", sentence, evidence, "set the clock: timedatectl set-ntp true, or date --set")
    })
}
