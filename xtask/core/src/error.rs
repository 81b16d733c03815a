//! Errors whose exit code is not 1, found again at the top by their type.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a run ended. The exit code follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// All of it was proven.
    Verified,
    /// The agent or the guest failed verification.
    Failed,
    /// The host is not ready; nothing is known about the agent.
    Unavailable,
    /// Somebody stopped the run.
    Interrupted,
}

impl Verdict {
    /// 0, 1, 69 (sysexits.h's EX_UNAVAILABLE), 130 (128 + SIGINT).
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Verified => 0,
            Self::Failed => 1,
            Self::Unavailable => 69,
            Self::Interrupted => 130,
        }
    }
}

/// The exit code for a flag or argument that cannot be.
pub const EXIT_USAGE: u8 = 2;

/// A flag or argument that cannot be; exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

/// The host is not ready; exit code 69.
#[derive(Debug)]
pub struct Unavailable {
    /// What is missing.
    pub error: String,
    /// What to run.
    pub hint: String,
}

/// The agent or the guest failed, and what to do about it is known; exit code 1.
#[derive(Debug, Clone)]
pub struct Diagnosis {
    /// What was seen.
    pub error: String,
    /// What to do.
    pub hint: String,
}

impl Diagnosis {
    /// Both parts.
    pub fn new(error: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { error: error.into(), hint: hint.into() }
    }
}

/// Ctrl-C or SIGTERM; exit code 130.
#[derive(Debug)]
pub struct Interrupted;

/// The run has said everything itself; only the code is left.
#[derive(Debug)]
pub struct SilentExit(pub u8);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error)
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error)
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl fmt::Display for SilentExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit code {}", self.0)
    }
}

impl std::error::Error for Usage {}
impl std::error::Error for Unavailable {}
impl std::error::Error for Diagnosis {}
impl std::error::Error for Interrupted {}
impl std::error::Error for SilentExit {}

/// The exit code for an error.
pub fn code(error: &anyhow::Error) -> u8 {
    if let Some(SilentExit(code)) = error.downcast_ref() {
        *code
    } else if error.is::<Usage>() {
        EXIT_USAGE
    } else {
        verdict(error).exit_code()
    }
}

/// Makes an error of the host's part, unless it is one with a code of its own: nothing is known about the agent then.
pub fn host_fault(
    error: anyhow::Error,
    attempted: impl Into<String>,
    hint: impl Into<String>,
) -> anyhow::Error {
    if error.is::<Unavailable>()
        || error.is::<Usage>()
        || error.is::<Interrupted>()
        || error.is::<Diagnosis>()
    {
        return error;
    }
    error.context(Unavailable { error: attempted.into(), hint: hint.into() })
}

/// The verdict of a run that ended in this error.
pub fn verdict(error: &anyhow::Error) -> Verdict {
    if error.is::<Unavailable>() || error.is::<Usage>() {
        Verdict::Unavailable
    } else if error.is::<Interrupted>() {
        Verdict::Interrupted
    } else {
        Verdict::Failed
    }
}

/// What a task's error says on stderr; empty where the run has said everything itself.
pub fn lines(error: &anyhow::Error) -> Vec<String> {
    if error.is::<SilentExit>() {
        return Vec::new();
    }
    let mut lines = vec![format!("error: {error}")];
    lines.extend(error.chain().skip(1).map(|cause| format!("  caused by: {cause}")));
    lines.extend(hint(error).map(|hint| format!("  what to do: {hint}")));
    lines
}

/// What to do about an error, where that is known.
pub fn hint(error: &anyhow::Error) -> Option<&str> {
    let unavailable = error.downcast_ref().map(|Unavailable { hint, .. }| hint.as_str());
    unavailable.or_else(|| error.downcast_ref().map(|Diagnosis { hint, .. }| hint.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let table = [
            (Verdict::Verified, 0),
            (Verdict::Failed, 1),
            (Verdict::Unavailable, 69),
            (Verdict::Interrupted, 130),
        ];
        for (verdict, code) in table {
            assert_eq!(verdict.exit_code(), code);
        }
    }

    #[test]
    fn a_code_survives_context() {
        let table = [
            (anyhow::Error::new(Usage("--cpu z80: no such model".into())), 2),
            (anyhow::Error::new(Unavailable { error: "no QEMU".into(), hint: "install it".into() }), 69),
            (anyhow::Error::new(Interrupted), 130),
            (anyhow::anyhow!("the guest panicked"), 1),
        ];
        for (error, expected) in table {
            let error = Err::<(), _>(error).context("smoke").unwrap_err();
            assert_eq!(code(&error), expected, "{error:#}");
            let fault = code(&host_fault(error, "start the broker", "install it"));
            assert_eq!(fault, if expected == 1 { 69 } else { expected });
        }
    }
}
