//! The facts about each function that the analysis needs, from one pass over the code. Both cores of a small machine
//! decode one half each.

use super::detection::{Detection, HWCAPS};
use super::pointers::Pointers;
use super::stubs::stubs;
use crate::functions::Section;
use crate::isa::Event;

/// The bit of an edge that is set if the function only takes the other function's address, and does not call it.
const TAKEN: u32 = 1 << 31;

/// Lists of numbers, one list for each function.
#[derive(Debug, Default)]
struct Lists {
    ends: Vec<u32>,
    values: Vec<u32>,
}

impl Lists {
    /// Appends a list. Its values are sorted, and each is stored once. If that would make more than `most` values, the
    /// list is left empty, and the result is false.
    fn push(&mut self, list: &mut Vec<u32>, most: usize) -> bool {
        list.sort_unstable();
        list.dedup();
        let fits = self.values.len() + list.len() <= most;
        if fits {
            self.values.extend_from_slice(list);
        }
        list.clear();
        self.ends.push(self.values.len() as u32);
        fits
    }

    /// Adds a value to a list that is not yet stored. Returns false if the list has more than `most` different values.
    fn note(list: &mut Vec<u32>, value: u32, most: usize) -> bool {
        if list.last() == Some(&value) {
            return true;
        }
        if list.len() >= most {
            list.sort_unstable();
            list.dedup();
            if list.len() > most / 2 {
                return false;
            }
        }
        list.push(value);
        true
    }

    fn get(&self, index: usize) -> &[u32] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.values[start as usize..self.ends[index] as usize]
    }
}

/// The facts about consecutive functions.
#[derive(Debug, Default)]
struct Part {
    asks: Vec<bool>,
    tests: Vec<bool>,
    edges: Lists,
    /// The variables that a function reads or whose address it computes, relative to [`Facts::base`].
    places: Lists,
    incomplete: bool,
}

/// The facts about all functions of a section.
#[derive(Debug)]
pub(super) struct Facts {
    parts: [Part; 2],
    /// The number of functions in the first part.
    middle: usize,
    base: u64,
}

/// The parts of the file that a function's facts are compared with.
struct Context<'a, 'b> {
    section: &'b Section<'a, 'b>,
    detection: &'b Detection,
    pointers: &'b Pointers<'a, 'b>,
    stubs: std::collections::BTreeSet<u64>,
    base: u64,
}

impl Facts {
    /// Decodes the section. The facts take less memory than the code.
    pub(super) fn of(section: &Section<'_, '_>, detection: &Detection, pointers: &Pointers<'_, '_>) -> Self {
        const WORTH_A_THREAD: usize = 1 << 19;
        let functions = section.functions;
        let base = section.elf.loads().next().map_or(0, |load| load.address);
        let stubs = stubs(section, detection);
        let context = Context { section, detection, pointers, stubs, base };
        let length = section.code.bytes.len();
        if length < WORTH_A_THREAD {
            let parts = [context.part(0, functions.len()), Part::default()];
            return Self { parts, middle: functions.len(), base };
        }
        let middle = functions.holding((length / 2) as u32);
        let parts = std::thread::scope(|scope| {
            let second = scope.spawn(|| context.part(middle, functions.len()));
            [context.part(0, middle), second.join().expect("decoding does not panic")]
        });
        Self { parts, middle, base }
    }

    fn of_function(&self, function: usize) -> (&Part, usize) {
        match function.checked_sub(self.middle) {
            Some(inside) => (&self.parts[1], inside),
            None => (&self.parts[0], function),
        }
    }

    /// Returns whether each function asks the processor.
    pub(super) fn asks(&self) -> Vec<bool> {
        self.parts.iter().flat_map(|part| &part.asks).copied().collect()
    }

    /// Returns whether the function branches on a variable at a fixed address.
    pub(super) fn tests(&self, function: usize) -> bool {
        let (part, inside) = self.of_function(function);
        part.tests[inside]
    }

    /// Returns the functions that a function calls, and those whose address it takes, with `true` for a call.
    pub(super) fn edges(&self, function: usize) -> impl Iterator<Item = (usize, bool)> + '_ {
        let (part, inside) = self.of_function(function);
        part.edges.get(inside).iter().map(|edge| ((edge & !TAKEN) as usize, edge & TAKEN == 0))
    }

    /// Returns the addresses of the variables that a function reads or whose address it computes.
    pub(super) fn places(&self, function: usize) -> impl Iterator<Item = u64> + '_ {
        let (part, inside) = self.of_function(function);
        part.places.get(inside).iter().map(|place| self.base.wrapping_add(u64::from(*place)))
    }

    /// Returns whether nothing was left out to save memory.
    pub(super) fn are_complete(&self) -> bool {
        self.parts.iter().all(|part| !part.incomplete)
    }

    /// Returns the functions that call one of the given functions.
    pub(super) fn callers_of(&self, callees: &[bool]) -> Vec<bool> {
        let calls = |function| self.edges(function).any(|(callee, is_call)| is_call && callees[callee]);
        (0..callees.len()).map(calls).collect()
    }
}

impl Context<'_, '_> {
    fn part(&self, first: usize, end: usize) -> Part {
        let (functions, code) = (self.section.functions, self.section.code);
        let bytes = functions.range(end.saturating_sub(1)).1.saturating_sub(functions.range(first).0);
        let most = bytes / 32 + 16;
        let mut part = Part::default();
        let (mut edges, mut places) = (Vec::new(), Vec::new());
        for function in first..end {
            let (start, stop) = functions.range(function);
            let (mut asks, mut tests, mut fits) = (false, false, true);
            let body = code.bytes.get(start..stop).unwrap_or_default();
            self.section.isa.events(body, code.address + start as u64, |_, event| {
                asks |= self.asks(event);
                tests |= matches!(event, Event::Tests(place) if self.section.elf.is_variable(place));
                let (edge, read) = self.follow(event);
                if let Some(edge) = edge.filter(|edge| (edge & !TAKEN) as usize != function) {
                    fits &= Lists::note(&mut edges, edge, most);
                }
                for place in read.into_iter().flatten() {
                    fits &= Lists::note(&mut places, place, most);
                }
            });
            part.asks.push(asks);
            part.tests.push(tests);
            fits &= part.edges.push(&mut edges, most) & part.places.push(&mut places, most);
            part.incomplete |= !fits;
        }
        part
    }

    /// Returns whether an event asks the processor.
    fn asks(&self, event: Event) -> bool {
        let detection = self.detection;
        let is_for_features = |argument: Option<u32>| argument.is_none_or(|given| HWCAPS.contains(&given));
        match event {
            Event::Detects => true,
            Event::Call { to, argument } | Event::Jump { to, argument } => {
                let is_stub = self.stubs.contains(&to);
                let matters = is_stub || detection.with_argument.contains(&to);
                (is_stub || detection.sources.contains(&to)) && (!matters || is_for_features(argument))
            }
            Event::CallThrough { place, argument } => {
                detection.through.contains(&place) && is_for_features(argument)
            }
            Event::Address(place) | Event::Load(place) | Event::Tests(place) => {
                detection.sources.contains(&place) || detection.through.contains(&place)
            }
            Event::Store(_) => false,
        }
    }

    /// Returns the edge to another function that an event makes, and the variables that it reads or points to.
    fn follow(&self, event: Event) -> (Option<u32>, [Option<u32>; 2]) {
        let elf = self.section.elf;
        let variable = |place: u64| {
            let relative = place.checked_sub(self.base).and_then(|relative| u32::try_from(relative).ok());
            relative.filter(|_| elf.is_variable(place))
        };
        let callee = |to: u64| Some(self.section.functions.beginning_at(to)? as u32);
        match event {
            Event::Call { to, .. } | Event::Jump { to, .. } => (callee(to), [None; 2]),
            Event::Address(to) => (callee(to).map(|edge| edge | TAKEN), [variable(to), None]),
            Event::Load(place) | Event::Tests(place) => {
                let own = variable(place);
                let pointer = self.pointers.at(place).filter(|_| own.is_none() && !elf.is_variable(place));
                let taken = pointer.and_then(callee).map(|edge| edge | TAKEN);
                (taken, [own, pointer.and_then(variable)])
            }
            Event::CallThrough { .. } | Event::Detects | Event::Store(_) => (None, [None; 2]),
        }
    }
}
