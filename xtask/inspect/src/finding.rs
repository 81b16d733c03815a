//! The report of an inspection. A finding says what is in the file, what the target offers, and what to do.

use serde::Serialize;

/// The schema number of the report as JSON.
pub const SCHEMA: u32 = 1;

/// The severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// A fact about the file, which needs no action.
    Informs,
    /// The executable may fail on the target. The file does not show whether it does.
    Warned,
    /// The executable fails on the target.
    Refused,
}

/// Writes the severity as in the report.
impl std::fmt::Display for Severity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// A finding. Ids are an interface: an id never gets another meaning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The id of the check.
    pub id: &'static str,
    pub severity: Severity,
    /// The fact about the file.
    pub found: String,
    /// The matching facts about the target.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub offers: String,
    /// The action that solves the problem.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
    /// The symbols, functions or libraries that the finding is about.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
    /// The functions through which direct calls lead from the entry point to the first few of these functions:
    /// `_start > main > work`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
}

impl Finding {
    /// Creates a finding about something that fails on the target.
    pub fn refused(id: &'static str, found: &str, offers: &str, remedy: &str) -> Self {
        Self::refused_if(true, id, found, offers, remedy)
    }

    /// Creates a finding about something that may fail on the target.
    pub fn warned(id: &'static str, found: &str, offers: &str, remedy: &str) -> Self {
        Self::refused_if(false, id, found, offers, remedy)
    }

    /// Creates a finding about something that fails on the target if `certain` is true, and that may fail otherwise.
    pub fn refused_if(certain: bool, id: &'static str, found: &str, offers: &str, remedy: &str) -> Self {
        let severity = if certain { Severity::Refused } else { Severity::Warned };
        Self::new(id, severity, found).offers(offers).remedy(remedy)
    }

    /// Creates a finding about a fact that needs no action.
    pub fn informs(id: &'static str, found: impl Into<String>) -> Self {
        Self::new(id, Severity::Informs, found)
    }

    /// Creates a finding without the target's facts and without a remedy.
    pub fn new(id: &'static str, severity: Severity, found: impl Into<String>) -> Self {
        debug_assert!(CHECKS.iter().any(|(known, _)| *known == id), "{id} is not in the list of checks");
        let (offers, remedy, details, paths) = Default::default();
        Self { id, severity, found: found.into(), offers, remedy, details, paths }
    }

    /// Adds the matching facts about the target.
    #[must_use]
    pub fn offers(mut self, offers: impl Into<String>) -> Self {
        self.offers = offers.into();
        self
    }

    /// Adds the remedy.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// Adds the details.
    #[must_use]
    pub fn details(mut self, all: impl IntoIterator<Item = String>) -> Self {
        self.details = all.into_iter().collect();
        self
    }

    /// Adds the first few paths from the entry point.
    #[must_use]
    pub fn paths(mut self, all: impl IntoIterator<Item = String>) -> Self {
        self.paths = all.into_iter().take(MOST).collect();
        self
    }
}

/// The ids of all checks, each with the statement that it checks.
pub const CHECKS: &[(&str, &str)] = &[
    ("address-space", "The file assumes no larger address space than the kernel gives."),
    ("allocator-page-size", "The file's jemalloc was compiled for pages as large as the kernel's."),
    ("archive", "The archive is complete and can be unpacked."),
    ("bti-pac", "The file is marked for branch target identification and pointer authentication."),
    ("build-id", "The file has a build id."),
    ("container-command", "A container of the image can start its command."),
    ("debug-link", "The file names its debug information."),
    ("elf-class", "The file is a 64-bit ELF file."),
    ("elf-endianness", "The file is little-endian."),
    ("elf-flags", "The flags in the header are valid."),
    ("elf-machine", "The file is for the architecture of the device."),
    ("elf-osabi", "The file is for Linux."),
    ("elf-type", "The file is an executable or a shared library."),
    ("entry-point", "The entry point is in executable memory."),
    ("exec-stack", "The file needs no executable stack."),
    ("instructions", "The core has every instruction that the file executes."),
    ("interpreter", "The target has the dynamic loader that the file names."),
    ("isa-level", "The core has the level of x86-64 that the file is marked with."),
    ("library", "The libraries that the file loads do not fail on the target."),
    ("malformed", "The headers of the file are valid."),
    ("needed", "The target has the libraries that the file needs."),
    ("packed", "The file is not packed, so that it can be inspected."),
    ("page-size", "The file does not assume pages of 4 KiB."),
    ("pie", "The file can be loaded at any address."),
    ("relr", "The loader processes the file's packed relocations."),
    ("relro", "The loader protects relocated data against writing."),
    ("rpath", "The file names no library directories of the build machine."),
    ("script", "The target has the interpreter of the script."),
    ("sections", "The file has section headers."),
    ("segment-alignment", "The kernel can map the file's segments with each page size of the target."),
    ("size", "The size of the file."),
    ("static-nss", "A static executable loads no name service modules of another release of glibc."),
    ("stripped", "The file has symbols."),
    ("symbol", "The file's libraries have each symbol that the file uses."),
    ("symbol-version", "The target's libraries define each symbol version that the file needs."),
    ("text-relocations", "The loader need not change the file's code."),
    ("try", "The program did not fail when it was run."),
    ("writable-code", "The file has no memory that is both writable and executable."),
];

/// The largest number of paths in a finding.
pub(crate) const MOST: usize = 8;

/// A library that the loader loads with the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedLibrary {
    /// The library's path: in the tree of the file if the library comes with the file, otherwise in the target's tree.
    pub path: String,
    /// True if the library comes with the file.
    pub beside: bool,
}

/// All findings about one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The findings, the worst first.
    pub findings: Vec<Finding>,
    /// The libraries that the loader loads with the file and that were found.
    #[serde(skip)]
    pub libraries: Vec<LoadedLibrary>,
}

impl Report {
    /// Sorts the findings by their severity, the worst first, and then in the order of the checks.
    pub fn new(mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        Self { findings, libraries: Vec::new() }
    }

    /// Adds findings and sorts all of them.
    pub fn add(&mut self, findings: impl IntoIterator<Item = Finding>) {
        self.findings.extend(findings);
        self.findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    }

    /// Returns the findings about things that fail on the target.
    pub fn refused(&self) -> impl Iterator<Item = &Finding> {
        self.of(Severity::Refused)
    }

    /// Returns the findings of a severity.
    pub fn of(&self, severity: Severity) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(move |finding| finding.severity == severity)
    }

    /// Returns whether no finding is a refusal.
    pub fn is_sound(&self) -> bool {
        self.refused().next().is_none()
    }
}
