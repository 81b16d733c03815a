//! The tests of the rules. A simulated device with a write-back cache does everything that such a device may do, one
//! step at a time. The states of this crate are compared with the contents that the device leaves. The device shares no
//! code with this crate.

use std::collections::HashSet;

use fastrand::Rng;

use crate::generator::Generator;
use crate::samples::{Operation, Sample};
use crate::state::{CrashState, MissingWrite};

const SECTORS: usize = 3;

/// The number of a version: 0 is the content from before the log, and entry `n` makes version `n + 1`. The zeroes of
/// each discard count as a version of their own.
type Version = u8;
type Content = [Version; SECTORS];

/// One sector of the device. The sets are bit masks of versions.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Sector {
    /// The version on the medium, and the discards since it was written.
    medium: Version,
    discarded: u16,
    /// The version in the cache, and the discards since it was written.
    cached: Option<Version>,
    discarded_in_cache: u16,
}

impl Sector {
    fn evict(&mut self) {
        if let Some(version) = self.cached.take() {
            self.medium = version;
            self.discarded = std::mem::take(&mut self.discarded_in_cache);
        }
    }

    fn write(&mut self, version: Version, fua: bool) {
        self.discarded |= std::mem::take(&mut self.discarded_in_cache);
        self.cached = Some(version);
        if fua {
            self.evict();
        }
    }

    fn discard(&mut self, version: Version) {
        match self.cached {
            Some(_) => self.discarded_in_cache |= 1 << version,
            None => self.discarded |= 1 << version,
        }
    }

    /// Returns the versions that the sector may have after a power cut.
    fn after_cut(&self) -> u16 {
        1 << self.medium | self.discarded | self.discarded_in_cache
    }
}

type Device = [Sector; SECTORS];

/// Returns the device after it has written some cached sectors to the medium: each possibility.
fn evictions(device: &Device) -> impl Iterator<Item = Device> {
    (0..1 << SECTORS).map(|subset| {
        let mut device = *device;
        for (place, sector) in device.iter_mut().enumerate() {
            if subset & 1 << place != 0 {
                sector.evict();
            }
        }
        device
    })
}

fn apply(device: &mut Device, operation: &Operation, version: Version) {
    if operation.flushes() {
        device.iter_mut().for_each(Sector::evict);
    }
    for sector in operation.sectors.clone() {
        match operation.is_discard() {
            true => device[sector as usize].discard(version),
            false => device[sector as usize].write(version, operation.is_fua()),
        }
    }
}

fn after_cut(device: &Device) -> Vec<Content> {
    let mut contents = vec![[0; SECTORS]];
    for (place, sector) in device.iter().enumerate() {
        let versions = (0..16).filter(|version| sector.after_cut() & 1 << version != 0);
        let with = |content: &Content, version| {
            let mut content = *content;
            content[place] = version;
            content
        };
        contents =
            versions.flat_map(|version| contents.iter().map(move |content| with(content, version))).collect();
    }
    contents
}

/// Returns the contents that the device can leave at each point of the log.
fn left_by_device(operations: &[Operation]) -> Vec<HashSet<Content>> {
    let mut devices = HashSet::from([Device::default()]);
    let mut left = Vec::new();
    for point in 0..=operations.len() {
        devices = devices.iter().flat_map(evictions).collect();
        left.push(devices.iter().flat_map(after_cut).collect());
        if let Some(operation) = operations.get(point) {
            let applied = devices.into_iter().map(|mut device| {
                apply(&mut device, operation, point as Version + 1);
                device
            });
            devices = applied.collect();
        }
    }
    left
}

/// Returns the content of a state.
fn content(operations: &[Operation], state: &CrashState) -> Content {
    let mut content = [0; SECTORS];
    for (entry, operation) in operations[..state.point].iter().enumerate() {
        for (place, sector) in operation.sectors.clone().enumerate() {
            let lacks = |write: &MissingWrite| {
                write.entry == entry && write.sectors.iter().any(|range| range.contains(&(place as u64)))
            };
            if !state.missing.iter().any(lacks) {
                content[sector as usize] = entry as Version + 1;
            }
        }
    }
    content
}

fn random_operations(random: &mut Rng) -> Vec<Operation> {
    (0..random.usize(1..7)).map(|_| Operation::random(random, SECTORS as u64)).collect()
}

#[test]
fn the_generator_makes_exactly_what_the_device_can_leave() {
    for seed in 0..60 {
        let operations = random_operations(&mut Rng::with_seed(seed));
        let left = left_by_device(&operations);
        let sample = Sample::new(&operations);
        let log = sample.log();
        let generator = Generator::new(&log, seed, &[operations.len() / 2]);
        let mut made: Vec<_> = left.iter().map(|_| HashSet::new()).collect();
        for number in 0..2_000_000 {
            let state = generator.state(number);
            state.check(&log).unwrap();
            made[state.point].insert(content(&operations, &state));
            if number % 1000 == 999 && made == left {
                break;
            }
        }
        for (point, (made, left)) in made.iter().zip(&left).enumerate() {
            let differing: Vec<_> = made.symmetric_difference(left).collect();
            assert!(differing.is_empty(), "{seed}, {point}: {differing:?} {operations:?}");
        }
    }
}

/// Returns every list of missing sectors at a point.
fn all_states(operations: &[Operation], point: usize) -> impl Iterator<Item = CrashState> {
    let numbered = operations[..point].iter().enumerate();
    let sectors = |operation: &Operation| 0..operation.sectors.end - operation.sectors.start;
    let pairs: Vec<_> =
        numbered.flat_map(|(entry, one)| sectors(one).map(move |sector| (entry, sector))).collect();
    (0_u32..1 << pairs.len()).map(move |subset| {
        let chosen = pairs.iter().enumerate().filter(|(place, _)| subset & 1 << place != 0);
        let missing = chosen.map(|(_, (entry, sector))| MissingWrite::run(*entry, *sector..*sector + 1));
        CrashState { point, missing: missing.collect() }
    })
}

#[test]
fn the_check_accepts_exactly_what_the_device_can_leave() {
    let (mut accepted, mut refused) = (0, 0);
    for seed in 0..400 {
        let operations = random_operations(&mut Rng::with_seed(seed));
        let left = left_by_device(&operations);
        let log = Sample::new(&operations).log();
        for (point, left) in left.iter().enumerate() {
            for state in all_states(&operations, point) {
                let is_legal = left.contains(&content(&operations, &state));
                let verdict = state.check(&log);
                assert_eq!(verdict.is_ok(), is_legal, "{operations:?} {state:?} {verdict:?}");
                *(if is_legal { &mut accepted } else { &mut refused }) += 1;
            }
        }
    }
    assert!(accepted > 10_000 && refused > 10_000, "{accepted} {refused}");
}

#[test]
fn the_device_refuses_planted_faults() {
    use crate::samples::{discard, flush, write};
    let cases = [
        // A flushed write is missing.
        (vec![write(0, 2), flush(), write(2, 1)], MissingWrite::run(0, 1..2)),
        // A write with the flag FUA is missing.
        (vec![write(0, 3), write(1, 2).fua()], MissingWrite::run(1, 0..1)),
        // A write from before a flush is missing below a discard that is missing as well.
        (vec![write(0, 3), flush(), discard(0, 1)], MissingWrite::run(0, 0..3)),
        // A write that flushes makes those before it durable.
        (vec![write(0, 1), write(1, 1).flushing()], MissingWrite::run(0, 0..1)),
    ];
    for (operations, planted) in cases {
        let state = CrashState { point: operations.len(), missing: vec![planted] };
        assert!(
            !left_by_device(&operations)[state.point].contains(&content(&operations, &state)),
            "{state:?}"
        );
        state.check(&Sample::new(&operations).log()).unwrap_err();
    }
}
