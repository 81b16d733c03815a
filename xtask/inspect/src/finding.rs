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

/// The number of details and of paths in a finding.
pub(crate) const MOST: usize = 8;

/// All findings about one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The findings, the worst first.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Sorts the findings by their severity, the worst first, and then in the order of the checks.
    pub fn new(mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        Self { findings }
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
