//! Defines a finding about a machine, with its severity and its remedy.

use clap::ValueEnum;
use serde::Serialize;

use crate::arch::VmArchitecture;
use crate::host::packages::Need;

/// The id of the finding about a missing program that only the test suite needs.
pub const CI_PROGRAM: &str = "ci-program";

/// The id of the finding about a missing program that `torture` needs besides the programs of every run.
pub const TORTURE_PROGRAM: &str = "torture-program";

/// The severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// No run can succeed.
    Blocks,
    /// A run works, but with a disadvantage, such as slow emulation.
    Degrades,
    /// A fact that explains what a run does.
    Informs,
}

/// A fact about a machine that the user should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The stable id, for programs that read the JSON.
    pub id: &'static str,
    pub severity: Severity,
    /// A short sentence that says what was found.
    pub sentence: String,
    /// The evidence: a path, a version, or a command's output.
    pub evidence: String,
    /// The action that repairs the problem; `None` if no action is needed or known.
    pub remedy: Option<Remedy>,
}

/// An action that repairs the problem of a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    /// Install the packages that provide a program or file for guests of this architecture.
    #[serde(serialize_with = "serialize_need")]
    Install(Need, VmArchitecture),
    /// Run these commands as root.
    RunAsRoot(Vec<Vec<String>>),
    /// Run this command as the user.
    Run(Vec<String>),
    /// Do this by hand; no command is known.
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
    /// Makes a finding that blocks.
    pub fn blocks(
        id: &'static str,
        sentence: impl Into<String>,
        evidence: impl Into<String>,
        remedy: impl Into<Remedy>,
    ) -> Self {
        Self { severity: Severity::Blocks, ..Self::informs(id, sentence, evidence).with(remedy) }
    }

    /// Makes a finding that degrades.
    pub fn degrades(
        id: &'static str,
        sentence: impl Into<String>,
        evidence: impl Into<String>,
        remedy: impl Into<Remedy>,
    ) -> Self {
        Self { severity: Severity::Degrades, ..Self::informs(id, sentence, evidence).with(remedy) }
    }

    /// Makes a finding that only informs.
    pub fn informs(id: &'static str, sentence: impl Into<String>, evidence: impl Into<String>) -> Self {
        let (sentence, evidence) = (sentence.into(), evidence.into());
        Self { id, severity: Severity::Informs, sentence, evidence, remedy: None }
    }

    /// Returns the remedy if the user must carry it out by hand.
    pub fn by_hand(&self) -> Option<&str> {
        match &self.remedy {
            Some(Remedy::Manual(text)) => Some(text),
            _ => None,
        }
    }

    /// Adds a remedy.
    pub fn with(self, remedy: impl Into<Remedy>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}
