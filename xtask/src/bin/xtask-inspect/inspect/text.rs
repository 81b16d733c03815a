//! The text on stderr: the findings about one file, or a table of many files, the worst first.

use inspect::finding::{Finding, Severity};
use xtask_core::cli::Verbosity;
use xtask_core::message;

use super::collection::{Collection, Content, Subject};
use super::policy::Accepted;
use super::verdict::{Judged, verdict};

/// The details that are shown if not all are requested.
const SHOWN: usize = 8;

/// How much of each finding is shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Depth {
    pub(super) quiet: bool,
    /// All details of all findings.
    pub(super) facts: bool,
    /// All details of refused and warned findings (`--explain`).
    pub(super) explained: bool,
}

impl Depth {
    pub(super) fn new(verbosity: Verbosity, explained: bool) -> Self {
        Self { quiet: verbosity.quiet, facts: verbosity.verbose, explained }
    }

    fn is_whole(self, finding: &Finding) -> bool {
        self.facts || (self.explained && finding.severity > Severity::Informs)
    }
}

/// Prints the findings about one file, and the verdict.
pub(super) fn print_one(judged: &Judged, collection: &Collection, depth: Depth) {
    if !depth.quiet {
        for (finding, accepted) in judged.findings().filter(|(finding, _)| is_shown(finding, depth)) {
            lines(finding, accepted, depth.is_whole(finding)).iter().for_each(|line| message!("{line}"));
        }
    }
    let verdict = shown(judged.verdict());
    let warnings = judged
        .findings()
        .filter(|(finding, accepted)| finding.severity == Severity::Warned && accepted.is_none())
        .count();
    let warned = if warnings == 0 { String::new() } else { format!(", {warnings} warning(s)") };
    let inspection = &collection.judges[collection.subjects[0].judge].inspection;
    message!("{verdict}{warned}: {} on {} with {}", judged.name, inspection.device.name, inspection.name());
}

/// Prints the files with findings that are no facts, also those that a flag accepts, the worst first, and the number of
/// files of each severity.
pub(super) fn print_many(judged: &[Judged], collection: &Collection, depth: Depth) {
    let mut order: Vec<_> = judged.iter().zip(&collection.subjects).collect();
    order.sort_by_key(|(judged, subject)| {
        (std::cmp::Reverse(judged.worst()), !subject.is_entrypoint, &judged.name)
    });
    for (judged, subject) in order.iter().filter(|_| !depth.quiet) {
        let has_more = judged.findings().any(|(finding, _)| finding.severity > Severity::Informs);
        if has_more || depth.facts {
            print_row(judged, subject, depth);
        }
    }
    for line in collection.unreadable.iter().filter(|_| !depth.quiet) {
        message!("not read: {line}");
    }
    let count = |severity| judged.iter().filter(|judged| judged.worst() == severity).count();
    let (refused, warned) = (count(Severity::Refused), count(Severity::Warned));
    let mut parts =
        vec![format!("{} files", judged.len()), format!("{refused} refused"), format!("{warned} warned")];
    if collection.objects > 0 {
        parts.push(format!("{} object files not judged", collection.objects));
    }
    if !collection.unreadable.is_empty() {
        parts.push(format!("{} not read", collection.unreadable.len()));
    }
    let verdict = shown(verdict(judged, collection));
    message!("{verdict}: {}{}", parts.join(", "), targets(collection));
}

/// Returns a verdict for the last line, in capitals if it fails.
fn shown(verdict: &str) -> String {
    if verdict == "sound" { verdict.to_owned() } else { verdict.to_uppercase() }
}

fn print_row(judged: &Judged, subject: &Subject, depth: Depth) {
    let word = match judged.worst() {
        Severity::Informs => "sound".to_owned(),
        worst => worst.to_string(),
    };
    let mut about = Vec::new();
    if subject.is_entrypoint {
        about.push("entrypoint".to_owned());
    }
    if let Some(layer) = subject.layer.as_ref().filter(|layer| !layer.is_empty()) {
        about.push(format!("layer: {}", first_words(layer)));
    }
    let about = if about.is_empty() { String::new() } else { format!(" ({})", about.join(", ")) };
    message!("{word:<8} {}{about}", judged.name);
    for (finding, accepted) in judged.findings() {
        if depth.is_whole(finding) {
            lines(finding, accepted, true).iter().for_each(|line| message!("         {line}"));
        } else if finding.severity > Severity::Informs || finding.id == "try" {
            message!("         {}: {}{}", finding.id, finding.found, suffix(accepted));
            let shown = !finding.remedy.is_empty() && finding.severity == Severity::Refused;
            if shown {
                message!("           what to do: {}", finding.remedy);
            }
        }
    }
}

/// Returns the beginning of a layer's command, which can have many lines.
fn first_words(command: &str) -> String {
    const WORDS: usize = 8;
    let mut words = command.split_whitespace();
    let mut shown: Vec<_> = words.by_ref().take(WORDS).collect();
    if words.next().is_some() {
        shown.push("…");
    }
    shown.join(" ")
}

/// Returns the devices and the places of the libraries: `; on pi5 with debian-12`. A damaged archive was
/// compared with none of them.
fn targets(collection: &Collection) -> String {
    let used: std::collections::BTreeSet<_> = collection
        .subjects
        .iter()
        .filter(|subject| subject.container.is_some() || matches!(subject.content, Content::File(_)))
        .map(|subject| {
            let inspection = &collection.judges[subject.judge].inspection;
            let files = if subject.container.is_some() { "the files of " } else { "" };
            format!("{} with {files}{}", inspection.device.name, inspection.name())
        })
        .collect();
    if used.is_empty() {
        return String::new();
    }
    format!("; on {}", used.into_iter().collect::<Vec<_>>().join(", "))
}

/// Returns whether a finding about one file is shown. A fact is shown without `-v` if it has a remedy, if it lists
/// instructions that are guarded by a check at run time, or if it is the result of a run.
fn is_shown(finding: &Finding, depth: Depth) -> bool {
    finding.severity > Severity::Informs
        || depth.facts
        || !finding.remedy.is_empty()
        || finding.id == "try"
        || (finding.id == "instructions" && !finding.details.is_empty())
}

fn suffix(accepted: Option<Accepted>) -> String {
    accepted.map_or(String::new(), |accepted| format!(" ({})", accepted.reason()))
}

fn lines(finding: &Finding, accepted: Option<Accepted>, all: bool) -> Vec<String> {
    let first = format!("{:<8} {}: {}{}", finding.severity, finding.id, finding.found, suffix(accepted));
    let mut lines = vec![first];
    let rest = [("the target", &finding.offers), ("what to do", &finding.remedy)];
    lines.extend(
        rest.iter()
            .filter(|(_, text)| !text.is_empty())
            .map(|(what, text)| format!("         {what}: {text}")),
    );
    let shown = if all { finding.details.len() } else { SHOWN.min(finding.details.len()) };
    lines.extend(finding.details[..shown].iter().map(|detail| format!("         - {detail}")));
    let more = finding.details.len() - shown;
    if more > 0 {
        lines.push(format!("         - and {more} more, which --explain, -v and --json list"));
    }
    let paths = finding.paths.iter().filter(|_| all);
    lines.extend(paths.map(|path| format!("         reached through {path}")));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_the_first_details_and_says_how_many_there_are() {
        let finding = Finding::informs("needed", "").details((0..20).map(|number| number.to_string()));
        let lines = [lines(&finding, None, false), lines(&finding, None, true)];
        assert_eq!(lines.each_ref().map(Vec::len), [1 + SHOWN + 1, 1 + 20]);
        assert!(lines[0].last().unwrap().contains("12 more"));
    }

    #[test]
    fn an_explained_finding_has_the_calls_that_lead_to_it() {
        let finding = Finding::refused("instructions", "", "", "").paths(["_start > main".to_owned()]);
        let shown = |depth: Depth| lines(&finding, None, depth.is_whole(&finding)).concat();
        let depth = Depth { quiet: false, facts: false, explained: true };
        assert!(shown(depth).contains("_start > main"));
        assert!(!shown(Depth { explained: false, ..depth }).contains("_start > main"));
        assert!(!depth.is_whole(&Finding::informs("size", "")));
    }

    #[test]
    fn a_long_command_of_a_layer_is_cut_between_words() {
        assert_eq!(first_words("COPY a b"), "COPY a b");
        assert_eq!(first_words("RUN a\n b c d e f g h"), "RUN a b c d e f g …");
    }
}
