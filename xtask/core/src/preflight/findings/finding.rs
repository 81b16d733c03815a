//! What is said of a machine: a finding, how bad it is, and what to do about it.

use clap::ValueEnum;
use serde::Serialize;

use crate::arch::VmArchitecture;
use crate::host::packages::Need;

/// The id of what the test suite alone lacks.
pub const CI_PROGRAM: &str = "ci-program";

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// No run can succeed.
    Blocks,
    /// It works, worse than it could.
    Degrades,
    /// Good to know.
    Informs,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable, for machines.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is so, in a few words.
    pub sentence: String,
    /// What was looked at: a path, a version, a command's output.
    pub evidence: String,
    /// What to do.
    pub remedy: Option<Remedy>,
}

/// What to do about a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    /// Install what brings it.
    #[serde(serialize_with = "serialize_need")]
    Install(Need, VmArchitecture),
    /// Run this as root.
    RunAsRoot(Vec<Vec<String>>),
    /// Run this as oneself.
    Run(Vec<String>),
    /// Something that only a person can do.
    Manual(String),
}

fn serialize_need<S: serde::Serializer>(
    need: &Need,
    arch: &VmArchitecture,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format!("{need:?} for {arch}"))
}

impl<S: Into<String>> From<S> for Remedy {
    fn from(words: S) -> Self {
        Self::Manual(words.into())
    }
}

impl Finding {
    /// No run can succeed, until that is done.
    pub fn blocks(
        id: &'static str,
        sentence: impl Into<String>,
        evidence: impl Into<String>,
        remedy: impl Into<Remedy>,
    ) -> Self {
        Self { severity: Severity::Blocks, ..Self::informs(id, sentence, evidence).with(remedy) }
    }

    /// It works, worse than it could.
    pub fn degrades(
        id: &'static str,
        sentence: impl Into<String>,
        evidence: impl Into<String>,
        remedy: impl Into<Remedy>,
    ) -> Self {
        Self { severity: Severity::Degrades, ..Self::informs(id, sentence, evidence).with(remedy) }
    }

    /// Good to know.
    pub fn informs(id: &'static str, sentence: impl Into<String>, evidence: impl Into<String>) -> Self {
        let (sentence, evidence) = (sentence.into(), evidence.into());
        Self { id, severity: Severity::Informs, sentence, evidence, remedy: None }
    }

    /// What only a person can do about it.
    pub fn by_hand(&self) -> Option<&str> {
        match &self.remedy {
            Some(Remedy::Manual(text)) => Some(text),
            _ => None,
        }
    }

    /// With something to do about it.
    pub fn with(self, remedy: impl Into<Remedy>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}
