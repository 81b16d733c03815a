//! Walks over the code to find the functions that ask the processor, those that read the answers, and the calls between
//! functions.

use std::collections::BTreeSet;

use super::Use;
use super::detection::{Detection, HWCAPS};
use super::pointers::Pointers;
use crate::functions::Section;
use crate::isa::Event;

/// The result of the walks over the code, for each function.
#[derive(Debug)]
pub(crate) struct Graph {
    /// True if the function asks the processor, or reads the answer.
    decides: Vec<bool>,
    /// True if the function branches on a variable at a fixed address.
    tests: Vec<bool>,
    /// True if the function calls a function that asks the processor. It may then act on the answer.
    callers: Vec<bool>,
    reachable: Vec<bool>,
    guarded: Vec<bool>,
    complete: bool,
}

impl Graph {
    /// Walks over the code to find the functions that ask the processor, the variables that hold the answers, and the
    /// functions that read these variables.
    pub(crate) fn of(section: &Section<'_, '_>, detection: &Detection) -> Self {
        let count = section.functions.len();
        let mut asks = vec![false; count];
        let stubs = stubs(section, detection);
        let told = |to: u64, argument: Option<u32>| {
            let known = detection.sources.contains(&to) || stubs.contains(&to);
            let matters = detection.with_argument.contains(&to) || stubs.contains(&to);
            known && (!matters || argument.is_none_or(|argument| HWCAPS.contains(&argument)))
        };
        for resolver in &detection.resolvers {
            if let Some(function) = section.functions.at(*resolver) {
                asks[function] = true;
            }
        }
        walk(section, |function, event| {
            asks[function] |= match event {
                Event::Detects => true,
                Event::Call { to, argument } | Event::Jump { to, argument } => told(to, argument),
                Event::CallThrough { place, argument } => {
                    detection.through.contains(&place)
                        && argument.is_none_or(|argument| HWCAPS.contains(&argument))
                }
                Event::Address(place) | Event::Load(place) | Event::Tests(place) => {
                    detection.sources.contains(&place) || detection.through.contains(&place)
                }
                Event::Store(_) => false,
            };
        });
        let pointers = Pointers::of(section.elf);
        let (written, callers) = written(section, &asks, &pointers);
        let mut graph = Self {
            decides: asks,
            tests: vec![false; count],
            callers,
            reachable: vec![false; count],
            guarded: vec![false; count],
            complete: true,
        };
        graph.connect(section, &written, &pointers);
        graph
    }

    /// Finds the functions that read the answers, and the calls between functions; then computes the functions that
    /// calls reach.
    fn connect(&mut self, section: &Section<'_, '_>, written: &Written, pointers: &Pointers<'_, '_>) {
        let Section { elf, code, functions, .. } = *section;
        let most = code.bytes.len() / 8;
        let mut edges: Vec<(u32, u32)> = Vec::new();
        let (decides, tests, complete) = (&mut self.decides, &mut self.tests, &mut self.complete);
        walk(section, |function, event| {
            let to = match event {
                Event::Call { to, .. } | Event::Jump { to, .. } => to,
                Event::Address(to) => {
                    decides[function] |= written.holds(to);
                    to
                }
                Event::Load(place) | Event::Tests(place) => {
                    decides[function] |= written.holds(place);
                    tests[function] |= matches!(event, Event::Tests(_)) && elf.is_variable(place);
                    match pointers.at(place).filter(|_| !elf.is_variable(place)) {
                        Some(address) => {
                            decides[function] |= written.holds(address);
                            address
                        }
                        None => return,
                    }
                }
                _ => return,
            };
            let Some(callee) = functions.beginning_at(to) else { return };
            let edge = (function as u32, callee as u32);
            if callee == function || edges.last() == Some(&edge) {
                return;
            }
            if edges.len() < most {
                edges.push(edge);
            } else {
                *complete = false;
            }
        });
        edges.sort_unstable();
        self.reach(section, &edges);
    }

    fn reach(&mut self, section: &Section<'_, '_>, edges: &[(u32, u32)]) {
        let Section { elf, functions, .. } = *section;
        let of = |function: u32| {
            let start = edges.partition_point(|edge| edge.0 < function);
            edges[start..].iter().take_while(move |edge| edge.0 == function).map(|edge| edge.1)
        };
        let flood = |marks: &mut Vec<bool>, from: Vec<u32>, stops: &[bool], ends: &[bool]| {
            let mut pending = from;
            while let Some(function) = pending.pop() {
                if ends.get(function as usize) == Some(&true) {
                    continue;
                }
                for callee in of(function) {
                    if !marks[callee as usize] && !stops[callee as usize] {
                        marks[callee as usize] = true;
                        pending.push(callee);
                    }
                }
            }
        };
        let mut roots: Vec<u32> = Vec::new();
        let mut root = |address: u64, reachable: &mut Vec<bool>| {
            if let Some(function) = functions.at(address).filter(|function| !self.decides[*function]) {
                reachable[function] = true;
                roots.push(function as u32);
            }
        };
        // A library is entered by the program that loads it. That program may have asked the processor before.
        if !elf.is_library() {
            root(elf.entry(), &mut self.reachable);
            for symbol in elf.symbols().filter(|symbol| symbol.name == b"main") {
                root(symbol.address, &mut self.reachable);
            }
        }
        let decides = std::mem::take(&mut self.decides);
        // A static executable contains its C library. The start code of that library reads the features that the
        // kernel passes, but calls no function of a known name for that. Any test of a variable may therefore be a
        // test of the answer.
        let is_static = elf.dynamic.needed().next().is_none();
        let ends = self.callers.iter().zip(&self.tests).map(|(calls, tests)| *calls || is_static && *tests);
        let ends: Vec<bool> = ends.collect();
        flood(&mut self.reachable, roots, &decides, &ends);
        let deciding = (0..decides.len() as u32).filter(|function| decides[*function as usize]).collect();
        flood(&mut self.guarded, deciding, &self.reachable, &[]);
        self.decides = decides;
    }

    /// Returns whether the function branches on a variable at a fixed address.
    pub(crate) fn tests(&self, function: usize) -> bool {
        self.tests[function]
    }

    /// Returns whether there is no function that asks the processor or reads its answer.
    pub(crate) fn nobody_asks(&self) -> bool {
        !self.decides.contains(&true)
    }

    /// Returns the use of a function, as far as it is known.
    pub(crate) fn used(&self, function: usize) -> Use {
        if self.decides[function] {
            Use::Guarded("it asks the processor, or reads the answer")
        } else if self.reachable[function] {
            let may_be_told = self.tests[function] || self.callers[function];
            if may_be_told || !self.complete { Use::Unclear } else { Use::Plain }
        } else if self.guarded[function] {
            Use::Guarded("only a function that asks the processor leads to it")
        } else {
            Use::Unclear
        }
    }
}

/// Calls `each` for every event, with the function in which it happens.
fn walk(section: &Section<'_, '_>, mut each: impl FnMut(usize, Event)) {
    let Section { isa, code, functions, .. } = *section;
    for function in 0..functions.len() {
        let (start, end) = functions.range(function);
        let Some(body) = code.bytes.get(start..end) else { continue };
        isa.events(body, code.address + start as u64, |_, event| each(function, event));
    }
}

/// Returns the first function that computes an address.
pub(crate) fn first_user(section: &Section<'_, '_>, address: u64) -> Option<usize> {
    let mut user = None;
    walk(section, |function, event| {
        if event == Event::Address(address) {
            user = user.or(Some(function));
        }
    });
    user
}

/// Returns the places in which answers of the processor are stored, and the direct callers of functions that ask. A
/// function that asks may write the answer to a variable, or to a structure whose address it computes. It may also
/// return the answer, which its caller then writes to a variable.
fn written(section: &Section<'_, '_>, asks: &[bool], pointers: &Pointers<'_, '_>) -> (Written, Vec<bool>) {
    let Section { elf, functions, .. } = *section;
    const MOST: usize = 4096;
    // In Rust's `std_detect`, three functions in a row return the answer to their callers.
    const RETURNS: usize = 3;
    let mut written = Written::default();
    let mut told = asks.to_vec();
    let mut direct = Vec::new();
    for level in 0..=RETURNS {
        let mut callers = vec![false; told.len()];
        walk(section, |function, event| {
            let (place, whole) = match event {
                Event::Call { to, .. } | Event::Jump { to, .. } => {
                    let callee = functions.beginning_at(to);
                    callers[function] |= callee.is_some_and(|callee| told[callee]);
                    return;
                }
                Event::Store(place) => (Some(place), false),
                Event::Address(place) if level == 0 => (Some(place), true),
                Event::Load(place) if level <= 1 && !elf.is_variable(place) => (pointers.at(place), true),
                _ => return,
            };
            let count = written.variables.len() + written.structures.len();
            let place = place.filter(|place| told[function] && count < MOST && elf.is_variable(*place));
            if whole {
                written.structures.extend(place);
            } else {
                written.variables.extend(place);
            }
        });
        if level == 0 {
            direct.clone_from(&callers);
        }
        told = callers;
    }
    (written, direct)
}

/// The places in which the processor's features are stored.
#[derive(Debug, Default)]
struct Written {
    /// Variables that are written at a known address.
    variables: BTreeSet<u64>,
    /// Structures that are written through their address.
    structures: BTreeSet<u64>,
}

impl Written {
    /// Returns whether a place is in one of these variables or structures. The size of a structure is not known.
    fn holds(&self, place: u64) -> bool {
        const LARGEST: u64 = 32;
        let near = place.saturating_sub(LARGEST)..=place;
        self.variables.contains(&place) || self.structures.range(near).next().is_some()
    }
}

/// Returns the stubs that load from one of the wanted places. Functions of other libraries are called through stubs. A
/// stub begins up to two instructions before the load, with a landing pad or with the computation of the page's
/// address.
fn stubs(section: &Section<'_, '_>, detection: &Detection) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    for name in [&b".plt"[..], b".plt.sec", b".plt.got"] {
        let Some(stubs) = section.elf.section(name) else { continue };
        section.isa.events(stubs.bytes, stubs.address, |at, event| {
            let place = match event {
                Event::Load(place) | Event::CallThrough { place, .. } => place,
                _ => return,
            };
            if detection.through.contains(&place) {
                found.extend([at, at.wrapping_sub(4), at.wrapping_sub(8)]);
            }
        });
    }
    found
}
