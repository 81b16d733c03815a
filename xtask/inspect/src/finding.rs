//! What was found, what the target offers, what to do: the report and its parts.

use serde::Serialize;

/// The schema number of the report as JSON.
pub const SCHEMA: u32 = 1;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It is as it is.
    Informs,
    /// It may fail there, and cannot be told from here.
    Warned,
    /// It fails there.
    Refused,
}

/// As the report writes it.
impl std::fmt::Display for Severity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// One finding. Ids are an interface: they are never given another meaning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Which check.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is in the file.
    pub found: String,
    /// What the target has to it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub offers: String,
    /// What to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
    /// Symbols, functions, libraries: at most a few.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}

impl Finding {
    /// Something that the target refuses.
    pub fn refused(id: &'static str, found: &str, offers: &str, remedy: &str) -> Self {
        Self::refused_if(true, id, found, offers, remedy)
    }

    /// Something that may fail.
    pub fn warned(id: &'static str, found: &str, offers: &str, remedy: &str) -> Self {
        Self::refused_if(false, id, found, offers, remedy)
    }

    /// Something that fails where it is certain to be met, and may fail where it may be met.
    pub fn refused_if(certain: bool, id: &'static str, found: &str, offers: &str, remedy: &str) -> Self {
        let severity = if certain { Severity::Refused } else { Severity::Warned };
        Self::new(id, severity, found).offers(offers).remedy(remedy)
    }

    /// Something good to know.
    pub fn informs(id: &'static str, found: impl Into<String>) -> Self {
        Self::new(id, Severity::Informs, found)
    }

    /// Without what the target offers and without a remedy.
    pub fn new(id: &'static str, severity: Severity, found: impl Into<String>) -> Self {
        let (offers, remedy, details) = Default::default();
        Self { id, severity, found: found.into(), offers, remedy, details }
    }

    /// With what the target offers.
    #[must_use]
    pub fn offers(mut self, offers: impl Into<String>) -> Self {
        self.offers = offers.into();
        self
    }

    /// With what to do.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// With names; of many the first few.
    #[must_use]
    pub fn details(mut self, all: impl IntoIterator<Item = String>) -> Self {
        const MOST: usize = 8;
        let mut all = all.into_iter();
        self.details = all.by_ref().take(MOST).collect();
        let more = all.count();
        if more > 0 {
            self.details.push(format!("and {more} more"));
        }
        self
    }
}

/// Everything that was found in one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The findings, the worst first.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Sorted: the worst first, else as the checks run.
    pub fn new(mut findings: Vec<Finding>) -> Self {
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        Self { findings }
    }

    /// Those that the target refuses.
    pub fn refused(&self) -> impl Iterator<Item = &Finding> {
        self.of(Severity::Refused)
    }

    /// Those of a severity.
    pub fn of(&self, severity: Severity) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(move |finding| finding.severity == severity)
    }

    /// Whether nothing is refused.
    pub fn is_sound(&self) -> bool {
        self.refused().next().is_none()
    }
}
