//! The outcome of a command: the exit code, the verdict, and errors with an exit code.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The outcome of a run. It determines the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// All requested phases passed.
    Verified,
    /// The agent or the guest failed verification.
    Failed,
    /// The host is not ready; nothing is known about the agent.
    Unavailable,
    /// The user stopped the run. This is also the verdict in the report of a run that was killed.
    #[default]
    Interrupted,
}

impl Verdict {
    /// Returns 0, 1, 69 (EX_UNAVAILABLE of sysexits.h) or 130 (128 + SIGINT).
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Verified => 0,
            Self::Failed => 1,
            Self::Unavailable => 69,
            Self::Interrupted => 130,
        }
    }
}

/// The exit code for a flag or argument that is not valid.
pub const EXIT_USAGE: u8 = 2;

/// The cause of a failure. It determines the exit code. An error without a [`Failure`] counts as a failure of the agent
/// or the guest (exit code 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A flag or an argument is not valid; exit code 2.
    Usage,
    /// The host is not ready; exit code 69.
    Host,
    /// A host on the network cannot be reached; exit code 69. Another image may be tested instead.
    Unreachable,
    /// The agent or the guest failed; exit code 1.
    Guest,
    /// Ctrl-C or SIGTERM ended the command; exit code 130.
    Interrupted,
    /// The run has already printed all messages. The command must still end with this exit code.
    Reported(u8),
}

impl Kind {
    /// Returns whether the outermost failure of an error is of this kind.
    pub fn is(self, error: &anyhow::Error) -> bool {
        failure(error).is_some_and(|failure| failure.kind == self)
    }

    /// Returns the verdict of a run that ended with this kind.
    pub fn verdict(self) -> Verdict {
        match self {
            Self::Usage | Self::Host | Self::Unreachable => Verdict::Unavailable,
            Self::Interrupted => Verdict::Interrupted,
            Self::Guest | Self::Reported(_) => Verdict::Failed,
        }
    }

    /// Returns the exit code of a command that ended with this kind.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Usage => EXIT_USAGE,
            Self::Reported(code) => code,
            other => other.verdict().exit_code(),
        }
    }
}

/// An error with an exit code and, if one is known, a remedy. It can be used alone or as the context of another error.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub kind: Kind,
    message: String,
    hint: Option<String>,
}

impl Failure {
    fn new(kind: Kind, message: impl Into<String>, hint: Option<String>) -> Self {
        Self { kind, message: message.into(), hint }
    }

    /// Makes a failure for a flag or an argument that is not valid.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message, None)
    }

    /// Makes a failure of the host; `hint` says what to run.
    pub fn host(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(Kind::Host, message, Some(hint.into()))
    }

    /// Makes a failure for a host on the network that cannot be reached: its name cannot be resolved, no connection or
    /// TLS session can be made, or a proxy refuses.
    pub fn unreachable(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(Kind::Unreachable, message, Some(hint.into()))
    }

    /// Makes a failure of the agent or the guest; `hint` says what to do.
    pub fn guest(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(Kind::Guest, message, Some(hint.into()))
    }

    /// Makes a failure for Ctrl-C or SIGTERM.
    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted", None)
    }

    /// Makes a failure for a run that has already printed all messages.
    pub fn reported(code: u8) -> Self {
        Self::new(Kind::Reported(code), format!("exit code {code}"), None)
    }

    /// Returns the remedy, if one is known.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

/// Returns from the function with a failure of the host: `bail_host!("use {path}: it is a file"; "delete it")`.
#[macro_export]
macro_rules! bail_host {
    ($message:literal $(, $argument:expr)*; $($hint:tt)+) => {
        return Err($crate::error::Failure::host(format!($message $(, $argument)*), format!($($hint)+)).into())
    };
}

/// Returns from the function with a failure of the agent or the guest; the syntax is that of [`bail_host!`].
#[macro_export]
macro_rules! bail_guest {
    ($message:literal $(, $argument:expr)*; $($hint:tt)+) => {
        return Err($crate::error::Failure::guest(format!($message $(, $argument)*), format!($($hint)+)).into())
    };
}

/// Returns the outermost failure in an error.
pub fn failure(error: &anyhow::Error) -> Option<&Failure> {
    error.downcast_ref()
}

/// Returns the kind of an error.
pub fn kind(error: &anyhow::Error) -> Kind {
    failure(error).map_or(Kind::Guest, |failure| failure.kind)
}

/// Returns the exit code of an error.
pub fn code(error: &anyhow::Error) -> u8 {
    kind(error).exit_code()
}

/// The kernel's messages about exhausted resources (strerror(3)), each with a remedy. QEMU and libvirt include them in
/// their own messages.
const SHORTAGES: &[(&str, &str)] = &[
    (
        "Cannot allocate memory",
        "free memory on this host, raise its limits (ulimit -v), or give the guest less with --memory 1024",
    ),
    (
        "No space left on device",
        "free space on the file system that the causes name: cargo xtask image prune deletes unused images; or set \
         IOT_XTASK_CACHE to a larger one",
    ),
    ("Disk quota exceeded", "free space within the quota, or set IOT_XTASK_CACHE to another file system"),
    ("Too many open files", "raise the limit of open files: ulimit -n 4096"),
];

/// Returns the remedy if an error or one of its causes says that this host has run out of memory, space or open files.
pub fn shortage(error: &anyhow::Error) -> Option<&'static str> {
    let text = format!("{error:#}");
    SHORTAGES.iter().find(|(words, _)| text.contains(words)).map(|(_, remedy)| *remedy)
}

/// Turns an error without a [`Failure`] into a failure of the host: nothing is then known about the agent. If the error
/// says that the host has run out of a resource, the remedy for this shortage replaces `hint`.
///
/// An error that already has a [`Failure`] is returned unchanged. The exception is [`Kind::Unreachable`]: such an error
/// becomes a failure of the host with the same remedy.
pub fn host_fault(
    error: anyhow::Error,
    attempted: impl Into<String>,
    hint: impl Into<String>,
) -> anyhow::Error {
    let hint = match failure(&error) {
        Some(Failure { kind: Kind::Unreachable, hint: Some(own), .. }) => own.clone(),
        Some(_) => return error,
        None => shortage(&error).map_or_else(|| hint.into(), str::to_owned),
    };
    error.context(Failure::host(attempted, hint))
}

/// Returns the lines to print on stderr for an error. There are none if the run has already printed all messages.
pub fn lines(error: &anyhow::Error) -> Vec<String> {
    if matches!(kind(error), Kind::Reported(_)) {
        return Vec::new();
    }
    let mut lines = vec![format!("error: {error}")];
    lines.extend(error.chain().skip(1).map(|cause| format!("  caused by: {cause}")));
    lines.extend(hint(error).map(|hint| format!("  what to do: {hint}")));
    lines
}

/// Returns the remedy of an error, if one is known.
pub fn hint(error: &anyhow::Error) -> Option<&str> {
    failure(error)?.hint()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn a_code_survives_context() {
        let table = [
            (Failure::usage("--cpu z80: no such model").into(), 2),
            (Failure::host("no QEMU", "install it").into(), 69),
            (Failure::interrupted().into(), 130),
            (Failure::guest("no status", "read its journal").into(), 1),
            (anyhow::anyhow!("the guest panicked"), 1),
        ];
        for (error, expected) in table {
            let is_plain = failure(&error).is_none();
            let error: anyhow::Error = Err::<(), _>(error).context("smoke").unwrap_err();
            assert_eq!(code(&error), expected, "{error:#}");
            let fault = code(&host_fault(error, "start the broker", "install it"));
            assert_eq!(fault, if is_plain { 69 } else { expected });
        }
    }

    #[test]
    fn a_failure_keeps_its_kind_and_an_unreachable_host_its_remedy() {
        let interrupted = host_fault(Failure::interrupted().into(), "start it", "see the causes");
        assert_eq!((code(&interrupted), hint(&interrupted)), (130, None));
        let unreachable = anyhow::Error::new(Failure::unreachable("reach h", "ask its owner"));
        let fault = host_fault(unreachable, "fetch it", "check the network");
        assert_eq!((code(&fault), hint(&fault)), (69, Some("ask its owner")));
    }

    #[test]
    fn a_shortage_of_the_host_has_its_own_remedy() {
        let table = [
            ("cannot set up guest memory 'pc.ram': Cannot allocate memory", "--memory"),
            ("write /c/x: No space left on device (os error 28)", "image prune"),
            ("open /c/x: Too many open files (os error 24)", "ulimit -n"),
            ("internal error: no such machine", "see the causes"),
        ];
        for (cause, remedy) in table {
            let error = anyhow::anyhow!(cause).context("start the domain");
            let fault = host_fault(error, "start the machine", "see the causes");
            assert_eq!(code(&fault), 69);
            assert!(hint(&fault).unwrap().contains(remedy), "{cause}: {:?}", hint(&fault));
        }
    }

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
}
