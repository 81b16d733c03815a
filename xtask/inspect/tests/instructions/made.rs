//! Small executables whose functions have four instructions each.

use inspect::device;
use inspect::finding::{Finding, Severity};
use inspect::isa::Isa;
use inspect::{Page, Target};

use crate::support;

pub(crate) const NOP: u32 = 0xd503_201f;
pub(crate) const RET: u32 = 0xd65f_03c0;
/// `cntb x0`, of SVE.
pub(crate) const CNTB: u32 = 0x0420_e3e0;
/// The body of a function that uses SVE.
pub(crate) const WORK: [u32; 3] = [CNTB, NOP, RET];
/// `irg x0, sp`, of MTE.
pub(crate) const IRG: u32 = 0x9adf_13e0;
/// The size of a function in these executables, in words.
pub(crate) const FUNCTION: usize = 4;

/// The indices and offsets of program headers in these executables (gABI).
pub(crate) const INTERP: usize = 0;
pub(crate) const DYNAMIC: usize = 3;
pub(crate) const FRAMES: usize = 6;
pub(crate) const PHDR: usize = 56;

/// Returns the words of a function, filled up with NOP.
pub(crate) fn function(words: &[u32]) -> Vec<u32> {
    let mut function = words.to_vec();
    function.resize(FUNCTION, NOP);
    function
}

/// Returns `bl`, or another branch of this form, over a number of functions, from the first word of a function.
pub(crate) fn branch(kind: u32, functions: usize) -> u32 {
    kind | (functions * FUNCTION) as u32
}

pub(crate) fn call(functions: usize) -> u32 {
    branch(0x9400_0000, functions)
}

/// Returns `adr x0` of the function behind the next ones.
pub(crate) fn address_of(functions: usize) -> u32 {
    0x1000_0000 | ((functions * FUNCTION) as u32) << 5
}

/// Returns `b.eq` to the function behind the next ones.
pub(crate) fn if_equal(functions: usize) -> u32 {
    0x5400_0000 | ((functions * FUNCTION) as u32) << 5
}

pub(crate) fn code(functions: &[Vec<u32>]) -> Vec<u8> {
    functions.iter().flatten().flat_map(|word| word.to_le_bytes()).collect()
}

/// An executable whose bytes the tests change.
pub(crate) struct Made(pub(crate) Vec<u8>);

impl Made {
    pub(crate) fn of(functions: &[Vec<u32>]) -> Self {
        Self(support::executable(183, &code(functions)))
    }

    pub(crate) fn with(functions: &[Vec<u32>], more: &[(&'static str, &[u8])]) -> Self {
        Self(support::executable_with(183, &code(functions), more))
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn number(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    /// Returns the offset of a program header.
    pub(crate) fn header(index: usize) -> usize {
        64 + index * PHDR
    }

    /// Returns the address of a function. Addresses are offsets in the first segment.
    pub(crate) fn address(&self, function: usize) -> usize {
        self.number(24) as usize + function * FUNCTION * 4
    }

    /// Replaces a name by another one of the same length wherever it occurs.
    pub(crate) fn renamed(mut self, name: &str, new: &str) -> Self {
        assert_eq!(name.len(), new.len());
        let places: Vec<usize> =
            (0..self.0.len()).filter(|at| self.0[*at..].starts_with(name.as_bytes())).collect();
        assert!(!places.is_empty(), "{name} does not occur");
        places.into_iter().for_each(|at| self.put(at, new.as_bytes()));
        self
    }

    /// Takes away the import by which the executable could ask the processor.
    pub(crate) fn without_question(self) -> Self {
        self.renamed("getauxval", "getpagesz")
    }

    /// Makes the file a static executable: no interpreter, no dynamic section, a fixed address.
    pub(crate) fn linked_statically(mut self) -> Self {
        self.put(Self::header(INTERP), &[0; 4]);
        self.put(Self::header(DYNAMIC), &[0; 4]);
        self.put(16, &[2]);
        self
    }

    /// Takes away the interpreter, so that other files load this one.
    pub(crate) fn into_library(mut self) -> Self {
        self.put(Self::header(INTERP), &[0; 4]);
        self.put(24, &[0; 8]);
        self
    }

    /// Takes away the section headers, and with them the symbols.
    pub(crate) fn stripped(mut self) -> Self {
        self.put(40, &[0; 8]);
        self.put(58, &[0; 6]);
        self
    }

    /// Takes away the unwinder's entries of some functions, which then seem to belong to the function before them.
    pub(crate) fn without_frames(mut self, functions: std::ops::Range<usize>) -> Self {
        let frames = self.number(Self::header(FRAMES) + 8) as usize + 12;
        let before: Vec<u8> = self.0[frames + (functions.start - 1) * 8..][..8].to_vec();
        functions.for_each(|function| self.put(frames + function * 8, &before));
        self
    }

    /// Returns the offset and the address of the third entry of the global offset table, which nothing uses.
    pub(crate) fn slot(&self) -> (usize, u64) {
        const ENTRIES: usize = 15;
        let dynamic = Self::header(DYNAMIC);
        let inside = ENTRIES * 16 + 2 * 8;
        (self.number(dynamic + 8) as usize + inside, self.number(dynamic + 16) + inside as u64)
    }

    /// Puts a pointer to a function into the file's data.
    pub(crate) fn pointing_to(mut self, function: usize) -> Self {
        let (offset, _) = self.slot();
        let address = self.address(function) as u64;
        self.put(offset, &address.to_le_bytes());
        self
    }

    /// Makes the loader call the function to which the pointer leads, before the program starts.
    pub(crate) fn calling_at_start(mut self, function: usize) -> Self {
        const INIT_ARRAY: u64 = 25;
        const INIT_ARRAY_SIZE: u64 = 27;
        self = self.pointing_to(function);
        let (_, place) = self.slot();
        let dynamic = self.number(Self::header(DYNAMIC) + 8) as usize;
        self.put(dynamic + 16, &[INIT_ARRAY, place].map(u64::to_le_bytes).concat());
        self.put(dynamic + 12 * 16, &[INIT_ARRAY_SIZE, 8].map(u64::to_le_bytes).concat());
        self
    }

    /// Returns the findings about instructions, the worst first.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        let device = device::find(Isa::Aarch64, "pi5").unwrap();
        let target = Target {
            pages: vec![Page { bytes: 4096, whose: "a test".to_owned(), certain: true }],
            place: "a test".to_owned(),
            ..Target::new("aarch64", "/lib/ld-linux-aarch64.so.1", &device)
        };
        let report = inspect::inspect(&self.0, &target);
        assert!(report.findings.iter().all(|finding| finding.id != "malformed"), "{report:#?}");
        report.findings.into_iter().filter(|finding| finding.id == "instructions").collect()
    }

    pub(crate) fn worst(&self) -> Severity {
        self.findings().first().unwrap().severity
    }
}
