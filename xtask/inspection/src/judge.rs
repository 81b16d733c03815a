//! Judges files together with the libraries that the loader loads with them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use inspect::elf::Elf;
use inspect::finding::{Finding, Report, Severity};

use crate::Inspection;

/// The checks that search for the libraries of a file. If one of them refuses a library, it also refuses the program
/// that loads this library, so no finding `library` is needed.
const OF_LIBRARIES: [&str; 4] = ["interpreter", "needed", "symbol", "symbol-version"];

/// The checks for what the loader itself refuses. It goes on without a library of `LD_PRELOAD` that it cannot load
/// (ld.so(8)).
const AT_LOADING: [&str; 9] = [
    "malformed",
    "elf-class",
    "elf-endianness",
    "elf-machine",
    "elf-osabi",
    "elf-type",
    "elf-flags",
    "relr",
    "segment-alignment",
];

/// A part of the names of musl's loaders.
const MUSL: &str = "ld-musl";

/// Judges files for one target. The report of each file is kept, because many programs load the same libraries.
#[derive(Debug)]
pub struct Judge {
    pub inspection: Inspection,
    /// The libraries that glibc's loader adds to each program (`/etc/ld.so.preload`): their paths on the target and on
    /// this host.
    preloads: Vec<(String, PathBuf)>,
    known: Mutex<BTreeMap<PathBuf, Arc<Report>>>,
}

impl Judge {
    pub fn new(inspection: Inspection) -> Self {
        Self { preloads: inspection.preloads(), inspection, known: Mutex::default() }
    }

    /// Returns the findings about a file, with one more finding for each of its libraries that fails on the target.
    /// `path` must contain no links.
    pub fn judge(&self, path: &Path, bytes: &[u8]) -> Report {
        let mut report = (*self.alone(path, bytes)).clone();
        let libraries = std::mem::take(&mut report.libraries);
        report.add(libraries.iter().filter_map(|library| {
            let place = self.inspection.host_path(path, library)?;
            Some(about_library(&library.path, worst(self.library(&place)?.as_ref())?))
        }));
        if !self.preloads.is_empty()
            && has_loader(bytes, |loader| !String::from_utf8_lossy(loader).contains(MUSL))
        {
            report.add(self.preloads.iter().filter_map(|(name, place)| self.about_preload(name, place)));
        }
        report
    }

    /// Returns the finding about a program if a library that its environment adds to it (`LD_PRELOAD`) fails on the
    /// target. `program` has the program's bytes, `name` is the library's path on the target, and `place` its path on
    /// this host, without links. A static program has no loader that would read the environment.
    pub fn preloaded(&self, program: &[u8], name: &str, place: &Path) -> Option<Finding> {
        if has_loader(program, |_| true) { self.about_preload(name, place) } else { None }
    }

    fn about_preload(&self, name: &str, place: &Path) -> Option<Finding> {
        let report = self.library(place)?;
        let worst = worst(&report)?;
        let finding = about_library(name, worst);
        if !AT_LOADING.contains(&worst.id) {
            return Some(finding);
        }
        let found = format!("{}; the loader ignores the library", finding.found);
        Some(Finding { severity: Severity::Warned, found, ..finding })
    }

    /// Returns `None` if the library cannot be read.
    fn library(&self, path: &Path) -> Option<Arc<Report>> {
        self.known(path).or_else(|| Some(self.alone(path, &std::fs::read(path).ok()?)))
    }

    fn alone(&self, path: &Path, bytes: &[u8]) -> Arc<Report> {
        if let Some(known) = self.known(path) {
            return known;
        }
        let report = Arc::new(self.inspection.look_at_file(path, bytes));
        self.known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(path.to_owned(), Arc::clone(&report));
        report
    }

    fn known(&self, path: &Path) -> Option<Arc<Report>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(path).cloned()
    }
}

/// Returns whether a file asks for a loader that meets a condition.
fn has_loader(bytes: &[u8], is_right: impl Fn(&[u8]) -> bool) -> bool {
    let loader = Elf::parse(bytes).ok().and_then(|elf| elf.interpreter().ok().flatten().map(is_right));
    loader.unwrap_or(false)
}

/// Returns the finding for which programs that load this library fail on the target.
fn worst(library: &Report) -> Option<&Finding> {
    library.refused().find(|finding| !OF_LIBRARIES.contains(&finding.id))
}

/// Returns the finding about a program that loads a library for which `worst` was found. The program may never call a
/// function of the library that has an instruction which the core lacks.
fn about_library(path: &str, worst: &Finding) -> Finding {
    let found = format!("it loads {path}: {}: {}", worst.id, worst.found);
    let severity = if worst.id == "instructions" { Severity::Warned } else { Severity::Refused };
    Finding::new("library", severity, found).offers(&*worst.offers).remedy(&*worst.remedy)
}
