//! Judges files together with the libraries that the loader loads with them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use inspect::finding::{Finding, Report, Severity};

use crate::Inspection;

/// The checks that search for the libraries of a file. If one of them refuses a library, it also refuses the program that
/// loads this library, so no finding `library` is needed.
const OF_LIBRARIES: [&str; 4] = ["interpreter", "needed", "symbol", "symbol-version"];

/// Judges files for one target. The report of each file is kept, because many programs load the same libraries.
#[derive(Debug)]
pub struct Judge {
    pub inspection: Inspection,
    known: Mutex<BTreeMap<PathBuf, Arc<Report>>>,
}

impl Judge {
    pub fn new(inspection: Inspection) -> Self {
        Self { inspection, known: Mutex::default() }
    }

    /// Returns the findings about a file, with one more finding for each of its libraries that fails on the target.
    /// `path` must contain no links.
    pub fn judge(&self, path: &Path, bytes: &[u8]) -> Report {
        let mut report = (*self.alone(path, bytes)).clone();
        let libraries = std::mem::take(&mut report.libraries);
        report.add(libraries.iter().filter_map(|library| {
            let place = self.inspection.host_path(path, library)?;
            about_library(&library.path, self.library(&place)?.as_ref())
        }));
        report
    }

    /// Returns the finding about a program if a library that its environment adds to it fails on the target. `name` is
    /// the library's path on the target, and `place` its path on this host, without links.
    pub fn preloaded(&self, name: &str, place: &Path) -> Option<Finding> {
        about_library(name, self.library(place)?.as_ref())
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

/// Returns the finding about a program that loads this library, if the library fails on the target. The program may
/// never call a function of the library that has an instruction which the core lacks.
fn about_library(path: &str, report: &Report) -> Option<Finding> {
    let worst = report.refused().find(|finding| !OF_LIBRARIES.contains(&finding.id))?;
    let found = format!("it loads {path}: {}: {}", worst.id, worst.found);
    let severity = if worst.id == "instructions" { Severity::Warned } else { Severity::Refused };
    Some(Finding::new("library", severity, found).offers(&*worst.offers).remedy(&*worst.remedy))
}
