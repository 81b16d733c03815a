//! Who decides whether an instruction that the core lacks is ever executed. Without running it that can be told so far:
//!
//! - a function that asks the processor (`getauxval(AT_HWCAP)`, an identification register, CPUID, `/proc/cpuinfo`), that an
//!   `IRELATIVE` relocation or an ifunc symbol names, or that reads what such a function wrote down, decides for whatever it
//!   calls or takes the address of: *guarded*;
//! - a function that calls lead to from the entry point, none of which passes through one that decides, is executed whatever
//!   the core has: *plain*;
//! - in a file in which nothing asks the processor, everything is *plain*;
//! - the rest, called through tables of pointers or from a library, is *unclear*.

use std::collections::BTreeSet;

use object::LittleEndian as LE;
use object::elf;

use crate::elf::{Code, Elf};
use crate::functions::Functions;
use crate::isa::{Event, Isa};

/// Functions of C libraries that tell what the processor has, and the arguments that ask for it (AT_HWCAP, AT_HWCAP2, 3, 4).
const ASKING: [&[u8]; 3] = [b"getauxval", b"__getauxval", b"elf_aux_info"];
const HWCAPS: [u32; 4] = [16, 26, 29, 30];

/// Words in the names of other libraries' functions and variables that tell the same.
const TELLING: [&str; 8] =
    ["hwcap", "cpu_feature", "cpu_model", "cpu_indicator", "have_lse_atomics", "armcap", "ia32cap", "cpuid"];
/// Files that tell it; whoever makes their names' addresses asks.
const FILES: [&[u8]; 3] = [b"/proc/cpuinfo\0", b"/proc/self/auxv\0", b"/sys/devices/system/cpu\0"];

/// Endings and beginnings of the names of functions that are chosen at run time.
const CHOSEN: [&str; 26] = [
    "_sve", "_sve2", "_sme", "_mops", "_neon", "_lse", "_pauth", "_mte", "_dotprod", "_i8mm", "_bf16",
    "_sha3", "_sha512", "_ce", "_armv8", "_evex", "_avx", "_avx2", "_avx512", "_erms", "_sse2", "_sse4",
    "_ssse3", "_fma", "_aesni", "_vnni",
];

/// How much is known of a function's callers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Use {
    /// It is executed whatever the core has.
    Plain,
    /// Something decides over it, for this reason.
    Guarded(&'static str),
    /// It cannot be told.
    Unclear,
}

/// Whether anything in the file asks the processor, and what.
#[derive(Debug, Default)]
pub(crate) struct Detection {
    /// For people; empty where nothing does.
    pub(crate) how: Vec<String>,
    /// Addresses of functions and places that tell.
    sources: BTreeSet<u64>,
    /// Of [`Self::sources`], those whose first argument matters.
    with_argument: BTreeSet<u64>,
    /// Places in the global offset table through which such functions are called.
    through: BTreeSet<u64>,
    /// Functions that the loader asks.
    resolvers: BTreeSet<u64>,
    /// Written by the Go compiler, whose runtime asks, and whose code tests what it found.
    pub(crate) go: bool,
}

impl Detection {
    /// Looks for it in the file's tables and strings.
    pub(crate) fn of(elf: &Elf<'_>) -> Self {
        let mut found = Self::default();
        let mut telling: Vec<usize> = Vec::new();
        for (index, name) in elf.imports() {
            if ASKING.contains(&name) || tells(name) {
                telling.push(index);
                found.note(name);
            }
        }
        found.follow_relocations(elf, &telling);
        for symbol in elf.symbols() {
            if ASKING.contains(&symbol.name) {
                found.with_argument.insert(symbol.address);
            }
            if ASKING.contains(&symbol.name) || tells(symbol.name) {
                found.sources.insert(symbol.address);
                found.note(symbol.name);
            }
            if symbol.ifunc {
                found.resolvers.insert(symbol.address);
            }
        }
        for name in FILES {
            let places = elf.loads().filter(|load| !load.writable()).filter_map(|load| {
                let start = usize::try_from(load.offset).ok()?;
                let bytes = elf.data.get(start..start.checked_add(usize::try_from(load.file_size).ok()?)?)?;
                Some(load.address + find(bytes, name)? as u64)
            });
            for place in places {
                found.sources.insert(place);
                found.note(&name[..name.len() - 1]);
            }
        }
        if !found.resolvers.is_empty() {
            found.how.push(format!("{} functions that the loader chooses (ifunc)", found.resolvers.len()));
        }
        found.go = elf.section_table().any(|(name, ..)| name == b".go.buildinfo" || name == b".gopclntab")
            || elf.notes().any(|(owner, ..)| owner == b"Go");
        if found.go {
            found.how.push("Go's runtime".to_owned());
        }
        found
    }

    fn note(&mut self, name: &[u8]) {
        const MOST: usize = 6;
        let name = crate::elf::shown(name);
        if self.how.len() < MOST && !self.how.contains(&name) {
            self.how.push(name);
        }
    }

    /// Where the functions of other libraries are called through, and which functions the loader asks.
    fn follow_relocations(&mut self, elf: &Elf<'_>, telling: &[usize]) {
        let irelative = match elf.machine() {
            183 => elf::R_AARCH64_IRELATIVE.0,
            _ => elf::R_X86_64_IRELATIVE.0,
        };
        let telling: BTreeSet<u32> = telling.iter().filter_map(|index| u32::try_from(*index).ok()).collect();
        let tables = [elf.dynamic.relocations, elf.dynamic.plt_relocations];
        for relocation in tables.into_iter().flatten() {
            let kind = relocation.r_type(LE, false);
            if kind.0 == irelative {
                self.resolvers.insert(relocation.r_addend.get(LE) as u64);
            } else if telling.contains(&relocation.r_sym(LE, false)) {
                self.through.insert(relocation.r_offset.get(LE));
            }
        }
        // A static executable's own, without a dynamic section: .rela.plt, .rela.iplt.
        for name in [&b".rela.plt"[..], b".rela.iplt", b".rela.dyn"] {
            let Some(section) = elf.section(name).filter(|_| !elf.dynamic.is_there()) else { continue };
            for entry in section.bytes.chunks_exact(24) {
                let word = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap_or_default());
                if word(8) as u32 == irelative {
                    self.resolvers.insert(word(16));
                }
            }
        }
    }

    /// Whether nothing in the file asks the processor.
    pub(crate) fn is_absent(&self) -> bool {
        self.how.is_empty()
    }
}

fn tells(name: &[u8]) -> bool {
    std::str::from_utf8(name).is_ok_and(|name| {
        let name = name.to_ascii_lowercase();
        TELLING.iter().any(|word| name.contains(word))
    })
}

/// Where `needle` is in `bytes`.
pub(crate) fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, needle)
}

/// Whether a name says that its function is one of several to choose from.
pub(crate) fn is_chosen(name: &[u8]) -> bool {
    let name = String::from_utf8_lossy(name).to_ascii_lowercase();
    let word_ends = |at: usize| name[at..].chars().next().is_none_or(|next| !next.is_ascii_alphanumeric());
    let outline = name.starts_with("__aarch64_")
        && ["_relax", "_acq", "_rel", "_sync"].iter().any(|end| name.ends_with(end));
    outline || CHOSEN.iter().any(|word| name.match_indices(word).any(|(at, _)| word_ends(at + word.len())))
}

/// What one walk over the code has shown of each function.
#[derive(Debug)]
pub(crate) struct Graph {
    /// Whether it decides.
    decides: Vec<bool>,
    /// Whether a test of a variable at a fixed place decides over a part of it.
    tests: Vec<bool>,
    reachable: Vec<bool>,
    guarded: Vec<bool>,
    complete: bool,
}

impl Graph {
    /// Walks the code three times: who asks, who reads what they wrote, who calls whom.
    pub(crate) fn of(
        isa: Isa,
        elf: &Elf<'_>,
        code: &Code<'_>,
        functions: &Functions,
        detection: &Detection,
    ) -> Self {
        let count = functions.len();
        let mut asks = vec![false; count];
        let stubs = stubs(isa, elf, detection);
        let told = |to: u64, argument: Option<u32>| {
            let known = detection.sources.contains(&to) || stubs.contains(&to);
            let matters = detection.with_argument.contains(&to) || stubs.contains(&to);
            known && (!matters || argument.is_none_or(|argument| HWCAPS.contains(&argument)))
        };
        for resolver in &detection.resolvers {
            if let Some(function) = functions.at(*resolver) {
                asks[function] = true;
            }
        }
        walk(isa, code, functions, |function, event| {
            asks[function] |= match event {
                Event::Detects => true,
                Event::Call { to, argument } | Event::Jump { to, argument } => told(to, argument),
                Event::CallThrough { place, argument } => {
                    detection.through.contains(&place)
                        && argument.is_none_or(|argument| HWCAPS.contains(&argument))
                }
                Event::Address(place) | Event::Load(place) | Event::Tests(place) => {
                    detection.sources.contains(&place)
                }
                Event::Store(_) => false,
            };
        });
        let written = written(isa, elf, code, functions, &asks);
        let mut graph = Self {
            decides: asks,
            tests: vec![false; count],
            reachable: vec![false; count],
            guarded: vec![false; count],
            complete: true,
        };
        graph.connect(isa, elf, code, functions, &written);
        graph
    }

    /// Who reads what was written, and who calls whom; then what is reached from where.
    fn connect(
        &mut self,
        isa: Isa,
        elf: &Elf<'_>,
        code: &Code<'_>,
        functions: &Functions,
        written: &BTreeSet<u64>,
    ) {
        let most = code.bytes.len() / 8;
        let mut edges: Vec<(u32, u32)> = Vec::new();
        let (decides, tests, complete) = (&mut self.decides, &mut self.tests, &mut self.complete);
        walk(isa, code, functions, |function, event| {
            let to = match event {
                Event::Call { to, .. } | Event::Jump { to, .. } | Event::Address(to) => to,
                Event::Load(place) | Event::Tests(place) => {
                    decides[function] |= written.contains(&place);
                    tests[function] |= matches!(event, Event::Tests(_)) && elf.is_variable(place);
                    match elf.bytes_at(place).and_then(|bytes| bytes.get(..8)) {
                        Some(bytes) => u64::from_le_bytes(bytes.try_into().unwrap_or_default()),
                        None => return,
                    }
                }
                _ => return,
            };
            let Some(callee) = functions.at(to).filter(|_| functions.begins(to)) else { return };
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
        self.reach(elf, functions, &edges);
    }

    fn reach(&mut self, elf: &Elf<'_>, functions: &Functions, edges: &[(u32, u32)]) {
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
        // A library is entered by whoever loads it, which may have asked first.
        if !elf.is_library() {
            root(elf.entry(), &mut self.reachable);
            for symbol in elf.symbols().filter(|symbol| symbol.name == b"main") {
                root(symbol.address, &mut self.reachable);
            }
        }
        let decides = std::mem::take(&mut self.decides);
        // A static executable has its C library in it, whose start reads what the kernel tells without a function of a known
        // name. Any test of a variable may be of what it found.
        let ends: &[bool] = if elf.dynamic.needed().next().is_none() { &self.tests } else { &[] };
        flood(&mut self.reachable, roots, &decides, ends);
        let deciding = (0..decides.len() as u32).filter(|function| decides[*function as usize]).collect();
        flood(&mut self.guarded, deciding, &self.reachable, &[]);
        self.decides = decides;
    }

    /// What is known of one function.
    pub(crate) fn used(&self, function: usize) -> Use {
        if self.decides[function] {
            Use::Guarded("it asks the processor, or reads what was found")
        } else if self.reachable[function] {
            if self.tests[function] || !self.complete { Use::Unclear } else { Use::Plain }
        } else if self.guarded[function] {
            Use::Guarded("only a function that asks the processor leads to it")
        } else {
            Use::Unclear
        }
    }
}

/// Each event with the function that it happens in.
fn walk(isa: Isa, code: &Code<'_>, functions: &Functions, mut each: impl FnMut(usize, Event)) {
    for function in 0..functions.len() {
        let (start, end) = functions.range(function);
        let Some(body) = code.bytes.get(start..end) else { continue };
        isa.events(body, code.address + start as u64, |_, event| each(function, event));
    }
}

/// The first function that makes an address.
pub(crate) fn first_user(isa: Isa, code: &Code<'_>, functions: &Functions, address: u64) -> Option<usize> {
    let mut user = None;
    walk(isa, code, functions, |function, event| {
        if event == Event::Address(address) {
            user = user.or(Some(function));
        }
    });
    user
}

/// Where functions that ask keep what they learned: variables that they write or whose address they make, and those of functions
/// that call them, where they keep nothing themselves.
fn written(isa: Isa, elf: &Elf<'_>, code: &Code<'_>, functions: &Functions, asks: &[bool]) -> BTreeSet<u64> {
    const MOST: usize = 4096;
    let mut written = BTreeSet::new();
    let mut keeps = vec![false; asks.len()];
    let mut callers = vec![false; asks.len()];
    walk(isa, code, functions, |function, event| match event {
        Event::Store(place) | Event::Address(place) if asks[function] && elf.is_variable(place) => {
            keeps[function] = true;
            if written.len() < MOST {
                written.insert(place);
            }
        }
        Event::Call { to, .. } => {
            if functions.at(to).is_some_and(|callee| asks[callee] && functions.begins(to)) {
                callers[function] = true;
            }
        }
        _ => {}
    });
    walk(isa, code, functions, |function, event| {
        if let Event::Store(place) = event
            && callers[function]
            && !asks[function]
            && elf.is_variable(place)
            && written.len() < MOST
        {
            written.insert(place);
        }
    });
    written
}

/// The stubs through which functions of other libraries are called: those that load from one of the wanted places. A stub begins
/// up to two instructions before that, with a landing pad or the page's address.
fn stubs(isa: Isa, elf: &Elf<'_>, detection: &Detection) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    for name in [&b".plt"[..], b".plt.sec", b".plt.got"] {
        let Some(stubs) = elf.section(name) else { continue };
        isa.events(stubs.bytes, stubs.address, |at, event| {
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
