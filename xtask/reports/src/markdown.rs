//! A summary in Markdown for the page of a CI job, and the annotations of GitHub and Gitea.

use xtask_core::error::Verdict;
use xtask_core::format::{human_seconds, name_of};
use xtask_core::job::annotation;
use xtask_core::output::plain;
use xtask_core::report::{FailureReport, Report};

use crate::words::{cleaned, not_tested, status_word, verdict};

/// Returns the summary: the verdict, the failure, the phases, and what was not tested.
pub fn markdown(report: &Report) -> String {
    let report = &cleaned(report);
    let mut text = format!("## {}\n\n{}\n", escaped(&report.verdict_line()), verdict(report));
    if let Some(failure) = &report.failure {
        let fence = "````";
        let lines: Vec<_> = failure.lines().iter().map(|line| plain(&line.replace(fence, "'''"))).collect();
        text.push_str(&format!("\n{fence}text\n{}\n{fence}\n", lines.join("\n")));
    }
    text.push_str("\n| phase | outcome | time | |\n|---|---|---|---|\n");
    for phase in &report.phases {
        let (title, word) = (phase.name.title(), status_word(phase.status));
        let detail = escaped(&phase.detail);
        text.push_str(&format!("| {title} | {word} | {} | {detail} |\n", human_seconds(phase.seconds)));
    }
    let limitations = not_tested(report);
    if !limitations.is_empty() {
        text.push_str("\n### Not tested, or tested differently\n\n");
        text.extend(limitations.iter().map(|sentence| format!("- {}\n", escaped(sentence))));
    }
    text
}

/// Returns a text of one line that Markdown shows as it is.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\r' => escaped.push(' '),
            '\\' | '`' | '*' | '_' | '<' | '>' | '[' | ']' | '|' | '#' | '~' => {
                escaped.extend(['\\', character])
            }
            '&' => escaped.push_str("&amp;"),
            character => escaped.push(character),
        }
    }
    escaped
}

/// Returns the annotations of a run, one per line.
pub fn annotations(report: &Report) -> Vec<String> {
    let report = &cleaned(report);
    let failure = report.failure.iter().map(|failure| {
        let (verdict, phase) = (name_of(&report.verdict), failure.phase.title());
        let title = format!("smoke of {} {verdict} in {phase}", report.guest.arch);
        let without_console = FailureReport { console_tail: Vec::new(), ..failure.clone() };
        annotation("error", &title, &without_console.lines().join("\n"))
    });
    let is_judged = [Verdict::Verified, Verdict::Failed].contains(&report.verdict);
    let limitations = not_tested(report).into_iter().filter(|_| is_judged);
    let title = format!("smoke of {}", report.guest.arch);
    failure.chain(limitations.map(|sentence| annotation("notice", &title, &sentence))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    #[test]
    fn a_summary_has_the_verdict_the_failure_and_each_phase() {
        let text = markdown(&samples::failed());
        for words in [
            "## FAILED  iot-agent on aarch64",
            "error: power cut: ask root in the guest",
            "| power cut | failed | 5.5 s | ask root in the guest |",
            "| rejoin | not reached |",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(!markdown(&samples::verified()).contains("error:"));
        assert_eq!(escaped("a|b <i> *c*\n"), "a\\|b \\<i\\> \\*c\\* ");
    }

    #[test]
    fn an_annotation_is_one_line() {
        let annotations = annotations(&samples::failed());
        assert_eq!(
            annotations[0],
            "::error title=smoke of aarch64 failed in power cut::error: power cut: ask root in the guest%0A  caused by: systemd \
             has restarted the agent 1 time%0A  what to do: read its journal"
        );
        assert!(
            annotations[1].starts_with("::notice title=smoke of aarch64::These phases"),
            "{annotations:?}"
        );
        assert!(super::annotations(&samples::verified()).is_empty());
        assert_eq!(super::annotations(&samples::unavailable()).len(), 1);
    }
}
