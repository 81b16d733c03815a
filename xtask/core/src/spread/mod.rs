//! Spreads the smokes of one call over hosts: how many guests a host runs at the same time, and which smoke starts
//! where and when. [`table`] shows how the smokes ended. This module has no side effects.

pub mod table;

use std::ffi::OsString;

use crate::arch::VmArchitecture;
use crate::cli::MachineArgs;
use crate::error::Verdict;
use crate::preflight::findings::{MEMORY_BESIDE, MIB};
use crate::report::past::PastRun;

/// Returns how many guests a host runs at the same time without sharing its processors or its memory between them. It
/// is at least 1, because the check of the host has found that it can run a guest. `cpus` and `memory` (the free
/// memory in bytes) are `None` if libvirt does not report them. Such a host runs one guest.
pub fn capacity(cpus: Option<u32>, memory: Option<u64>, machine: &MachineArgs) -> usize {
    let (Some(cpus), Some(memory)) = (cpus, memory) else { return 1 };
    let by_memory = memory / (machine.memory * MIB + MEMORY_BESIDE);
    let by_cpus = u64::from(cpus / machine.vcpus.max(1));
    usize::try_from(by_memory.min(by_cpus).max(1)).unwrap_or(usize::MAX)
}

/// Returns the median duration, in seconds, of the verified runs of this architecture and image; `None` if there was
/// none.
pub fn expected(past: &[PastRun], arch: VmArchitecture, image: &str) -> Option<f64> {
    let is_same = |run: &&PastRun| {
        run.verdict == Verdict::Verified && run.arch == arch && run.image.as_deref() == Some(image)
    };
    let mut seconds: Vec<_> = past.iter().filter(is_same).map(|run| run.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied()
}

/// The smokes that wait for a host, and the hosts with their guests. Smokes and hosts are numbers from 0.
#[derive(Debug, Clone)]
pub struct Queue {
    /// The waiting smokes; the next one is the last.
    waiting: Vec<usize>,
    hosts: Vec<Occupied>,
}

#[derive(Debug, Clone, Copy)]
struct Occupied {
    running: usize,
    capacity: usize,
}

/// A smoke that starts now, and its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    pub smoke: usize,
    pub host: usize,
}

impl Queue {
    /// Makes the queue of smokes with these expected durations, on hosts with these capacities. The longest smoke
    /// starts first, so that it does not run alone at the end. A smoke of unknown duration may be the longest.
    pub fn new(expected: &[Option<f64>], capacities: &[usize]) -> Self {
        let mut waiting: Vec<_> = (0..expected.len()).collect();
        let seconds = |smoke: usize| expected[smoke].unwrap_or(f64::INFINITY);
        waiting.sort_by(|one, other| seconds(*other).total_cmp(&seconds(*one)));
        waiting.reverse();
        let hosts = capacities.iter().map(|capacity| Occupied { running: 0, capacity: *capacity }).collect();
        Self { waiting, hosts }
    }

    /// Takes the next smoke, if a host runs fewer smokes than its capacity. Of several such hosts, the one with the
    /// smallest load is chosen, and of these the largest.
    pub fn take(&mut self) -> Option<Start> {
        let free = self.hosts.iter().enumerate().filter(|(_, host)| host.running < host.capacity);
        // The comparison of two fractions by their products needs no rounding.
        let (host, _) = free.min_by(|(_, one), (_, other)| {
            let (load, other_load) = (one.running * other.capacity, other.running * one.capacity);
            load.cmp(&other_load).then(other.capacity.cmp(&one.capacity))
        })?;
        let smoke = self.waiting.pop()?;
        self.hosts[host].running += 1;
        Some(Start { smoke, host })
    }

    /// Records that a smoke has ended on this host.
    pub fn ended(&mut self, host: usize) {
        self.hosts[host].running = self.hosts[host].running.saturating_sub(1);
    }
}

/// The flags of a call that do not apply to its single smokes, and whether each has a value.
const OF_THE_CALL: [(&str, bool); 7] = [
    ("--arch", true),
    ("--image", true),
    ("--host", true),
    ("--connect", true),
    ("--report", true),
    ("--fix", false),
    ("--yes", false),
];

/// Returns the arguments of a call without the flags that name its smokes, its hosts, and the directory of its reports.
/// Preflight has already installed what is missing, so `--fix` is left out, too.
pub fn shared_arguments(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut shared = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        let text = argument.as_encoded_bytes();
        let is = |name: &str| text == name.as_bytes();
        let with_value =
            |name: &str| text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.starts_with(b"="));
        match OF_THE_CALL.iter().find(|(name, _)| is(name) || with_value(name)) {
            None => shared.push(argument),
            Some((name, true)) if is(name) => drop(arguments.next()),
            Some(_) => {}
        }
    }
    shared
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Report;

    #[test]
    fn a_host_has_room_for_as_many_guests_as_its_processors_and_its_memory_allow() {
        let gib = |count: u64| Some(count * 1024 * MIB);
        for (cpus, memory, vcpus, asked, guests) in [
            (Some(16), gib(64), 2, 2048, 8),
            (Some(16), gib(8), 2, 2048, 3),
            (Some(16), gib(5), 2, 2048, 2),
            (Some(7), gib(64), 2, 2048, 3),
            (Some(1), gib(64), 2, 2048, 1),
            (Some(16), gib(1), 2, 2048, 1),
            (Some(16), gib(64), 16, 2048, 1),
            (None, gib(64), 2, 2048, 1),
            (Some(16), None, 2, 2048, 1),
        ] {
            let machine = MachineArgs { vcpus, memory: asked, ..MachineArgs::default() };
            assert_eq!(capacity(cpus, memory, &machine), guests, "{cpus:?} {memory:?} {vcpus} {asked}");
        }
    }

    #[test]
    fn the_usual_duration_is_that_of_the_same_guest() {
        let run = |arch, image: &str, verdict, seconds| {
            let mut report = Report::begin("id", "2026-12-01T00:00:00Z", arch);
            (report.verdict, report.seconds) = (verdict, seconds);
            PastRun { image: Some(image.to_owned()), ..PastRun::from(&report) }
        };
        use VmArchitecture::{Aarch64, X86_64};
        let past = [
            run(Aarch64, "a", Verdict::Verified, 90.0),
            run(Aarch64, "a", Verdict::Verified, 60.0),
            run(Aarch64, "a", Verdict::Verified, 70.0),
            run(Aarch64, "a", Verdict::Failed, 500.0),
            run(Aarch64, "b", Verdict::Verified, 40.0),
            run(X86_64, "c", Verdict::Interrupted, 3.0),
        ];
        assert_eq!(expected(&past, Aarch64, "a"), Some(70.0));
        assert_eq!(expected(&past, Aarch64, "b"), Some(40.0));
        assert_eq!(expected(&past, X86_64, "a"), None);
        assert_eq!(expected(&past, X86_64, "c"), None);
    }

    /// Runs smokes with these durations, which are also the expected ones, except that 0 is unknown and lasts 5.
    /// Returns each start as SMOKE@HOST+SECOND, and the time at which the last smoke has ended.
    fn schedule(durations: &[u32], capacities: &[usize]) -> (String, u32) {
        let expected: Vec<_> =
            durations.iter().map(|seconds| (*seconds > 0).then_some(f64::from(*seconds))).collect();
        let mut queue = Queue::new(&expected, capacities);
        let (mut now, mut running, mut starts) = (0, Vec::<(u32, usize)>::new(), Vec::new());
        loop {
            while let Some(Start { smoke, host }) = queue.take() {
                starts.push(format!("{smoke}@{host}+{now}"));
                let seconds = if durations[smoke] == 0 { 5 } else { durations[smoke] };
                running.push((now + seconds, host));
            }
            running.sort_unstable();
            if running.is_empty() {
                return (starts.join(" "), now);
            }
            let (end, host) = running.remove(0);
            now = end;
            queue.ended(host);
        }
    }

    #[test]
    fn the_longest_smoke_starts_first_and_the_first_free_host_takes_the_next_one() {
        for (durations, capacities, starts, end) in [
            (&[][..], &[1][..], "", 0),
            (&[10], &[1], "0@0+0", 10),
            (&[10, 20], &[1], "1@0+0 0@0+20", 30),
            (&[10, 10, 10], &[1, 1], "0@0+0 1@1+0 2@0+10", 20),
            (&[10, 30, 20], &[1, 1], "1@0+0 2@1+0 0@1+20", 30),
            (&[10, 0, 20], &[1], "1@0+0 2@0+5 0@0+25", 35),
            // One guest on each host shares fewer processors than two guests on the larger one.
            (&[10, 10], &[1, 4], "0@1+0 1@0+0", 10),
            (&[10, 10, 10, 10], &[1, 2], "0@1+0 1@0+0 2@1+0 3@0+10", 20),
            (&[9, 8, 7, 6, 5], &[2, 2], "0@0+0 1@1+0 2@0+0 3@1+0 4@1+6", 11),
        ] {
            let found = schedule(durations, capacities);
            assert_eq!(found, (starts.to_owned(), end), "{durations:?} on {capacities:?}");
        }
    }

    #[test]
    fn a_smoke_has_the_flags_of_the_call_without_those_that_name_it() {
        for (line, shared) in [
            ("smoke --arch aarch64 --fsck --image=a --image b", "smoke --fsck"),
            ("-q smoke --host qemu:///system --memory 1024 --fix --yes", "-q smoke --memory 1024"),
            (
                "smoke --report /r --cold --report=/r --image-digest sha256:0",
                "smoke --cold --image-digest sha256:0",
            ),
            ("smoke --connect qemu:///system --network nat --pool p", "smoke --network nat --pool p"),
            ("smoke --agent --arch", "smoke --agent"),
        ] {
            let found = shared_arguments(line.split(' ').map(OsString::from));
            assert_eq!(found, shared.split(' ').map(OsString::from).collect::<Vec<_>>(), "{line}");
        }
    }
}
