//! Judges, for each function with instructions that the core lacks, whether something checks before it is executed.

use object::elf::DynamicTag;

use crate::bounds::Literals;
use crate::elf::{Elf, GoFunctions, shown};
use crate::finding::MOST;
use crate::functions::{Needy, Path, Section, needy_within, reached};
use crate::guard::{Detection, Graph, Use, chosen_for, everywhere, is_vector_variant, on_request};
use crate::isa::features::Set;

/// A function with instructions that the core lacks, and how the function is used.
pub(super) struct Judged<'a> {
    pub(super) name: Option<&'a [u8]>,
    pub(super) address: u64,
    pub(super) mnemonic: String,
    pub(super) needs: Set,
    pub(super) count: u32,
    pub(super) used: Use,
    /// The functions through which direct calls lead from the entry point to this one.
    pub(super) path: Vec<String>,
}

/// A function's name and its size in bytes, as far as symbols have them.
#[derive(Debug, Clone, Copy, Default)]
struct Known<'a> {
    name: Option<&'a [u8]>,
    size: u64,
}

/// Returns whether it cannot be known that nothing in a file asks the processor. A static executable contains its C
/// library. Without symbols, the `getauxval` in it has no name, and the code that reads the kernel's answer is not found.
pub(super) fn asks_in_secret(elf: &Elf<'_>) -> bool {
    elf.dynamic.needed().next().is_none() && !elf.is_library() && !elf.has_symbols()
}

/// Judges the functions of one section.
struct Judge<'a, 'b> {
    section: &'b Section<'a, 'b>,
    lacks: Set,
    detection: &'b Detection,
    go: Option<GoFunctions<'a>>,
    /// Features whose instructions prove nothing if it is not known that they are executed.
    on_request: Set,
    /// The functions that are chosen according to their names.
    chosen: Vec<u32>,
    graph: Option<Graph>,
}

/// Decides for each function how it is used. Returns whether code of the section asks the processor for its features
/// directly. If no function needed a walk over the code, the result is false.
pub(super) fn judge<'a>(
    section: &Section<'a, '_>,
    lacks: Set,
    detection: &Detection,
    found: &[Needy],
    judged: &mut Vec<Judged<'a>>,
) -> bool {
    let Section { isa, elf, code, .. } = *section;
    let known = known(section, found);
    let chosen = found.iter().zip(&known).filter(|(needy, known)| {
        let promised = known.name.map_or(Set::NONE, |name| chosen_for(isa, name));
        let in_vain = detection.is_absent() && !known.name.is_some_and(is_vector_variant);
        (needy.needs & lacks & !promised).is_empty() && !in_vain
    });
    let chosen = chosen.map(|(needy, _)| needy.function).collect();
    let tags = isa.feature("mte").filter(|_| asks_for_tags(elf)).unwrap_or_default();
    let on_request = on_request(isa) & !tags;
    let go = GoFunctions::of(elf);
    let (mut told, first, mut pointed) = (0, judged.len(), Vec::new());
    let mut judge = Judge { section, lacks, detection, go, on_request, chosen, graph: None };
    for (needy, known) in found.iter().zip(known) {
        let (start, _) = section.functions.range(needy.function as usize);
        let literals = Literals::of(section, needy.function as usize);
        let is_code = |at| !literals.hold(at) && isa.is_amid_code(code.bytes, start, at);
        let path = reached(section, needy.function as usize, lacks, &is_code);
        let Some(needy) = judge.executed(needy, known, path, &is_code) else { continue };
        let mut used = judge.used(&needy, known, path);
        if used == Use::Unclear && judge.is_alone(&needy) {
            used = Use::Guarded(
                "it has only this instruction, whose result or signal tells what the processor has",
            );
        }
        if used == Use::Unclear {
            pointed.push((judged.len() - first, needy.function as usize));
        }
        let mnemonic = isa.mnemonic(code.bytes.get(needy.first as usize..).unwrap_or_default());
        let address = code.address.wrapping_add(u64::from(needy.first));
        let path =
            if used == Use::Plain && told < MOST { judge.path(needy.function as usize) } else { Vec::new() };
        told += usize::from(!path.is_empty());
        let (name, needs, count) = (known.name, needy.needs, needy.count);
        judged.push(Judged { name, address, mnemonic, needs, count, used, path });
    }
    judge.excuse(&mut judged[first..], &pointed);
    judge.graph.is_some_and(|graph| !graph.nobody_asks())
}

/// Returns whether the loader is to turn on memory tagging for a file. Linkers write these entries if the file was
/// compiled with `-fsanitize=memtag-stack` or `memtag-heap` (ELF for AArch64, "Memtag ABI").
fn asks_for_tags(elf: &Elf<'_>) -> bool {
    const MODE_HEAP_STACK_GLOBALS: [i64; 4] = [0x7000_0009, 0x7000_000b, 0x7000_000c, 0x7000_000d];
    MODE_HEAP_STACK_GLOBALS.iter().any(|tag| elf.dynamic.value(DynamicTag(*tag)).is_some())
}

impl<'a> Judge<'a, '_> {
    /// Returns the instructions of a function without those that are data: words to which no path leads from the start
    /// of the function, and that lie before its known end or among numbers. Returns `None` if none remains.
    fn executed(
        &self,
        needy: &Needy,
        known: Known<'_>,
        path: Path,
        is_code: &dyn Fn(usize) -> bool,
    ) -> Option<Needy> {
        let Section { elf, code, functions, .. } = *self.section;
        let (start, end) = functions.range(needy.function as usize);
        let from = match path {
            // A table of numbers may follow the code.
            Path::Direct(first) => {
                let all = needy_within(self.section, self.lacks, start..end, is_code)?;
                return Some(Needy { first: first as u32, ..all });
            }
            Path::Computed => start,
            Path::None => {
                let address = code.address.wrapping_add(start as u64);
                if self.go.is_some_and(|go| go.hold(address)) {
                    return None;
                }
                let by_symbol = Some(address.saturating_add(known.size)).filter(|_| known.size > 0);
                let end = by_symbol.or_else(|| elf.frame_end(address)).unwrap_or(address);
                usize::try_from(end.saturating_sub(code.address)).ok()?
            }
        };
        needy_within(self.section, self.lacks, from.min(end)..end, is_code)
    }

    fn used(&mut self, needy: &Needy, known: Known<'_>, path: Path) -> Use {
        let Section { isa, elf, code, .. } = *self.section;
        let address = code.address.wrapping_add(u64::from(needy.first));
        if self.go.is_some_and(|go| go.hold(address)) {
            return Use::Guarded("Go tests the features that its runtime found");
        }
        let promised = known.name.map_or(Set::NONE, |name| chosen_for(isa, name));
        let is_chosen = (needy.needs & self.lacks & !promised).is_empty();
        let by_name = Use::Guarded("its name says that it is chosen for these features at run time");
        let used = match path {
            _ if is_chosen && known.name.is_some_and(is_vector_variant) => {
                Use::Guarded("only code with these instructions calls it, by the vector function ABI")
            }
            // A name is evidence only if something in the file asks the processor for its features. Otherwise no code
            // can choose between functions.
            Path::Direct(_) if is_chosen && !self.detection.is_absent() => by_name,
            Path::Computed | Path::None if is_chosen => by_name,
            // If no path leads to these bytes, they may be a table between functions.
            Path::Computed | Path::None => Use::Unclear,
            Path::Direct(_) => self.by_callers(needy.function as usize, is_chosen.then_some(by_name)),
        };
        match used {
            Use::Plain if elf.is_library() || asks_in_secret(elf) || self.is_unknown_go() => {
                self.if_unclear(needy)
            }
            Use::Unclear => self.if_unclear(needy),
            used => used,
        }
    }

    /// Returns whether Go's compiler made the file, and its table of functions cannot be read.
    fn is_unknown_go(&self) -> bool {
        self.detection.go && self.go.is_none()
    }

    /// Returns the use of a function of which it is not known whether it is executed.
    fn if_unclear(&self, needy: &Needy) -> Use {
        if (needy.needs & self.lacks & !self.on_request).is_empty() {
            Use::Guarded("compilers use these instructions only where the source asks for them")
        } else {
            Use::Unclear
        }
    }

    fn by_callers(&mut self, function: usize, by_name: Option<Use>) -> Use {
        let elf = self.section.elf;
        let (section, detection, chosen) = (self.section, self.detection, &self.chosen);
        // The graph is made only if it is needed, because it takes a walk over all of the code. Usually the names are
        // sufficient.
        let graph = self.graph.get_or_insert_with(|| Graph::of(section, detection, chosen));
        let absent = graph.nobody_asks() && detection.is_absent();
        // The start code of a static executable may ask the processor in an unknown way, as musl's does.
        let may_be_told = elf.dynamic.needed().next().is_none() && graph.tests(function);
        match (by_name, graph.used(function)) {
            (_, Use::Plain | Use::Unclear) if absent && !may_be_told => Use::Plain,
            (Some(by_name), _) => by_name,
            (None, used) => used,
        }
    }

    /// Returns whether a function has only instructions behind each of which it returns.
    fn is_alone(&self, needy: &Needy) -> bool {
        let Section { isa, code, functions, .. } = *self.section;
        let (start, end) = functions.range(needy.function as usize);
        let goes_on = |at| !isa.is_alone(code.bytes, start, at);
        needy_within(self.section, self.lacks, start..end, goes_on).is_none()
    }

    /// Finds the functions to which only pointers lead. A program that asks the processor chooses them in this way. If it
    /// were compiled for their features as a whole, functions to which direct calls lead would need these features, too.
    fn excuse(&mut self, judged: &mut [Judged<'_>], pointed: &[(usize, usize)]) {
        /// The number of functions that prove by themselves that the features are not used everywhere.
        const MANY: usize = 256;
        /// In a library that is compiled for SVE with optimisation, one function in 10 to 40 uses SVE.
        const FEW: usize = 64;
        if pointed.is_empty() {
            return;
        }
        let Section { isa, elf, functions, .. } = *self.section;
        let (section, detection, chosen) = (self.section, self.detection, &self.chosen);
        let graph = self.graph.get_or_insert_with(|| Graph::of(section, detection, chosen));
        let entered = pointed.iter().filter(|(_, function)| graph.is_entered(*function));
        let plain = entered.fold(everywhere(isa), |set, (at, _)| set | judged[*at].needs) & self.lacks;
        let is_rare = graph.entered() >= MANY || judged.len() <= functions.len() / FEW;
        let asks = graph.asks_for_more() || asks_in_secret(elf);
        for (at, function) in pointed {
            let one = &mut judged[*at];
            let needs = one.needs & self.lacks;
            let promised = one.name.map_or(Set::NONE, |name| chosen_for(isa, name));
            let says = elf.is_library() && (needs & !promised).is_empty();
            let chooses = asks && is_rare || detection.imports;
            if !graph.is_entered(*function) && (says || chooses && (needs & plain).is_empty()) {
                one.used = Use::Guarded(
                    "only pointers lead to it, and no function that is called needs these features",
                );
            }
        }
    }

    /// Returns the names, or else the addresses, of the functions that lead from the entry point to a function.
    fn path(&self, function: usize) -> Vec<String> {
        let Section { elf, code, functions, .. } = *self.section;
        let steps = self.graph.as_ref().map(|graph| graph.path(function)).unwrap_or_default();
        let mut names = vec![None; steps.len()];
        for symbol in elf.symbols().filter(|symbol| symbol.function) {
            let step = functions.beginning_at(symbol.address);
            if let Some(at) = step.and_then(|step| steps.iter().position(|other| *other == step)) {
                names[at] = names[at].or(Some(symbol.name));
            }
        }
        let address = |step: usize| code.address.wrapping_add(functions.range(step).0 as u64);
        let named = |(step, name): (usize, Option<&[u8]>)| {
            name.map_or_else(|| format!("{:#x}", address(step)), shown)
        };
        steps.into_iter().zip(names).map(named).collect()
    }
}

/// Returns the names and the sizes of the functions, in one pass over the symbols.
fn known<'a>(section: &Section<'a, '_>, found: &[Needy]) -> Vec<Known<'a>> {
    let Section { isa, elf, functions, .. } = *section;
    let mut all = vec![Known::default(); found.len()];
    for symbol in elf.symbols().filter(|symbol| symbol.function) {
        let Some(function) = functions.beginning_at(symbol.address) else { continue };
        if let Ok(at) = found.binary_search_by_key(&(function as u32), |needy| needy.function) {
            // If a function has several names, the one that names features is used.
            let says = |name: &[u8]| chosen_for(isa, name) != Set::NONE;
            let says_more = all[at].name.is_none_or(|known| !says(known) && says(symbol.name));
            all[at].size = all[at].size.max(symbol.size);
            if says_more {
                all[at].name = Some(symbol.name);
            }
        }
    }
    all
}
