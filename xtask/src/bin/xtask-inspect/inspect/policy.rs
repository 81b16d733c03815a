//! Decides which findings count: `--deny`, `--allow` and `--baseline`.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result};
use inspect::finding::{CHECKS, Finding, Severity};
use serde::{Deserialize, Serialize};
use xtask_core::cli::{Deny, InspectArgs};
use xtask_core::error::Failure;
use xtask_core::fs::{read_if_there, write_atomically};

use super::verdict::Judged;

/// The schema of a baseline.
const SCHEMA: u32 = 1;

/// The flags that decide which findings count.
#[derive(Debug, Default)]
pub(super) struct Policy {
    /// The least severity that fails.
    pub(super) denied: Option<Severity>,
    allowed: BTreeSet<String>,
    baseline: BTreeSet<Entry>,
}

/// The reason why a finding does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Accepted {
    Allow,
    Baseline,
    /// The program ran without the failure of which the finding warns.
    Try,
}

impl Accepted {
    /// Returns the reason as a text for the user.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Allow => "accepted by --allow",
            Self::Baseline => "accepted by the baseline",
            Self::Try => "refuted by --try",
        }
    }
}

/// The file of `--baseline`.
#[derive(Debug, Serialize, Deserialize)]
struct Document {
    schema: u32,
    findings: BTreeSet<Entry>,
}

/// A finding in a baseline. Its text is not compared, because it changes with each build.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Entry {
    file: String,
    id: String,
    severity: String,
}

impl Entry {
    fn of(file: &str, finding: &Finding) -> Self {
        Self { file: file.to_owned(), id: finding.id.to_owned(), severity: finding.severity.to_string() }
    }
}

impl Policy {
    /// Reads the flags and the baseline.
    ///
    /// # Errors
    /// Returns a usage error for an unknown id, and for a baseline that cannot be read. With `--write-baseline`, the file
    /// need not exist.
    pub(super) fn from_args(args: &InspectArgs) -> Result<Self> {
        let unknown = |id: &&String| CHECKS.iter().all(|(known, _)| known != id);
        if let Some(id) = args.allow.iter().find(unknown) {
            let known: Vec<_> = CHECKS.iter().map(|(id, _)| *id).collect();
            let message = format!("--allow {id}: there is no such check; there are: {}", known.join(", "));
            return Err(Failure::usage(message).into());
        }
        let baseline = match &args.baseline {
            Some(path) if !args.write_baseline => read(path)?,
            _ => BTreeSet::new(),
        };
        let denied = args.deny.map(|Deny::Warned| Severity::Warned);
        Ok(Self { denied, allowed: args.allow.iter().cloned().collect(), baseline })
    }

    /// Returns the flag that accepts a finding; `None` if the finding counts.
    pub(super) fn accepts(&self, file: &str, finding: &Finding) -> Option<Accepted> {
        if self.allowed.contains(finding.id) {
            return Some(Accepted::Allow);
        }
        self.baseline.contains(&Entry::of(file, finding)).then_some(Accepted::Baseline)
    }

    /// Returns how many findings of the baseline no longer exist.
    pub(super) fn outdated(&self, judged: &[Judged]) -> usize {
        let current = entries(judged);
        self.baseline.iter().filter(|entry| !current.contains(entry)).count()
    }
}

fn entries(judged: &[Judged]) -> BTreeSet<Entry> {
    let of = |judged: &Judged| {
        let counted = judged.findings().filter(|(finding, accepted)| {
            finding.severity > Severity::Informs && matches!(accepted, None | Some(Accepted::Baseline))
        });
        counted.map(|(finding, _)| Entry::of(&judged.name, finding)).collect::<Vec<_>>()
    };
    judged.iter().flat_map(of).collect()
}

fn read(path: &Path) -> Result<BTreeSet<Entry>> {
    let unusable = |why: String| {
        let remedy = "write it with --write-baseline";
        Failure::usage(format!("--baseline {}: {why}; {remedy}", path.display()))
    };
    let text = read_if_there(path).map_err(|error| unusable(format!("{error:#}")))?;
    let text = text.ok_or_else(|| unusable("there is no such file".to_owned()))?;
    let document: Document = serde_json::from_slice(&text).map_err(|error| unusable(error.to_string()))?;
    if document.schema != SCHEMA {
        return Err(unusable(format!("its schema is {}, and {SCHEMA} is expected", document.schema)).into());
    }
    Ok(document.findings)
}

/// Writes all findings of severity `warned` and `refused` to a baseline. Returns their number.
pub(super) fn write(path: &Path, judged: &[Judged]) -> Result<usize> {
    let document = Document { schema: SCHEMA, findings: entries(judged) };
    write_atomically(path, serde_json::to_string_pretty(&document)? + "\n").with_context(|| {
        Failure::usage(format!("--baseline {}: the file cannot be written", path.display()))
    })?;
    Ok(document.findings.len())
}

#[cfg(test)]
mod tests {
    use inspect::finding::Report;

    use super::*;

    fn judged(policy: &Policy) -> Judged {
        let findings = vec![
            Finding::refused("needed", "it needs liba.so", "", ""),
            Finding::warned("rpath", "it names /build", "", ""),
            Finding::informs("size", "1 byte"),
        ];
        Judged::new("bin/a".to_owned(), Report::new(findings), policy)
    }

    fn args(change: impl Fn(&mut InspectArgs)) -> InspectArgs {
        let mut args = InspectArgs::default();
        change(&mut args);
        args
    }

    #[test]
    fn a_file_fails_for_what_is_denied_and_not_accepted() {
        let fails = |change: fn(&mut InspectArgs)| judged(&Policy::from_args(&args(change)).unwrap()).fails;
        assert!(fails(|_| {}));
        assert!(!fails(|args| args.allow = vec!["needed".to_owned()]));
        let allow_and_deny = |args: &mut InspectArgs| {
            (args.allow, args.deny) = (vec!["needed".to_owned()], Some(Deny::Warned));
        };
        assert!(fails(allow_and_deny));
        let mut tried = judged(&Policy::from_args(&args(|args| args.deny = Some(Deny::Warned))).unwrap());
        assert_eq!(tried.worst(), Severity::Refused);
        tried.add(Finding::informs("try", "it ran"), &["rpath", "needed"], &Policy::default());
        assert_eq!(
            (tried.worst(), tried.fails),
            (Severity::Refused, true),
            "a run does not refute a refusal"
        );
        assert!(
            tried
                .findings()
                .any(|(finding, accepted)| { finding.id == "rpath" && accepted == Some(Accepted::Try) })
        );
        assert!(!fails(|args| {
            args.allow = vec!["needed".to_owned(), "rpath".to_owned()];
            args.deny = Some(Deny::Warned);
        }));
    }

    #[test]
    fn an_unknown_id_is_a_usage_error_that_lists_the_ids() {
        let error = Policy::from_args(&args(|args| args.allow = vec!["nothing".to_owned()])).unwrap_err();
        assert_eq!(xtask_core::error::code(&error), 2);
        assert!(error.to_string().contains("allocator-page-size, "), "{error}");
    }

    #[test]
    fn a_baseline_accepts_what_it_lists_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("baseline.json");
        let with = |path: &Path| args(|args| args.baseline = Some(path.to_owned()));
        let error = |path: &Path| Policy::from_args(&with(path)).unwrap_err().to_string();
        assert!(error(&path).contains("no such file"));
        assert!(error(directory.path()).contains("Is a directory"), "{}", error(directory.path()));
        assert_eq!(write(&path, &[judged(&Policy::default())]).unwrap(), 2);
        let policy = Policy::from_args(&with(&path)).unwrap();
        let known = judged(&policy);
        assert!(!known.fails);
        assert_eq!(known.findings().filter(|(_, accepted)| accepted.is_some()).count(), 2);
        assert_eq!((policy.outdated(&[known]), policy.outdated(&[])), (0, 2));
        let other = Report::new(vec![Finding::refused("needed", "it needs liba.so", "", "")]);
        assert!(Judged::new("bin/b".to_owned(), other, &policy).fails, "another file");
        let error = write(&directory.path().join("absent/baseline.json"), &[]).unwrap_err();
        assert_eq!(xtask_core::error::code(&error), 2, "{error:#}");
        std::fs::write(&path, r#"{"schema": 9, "findings": []}"#).unwrap();
        assert!(Policy::from_args(&with(&path)).unwrap_err().to_string().contains("schema is 9"));
    }
}
