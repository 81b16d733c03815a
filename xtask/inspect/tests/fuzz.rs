//! Tests with malformed input. For any bytes, the inspection ends soon and without a panic, takes no more memory than
//! the file has bytes (and 1 MiB), and gives a reason if it refuses the file. The gate runs this test for 20 s, and
//! `cargo xtask soak --fuzz N` runs it for N executions.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use inspect::device::{self, Device};
use inspect::inventory::{Inventory, Library};
use inspect::isa::Isa;
use inspect::{Offers, Page, Target};

/// The environment variable with the number of executions. Without it, the test runs for [`GATE`].
const EXECUTIONS: &str = "INSPECT_FUZZ_EXECUTIONS";
/// The environment variable with a directory of seeds, which are used in addition to those of this file.
const SEEDS: &str = "INSPECT_FUZZ_SEEDS";
/// The environment variable with the directory for an input on which the inspection misbehaved.
const KEPT: &str = "INSPECT_FUZZ_KEPT";

const GATE: Duration = Duration::from_secs(20);
/// Upper bound for one execution.
const LONGEST: Duration = Duration::from_secs(2);
/// Memory for a report, the decoders' tables and the threads' stacks, regardless of the file's size.
const FIXED: usize = 1 << 20;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static STARTED: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system allocator. The counters do not touch the memory that it returns.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`, which is that of the system allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `dealloc`, which is that of the system allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The random number generator xorshift64*. The same seed gives the same inputs.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Returns the seeds. The code for A64 has SVE, LSE, PAC and calls. The code for x86-64 has AVX, CPUID and jumps.
fn seeds() -> Vec<(Isa, Vec<u8>)> {
    let a64: Vec<u8> = [
        0x9400_0004u32,
        0xd503_201f,
        0xd65f_03c0,
        0x0000_0000,
        0x04e0_e3e0,
        0xb8e0_0020,
        0xd65f_0bff,
        0x0000_0000,
        0x9000_0000,
        0x9100_4000,
        0x3940_0001,
        0x3400_0041,
        0xd538_0600,
        0x1400_0001,
        0x54ff_ffe0,
        0xd61f_0200,
        0x2538_c000,
        0xc080_0000,
        0x1908_3020,
        0xdac1_1be9,
    ]
    .iter()
    .flat_map(|word| word.to_le_bytes())
    .collect();
    let x86 = b"\xe8\x0b\0\0\0\xc3\x66\x90\x66\x90\x66\x90\x66\x90\x66\x90\xc5\xfe\x6f\x05\x10\0\0\0\xc3\x0f\xa2\x80\x3d\x10\0\0\
                \0\0\x74\x02\x62\xf1\x7c\x48\x58\xc1\xc3\xf3\x0f\xb8\xc1\xeb\xf0\xff\x25\x10\0\0\0\x48\x8d\x05\x20\0\0\0\xc3\x90";
    let mut seeds =
        vec![(Isa::Aarch64, support::executable(183, &a64)), (Isa::X86_64, support::executable(62, x86))];
    // Add each seed without its section headers. The inspection then takes the number of symbols from the hash table,
    // and all executable segments as code.
    for at in 0..seeds.len() {
        let (isa, mut bytes) = seeds[at].clone();
        bytes[40..48].fill(0);
        bytes[58..64].fill(0);
        seeds.push((isa, bytes));
    }
    if let Some(directory) = std::env::var_os(SEEDS) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            let isa = if bytes.get(18) == Some(&62) { Isa::X86_64 } else { Isa::Aarch64 };
            seeds.push((isa, bytes));
        }
    }
    seeds
}

/// Makes one to eight changes: bits, numbers in headers and tables, moved pieces, a cut end.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(8) {
        let length = bytes.len();
        if length == 0 {
            return;
        }
        // Faults in headers and tables matter most. Half of the changes are therefore in the first KiB or in the last
        // 1.5 KiB.
        let at = match random.below(4) {
            0 => random.below(length.min(1024)),
            1 => length - 1 - random.below(length.min(1536)),
            _ => random.below(length),
        };
        match random.below(8) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2..=4 => {
                let (at, width) = (at & !7, [2, 4, 8][random.below(3)]);
                let end = (at + width).min(length);
                let number = number(random, length).to_le_bytes();
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            5 => {
                let size = random.below(256).min(length - at);
                let from = random.below(length - size + 1);
                bytes.copy_within(from..from + size, at);
            }
            6 if random.below(4) == 0 => bytes.truncate(at),
            _ => {
                let end = (at + random.below(16)).min(length);
                let value = [0, 0xff, 0x7f, 0x80][random.below(4)];
                bytes[at..end].fill(value);
            }
        }
    }
}

fn number(random: &mut Random, length: usize) -> u64 {
    let length = length as u64;
    let known = [
        0,
        1,
        2,
        3,
        7,
        8,
        0xffff,
        1 << 16,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 32,
        1 << 62,
        1 << 63,
        u64::MAX,
    ];
    match random.below(4) {
        0 => known[random.below(known.len())],
        1 => known[random.below(known.len())].wrapping_neg(),
        2 => length.wrapping_add(random.below(32) as u64).wrapping_sub(16),
        _ => random.next() % (2 * length + 1),
    }
}

fn target<'a>(device: &'a Device, inventory: &'a Inventory) -> Target<'a> {
    let pages = [4096, 16384].map(|bytes| Page { bytes, whose: "a test".to_owned(), certain: bytes == 4096 });
    Target {
        pages: pages.to_vec(),
        offers: Offers::Inventory(inventory),
        place: "a test".to_owned(),
        ..Target::new("the target", "/lib/ld-linux-aarch64.so.1", device)
    }
}

fn inventory() -> Inventory {
    let libc = Library {
        path: "/lib/libc.so.6".to_owned(),
        machine: 183,
        versions: vec!["GLIBC_2.17".to_owned(), "GLIBC_2.34".to_owned()],
        ..Library::default()
    };
    let (search, interpreters) = (vec!["/lib".to_owned()], vec!["/lib/ld-linux-aarch64.so.1".to_owned()]);
    Inventory { search, interpreters, libraries: vec![libc], ..Inventory::default() }
}

/// Inspects an input. If the inspection panics, takes too much time or memory, or refuses the input without a reason,
/// keeps the input and panics.
fn execute(bytes: &[u8], target: &Target<'_>) -> Duration {
    PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
    let before = LIVE.load(Ordering::Relaxed);
    let started = Instant::now();
    let report = std::panic::catch_unwind(AssertUnwindSafe(|| inspect::inspect(bytes, target)));
    let taken = started.elapsed();
    let used = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    let fault = match report {
        Err(_) => Some("it panicked".to_owned()),
        Ok(_) if taken > LONGEST => Some(format!("it took {taken:?}")),
        Ok(_) if used > bytes.len() + FIXED => {
            Some(format!("it took {used} bytes of memory for {} of input", bytes.len()))
        }
        Ok(report) if report.refused().any(|finding| finding.found.is_empty()) => {
            Some("it gave no reason".to_owned())
        }
        Ok(_) => None,
    };
    if let Some(fault) = fault {
        let directory = std::env::var_os(KEPT).unwrap_or_else(|| std::env::temp_dir().into_os_string());
        let path = Path::new(&directory).join("inspect-fuzz-input");
        std::fs::write(&path, bytes).unwrap();
        panic!("{fault}; the input is {}", path.display());
    }
    taken
}

/// Ends the process if an execution hangs. A test that hangs would not show which execution it is.
fn watch() {
    std::thread::spawn(|| {
        let mut seen = (0, Instant::now());
        loop {
            std::thread::sleep(LONGEST / 4);
            let count = STARTED.load(Ordering::Relaxed);
            if count != seen.0 {
                seen = (count, Instant::now());
            } else if count > 0 && seen.1.elapsed() > LONGEST * 10 {
                eprintln!("execution {count} does not end");
                std::process::abort();
            }
        }
    });
}

#[test]
fn whatever_the_bytes_are_the_inspection_ends_with_a_reason() {
    let wanted: Option<u64> = std::env::var(EXECUTIONS).ok().map(|text| text.parse().unwrap());
    let seeds = seeds();
    let inventory = inventory();
    let devices = [
        device::find(Isa::Aarch64, "generic-v8.0").unwrap(),
        device::find(Isa::X86_64, "x86-64-v1").unwrap(),
    ];
    let targets = devices.each_ref().map(|device| target(device, &inventory));
    for (isa, bytes) in &seeds {
        execute(bytes, &targets[usize::from(*isa == Isa::X86_64)]);
    }
    watch();
    let first = 0x9e37_79b9_7f4a_7c15 ^ wanted.map_or(0, |_| std::process::id().into());
    let (mut random, started) = (Random(first), Instant::now());
    let (mut count, mut longest) = (0u64, Duration::ZERO);
    let mut input = Vec::new();
    while wanted.map_or(started.elapsed() < GATE, |wanted| count < wanted) {
        let (isa, seed) = &seeds[random.below(seeds.len())];
        input.clear();
        input.extend_from_slice(seed);
        mutate(&mut input, &mut random);
        count += 1;
        STARTED.store(count, Ordering::Relaxed);
        longest = longest.max(execute(&input, &targets[usize::from(*isa == Isa::X86_64)]));
    }
    println!("{count} executions from seed {first:#x}, the longest took {longest:?}");
    assert!(count > 1000, "only {count} executions");
}

#[test]
fn every_length_of_a_sound_file_is_refused_with_a_reason_or_is_whole() {
    let inventory = inventory();
    let device = device::find(Isa::Aarch64, "pi5").unwrap();
    let target = target(&device, &inventory);
    let (_, whole) = seeds().swap_remove(0);
    let report = inspect::inspect(&whole, &target);
    assert!(report.refused().all(|finding| finding.id == "instructions"), "{report:#?}");
    for length in 0..whole.len() {
        let report = inspect::inspect(&whole[..length], &target);
        let malformed =
            report.refused().any(|finding| finding.id == "malformed" && !finding.found.is_empty());
        // The section headers are at the end, and nothing that is loaded follows them.
        let only_sections = report.findings.iter().any(|finding| finding.id == "sections");
        assert!(malformed || only_sections, "cut at {length} of {}: {report:#?}", whole.len());
    }
}
