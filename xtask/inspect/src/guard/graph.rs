//! Finds the functions that ask the processor, those that read the answers, and the calls between functions.

use std::collections::{BTreeSet, VecDeque};

use super::Use;
use super::detection::Detection;
use super::facts::Facts;
use super::pointers::Pointers;
use crate::functions::Section;
use crate::isa::Event;

/// No function precedes this one on the path from the entry point.
const NOBODY: u32 = u32::MAX;

/// What the walk over the calls has found, for each function.
#[derive(Debug)]
pub(crate) struct Graph {
    facts: Facts,
    /// True if the function asks the processor, or reads the answer.
    decides: Vec<bool>,
    /// True if the function calls a function that asks the processor. It may then act on the answer.
    callers: Vec<bool>,
    /// True if calls from the entry point lead to the function, without a function that decides between them.
    reachable: Vec<bool>,
    /// True if a reachable function takes the function's address, or the address of one that calls it.
    taken: Vec<bool>,
    guarded: Vec<bool>,
    /// The reachable function through which the walk came to a function.
    parents: Vec<u32>,
    /// True if direct calls lead to the function from an entry point of the file, without a function that decides.
    entered: Vec<bool>,
    /// True if a function asks the processor for more than LSE.
    asks_for_more: bool,
}

impl Graph {
    /// Decodes the code once, and decides which functions a check guards. The functions in `chosen` are those that are
    /// chosen at run time according to their names.
    pub(crate) fn of(section: &Section<'_, '_>, detection: &Detection, chosen: &[u32]) -> Self {
        let pointers = Pointers::of(section.elf);
        let facts = Facts::of(section, detection, &pointers);
        let mut asks = facts.asks();
        for resolver in &detection.resolvers {
            if let Some(function) = section.functions.at(*resolver) {
                asks[function] = true;
            }
        }
        let asks_for_more = (0..asks.len()).any(|function| {
            let (start, end) = section.functions.range(function);
            let body = section.code.bytes.get(start..end).unwrap_or_default();
            asks[function] && !section.isa.asks_for_lse_only(body)
        });
        let (written, callers) = written(section, &asks, &facts, &pointers);
        let mut decides = asks;
        if !written.is_empty() {
            for (function, decides) in decides.iter_mut().enumerate() {
                *decides = *decides || facts.places(function).any(|place| written.holds(place));
            }
        }
        for (function, decides) in decides.iter_mut().enumerate() {
            *decides = *decides || asks_lazily(&facts, &callers, function);
        }
        let count = decides.len();
        let mut graph = Self {
            facts,
            decides,
            callers,
            reachable: vec![false; count],
            taken: vec![false; count],
            guarded: vec![false; count],
            parents: vec![NOBODY; count],
            entered: vec![false; count],
            asks_for_more,
        };
        graph.reach(section);
        graph.enter(section, &pointers);
        graph.mark_taken();
        graph.mark_guarded(chosen);
        graph
    }

    /// Marks the functions to which calls lead from the entry point and from `main`. The code that starts a program
    /// passes on the addresses of a few functions, such as `main`, which are then called. All other addresses may be
    /// taken without a call.
    fn reach(&mut self, section: &Section<'_, '_>) {
        /// The number of calls between the entry point and a function that may pass on an address: `_start` passes on C's
        /// `main`, and that function Rust's `main`. In musl, a function that `_start` calls passes on `main`.
        const STARTING: u32 = 2;
        let Section { elf, functions, .. } = *section;
        // A library is entered by the program that loads it. That program may have asked the processor before.
        if elf.is_library() {
            return;
        }
        // A static executable contains its C library. The start code of that library reads the features that the
        // kernel passes, but calls no function of a known name for that. Any test of a variable may therefore be a
        // test of the answer.
        let is_static = elf.dynamic.needed().next().is_none();
        let mains = elf.symbols().filter(|symbol| symbol.name == b"main").map(|symbol| symbol.address);
        let roots: Vec<u64> = std::iter::once(elf.entry()).chain(mains).collect();
        let mut pending: VecDeque<(u32, u32)> = VecDeque::new();
        for function in roots.into_iter().filter_map(|root| functions.at(root)) {
            if !self.decides[function] && !std::mem::replace(&mut self.reachable[function], true) {
                pending.push_back((function as u32, 0));
            }
        }
        while let Some((function, distance)) = pending.pop_front() {
            let caller = function as usize;
            if self.callers[caller] || is_static && self.facts.tests(caller) {
                continue;
            }
            for (callee, is_call) in self.facts.edges(caller) {
                let follows = is_call || distance <= STARTING;
                if follows && !self.decides[callee] && !self.reachable[callee] {
                    self.reachable[callee] = true;
                    self.parents[callee] = function;
                    pending.push_back((callee as u32, distance + 1));
                }
            }
        }
    }

    /// Marks the functions to which direct calls lead from the entry points of the file: those of an executable, and the
    /// functions of a library that other files call by name or that the loader calls. Weak names are those of templates
    /// and inline functions, which are no interface.
    fn enter(&mut self, section: &Section<'_, '_>, pointers: &Pointers<'_, '_>) {
        let Section { elf, functions, .. } = *section;
        if !elf.is_library() {
            self.entered.clone_from(&self.reachable);
            return;
        }
        let initial = elf.initial_places().filter_map(|place| pointers.at(place));
        let roots: Vec<u64> = elf.exported_functions().chain(initial).collect();
        let mut pending: Vec<usize> = roots.into_iter().filter_map(|root| functions.at(root)).collect();
        while let Some(function) = pending.pop() {
            if self.decides[function] || std::mem::replace(&mut self.entered[function], true) {
                continue;
            }
            if !self.callers[function] {
                pending.extend(
                    self.facts.edges(function).filter(|(_, is_call)| *is_call).map(|(callee, _)| callee),
                );
            }
        }
    }

    /// Marks the functions whose addresses the reachable functions take, and those that are called from there.
    fn mark_taken(&mut self) {
        let from = (0..self.reachable.len()).filter(|function| self.reachable[*function]);
        let mut pending: Vec<usize> = from.collect();
        while let Some(function) = pending.pop() {
            for (callee, _) in self.facts.edges(function) {
                let seen = self.taken[callee] || self.reachable[callee] || self.decides[callee];
                if !seen {
                    self.taken[callee] = true;
                    pending.push(callee);
                }
            }
        }
    }

    /// Marks the functions to which only functions lead that decide, or that are chosen.
    fn mark_guarded(&mut self, chosen: &[u32]) {
        let deciding = (0..self.decides.len()).filter(|function| self.decides[*function]);
        let mut pending: Vec<usize> =
            deciding.chain(chosen.iter().map(|function| *function as usize)).collect();
        while let Some(function) = pending.pop() {
            for (callee, _) in self.facts.edges(function) {
                if !self.guarded[callee] && !self.reachable[callee] {
                    self.guarded[callee] = true;
                    pending.push(callee);
                }
            }
        }
    }

    /// Returns whether the function branches on a variable at a fixed address.
    pub(crate) fn tests(&self, function: usize) -> bool {
        self.facts.tests(function)
    }

    /// Returns whether there is no function that asks the processor or reads its answer.
    pub(crate) fn nobody_asks(&self) -> bool {
        !self.decides.contains(&true)
    }

    /// Returns whether direct calls lead to a function from an entry point of the file, without a function that decides.
    pub(crate) fn is_entered(&self, function: usize) -> bool {
        self.entered[function]
    }

    /// Returns the number of functions for which [`Self::is_entered`] holds.
    pub(crate) fn entered(&self) -> usize {
        self.entered.iter().filter(|entered| **entered).count()
    }

    /// Returns whether a function asks the processor for more than LSE, for which most files ask.
    pub(crate) fn asks_for_more(&self) -> bool {
        self.asks_for_more
    }

    /// Returns the use of a function, as far as it is known.
    pub(crate) fn used(&self, function: usize) -> Use {
        if self.decides[function] {
            Use::Guarded("it asks the processor, or reads the answer")
        } else if self.reachable[function] {
            let may_be_told = self.tests(function) || self.callers[function];
            if may_be_told || !self.facts.are_complete() { Use::Unclear } else { Use::Plain }
        } else if self.guarded[function] && !self.taken[function] {
            Use::Guarded("only functions that ask the processor, or that are chosen at run time, lead to it")
        } else {
            Use::Unclear
        }
    }

    /// Returns the functions through which calls lead from the entry point to a function, both included. The list is
    /// empty if there is no such path.
    pub(crate) fn path(&self, function: usize) -> Vec<usize> {
        let mut path = Vec::new();
        let mut at = Some(function).filter(|function| self.reachable[*function]);
        while let Some(function) = at {
            path.push(function);
            at = Some(self.parents[function] as usize).filter(|parent| *parent < self.parents.len());
        }
        path.reverse();
        path
    }
}

/// Returns the first function that computes an address.
pub(crate) fn first_user(section: &Section<'_, '_>, address: u64) -> Option<usize> {
    (0..section.functions.len()).find(|function| {
        let mut uses = false;
        events(section, *function, |event| uses |= event == Event::Address(address));
        uses
    })
}

/// Calls `each` for every event of a function.
fn events(section: &Section<'_, '_>, function: usize, mut each: impl FnMut(Event)) {
    let (start, end) = section.functions.range(function);
    let body = section.code.bytes.get(start..end).unwrap_or_default();
    section.isa.events(body, section.code.address + start as u64, |_, event| each(event));
}

/// Returns whether a function tests a variable and calls a function that calls one that asks. The variable then has the
/// answer, which is asked for when it is needed for the first time. Outline atomics may write the variable, so that the
/// store is not seen.
fn asks_lazily(facts: &Facts, callers: &[bool], function: usize) -> bool {
    facts.tests(function) && facts.edges(function).any(|(callee, is_call)| is_call && callers[callee])
}

/// Returns the places in which answers of the processor are stored, and the direct callers of functions that ask. A
/// function that asks may write the answer to a variable, or to a structure whose address it computes. It may also
/// return the answer, which its caller then writes to a variable.
fn written(
    section: &Section<'_, '_>,
    asks: &[bool],
    facts: &Facts,
    pointers: &Pointers<'_, '_>,
) -> (Written, Vec<bool>) {
    const MOST: usize = 4096;
    // In Rust's `std_detect`, three functions in a row return the answer to their callers.
    const RETURNS: usize = 3;
    let elf = section.elf;
    let mut written = Written::default();
    let direct = facts.callers_of(asks);
    let mut told = asks.to_vec();
    for level in 0..=RETURNS {
        for function in (0..told.len()).filter(|function| told[*function]) {
            events(section, function, |event| {
                let (place, whole) = match event {
                    Event::Store(place) => (Some(place), false),
                    Event::Address(place) if level == 0 => (Some(place), true),
                    Event::Load(place) if level <= 1 && !elf.is_variable(place) => (pointers.at(place), true),
                    _ => return,
                };
                let count = written.variables.len() + written.structures.len();
                let place = place.filter(|place| count < MOST && elf.is_variable(*place));
                if whole {
                    written.structures.extend(place);
                } else {
                    written.variables.extend(place);
                }
            });
        }
        told = if level == 0 { direct.clone() } else { facts.callers_of(&told) };
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
    fn is_empty(&self) -> bool {
        self.variables.is_empty() && self.structures.is_empty()
    }

    /// Returns whether a place is in one of these variables or structures. The size of a structure is not known.
    fn holds(&self, place: u64) -> bool {
        const LARGEST: u64 = 32;
        let near = place.saturating_sub(LARGEST)..=place;
        self.variables.contains(&place) || self.structures.range(near).next().is_some()
    }
}
