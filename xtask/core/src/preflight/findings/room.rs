//! Where things are kept, how much room there is, the clock, and what dead runs left.

use super::finding::Finding;
use crate::cache::{CACHE_VARIABLE, Unusable};
use crate::format::gib;
use crate::host::facts::{Built, Facts};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// An image, a run's overlay, and what a build of an image has in hand.
const DISK_TO_BUILD: u64 = 4 * GIB;
/// An image and a run's overlay.
const DISK_TO_RUN: u64 = 2 * GIB;
/// QEMU itself, beside the guest's memory.
const MEMORY_BESIDE: u64 = 512 * MIB;
/// So far a clock may be behind the moment at which this program was built: file systems round, and so do hosts.
const CLOCK_SLACK: u64 = 3600;

pub(super) fn evaluate(facts: &Facts, findings: &mut Vec<Finding>) {
    findings.extend(cache(facts));
    findings.extend(disk(facts));
    findings.extend(memory(facts));
    findings.extend(clock(facts));
    let dead = &facts.host.dead_runs;
    if !dead.is_empty() {
        findings.push(
            Finding::informs(
                "stale-run",
                format!("{} run(s) died and left files", dead.len()),
                dead.join(", "),
            )
            .with("no action is needed: the next smoke ends their processes and deletes their files"),
        );
    }
}

fn cache(facts: &Facts) -> Option<Finding> {
    let set = |why: &str| format!("set {CACHE_VARIABLE} to {why}");
    let host = &facts.host;
    match (&host.cache, &host.cache_access) {
        (Ok(_), Ok(())) => None,
        (Err(error @ Unusable::TooLong(..)), _) => Some(Finding::blocks(
            "cache-path",
            "the cache's path is too long for the sockets of libvirt",
            error.to_string(),
            set("a shorter directory"),
        )),
        (Err(error), _) => Some(Finding::blocks(
            "cache",
            "no directory for the cache is known",
            error.to_string(),
            set("choose a directory of this user"),
        )),
        (Ok(cache), Err(error)) => Some(Finding::blocks(
            "cache-access",
            format!("this user, which is also QEMU's user, may not use the cache {}", cache.display()),
            error,
            set("choose a directory of this user"),
        )),
    }
}

fn disk(facts: &Facts) -> Option<Finding> {
    let (cache, free) = (facts.host.cache.as_ref().ok()?, facts.host.free_disk?);
    let needed = if facts.guest.built == Built::No { DISK_TO_RUN } else { DISK_TO_BUILD };
    if free >= needed {
        return None;
    }
    Some(Finding::blocks(
        "disk",
        format!("{} free for images and runs, {} needed", gib(free), gib(needed)),
        cache.display().to_string(),
        format!("free space (cargo xtask image prune), or set {CACHE_VARIABLE} to a larger file system"),
    ))
}

fn memory(facts: &Facts) -> Option<Finding> {
    let free = facts.host.free_memory?;
    let needed = facts.guest.machine.memory * MIB + MEMORY_BESIDE;
    if free >= needed {
        return None;
    }
    Some(Finding::degrades(
        "memory",
        format!("{} of memory available, {} wanted for the guest and QEMU", gib(free), gib(needed)),
        "MemAvailable in /proc/meminfo",
        "close other programs, or use a smaller guest: --memory 1024",
    ))
}

/// A clock that is behind makes every certificate and every package index one of the future.
fn clock(facts: &Facts) -> Option<Finding> {
    let (now, built) = (facts.host.now, facts.host.built);
    if now + CLOCK_SLACK >= built {
        return None;
    }
    Some(Finding::blocks(
        "clock",
        format!("this machine's clock is {} hours behind this program's own file", (built - now) / 3600),
        format!("{now} s since 1970, and the file was written at {built} s"),
        "set the clock: timedatectl set-ntp true, or date --set",
    ))
}
