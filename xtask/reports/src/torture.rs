//! The crash states of `torture`: how many were judged, what they lose, and the ones that were booted.

use maud::{Markup, html};
use xtask_core::report::{Report, TortureReport};

use crate::shortened;

/// The maximum number of characters of a sentence, and the maximum numbers of sentences and of boots.
const CHARACTERS: usize = 400;
const SENTENCES: usize = 8;
const BOOTS: usize = 40;

/// Returns the verdict of a torture that was verified, in sentences.
pub(crate) fn verdict(torture: &TortureReport, time: &str) -> String {
    let TortureReport { states, boots, .. } = torture;
    format!(
        "{states} crash states were judged, and none of them loses anything that the agent had acknowledged. {} of them were \
         booted, and the device reached the desired state each time. All of this took {time}.",
        boots.len()
    )
}

/// Returns the section of the page; nothing for a smoke.
pub(crate) fn section(report: &Report) -> Markup {
    let Some(torture) = &report.torture else { return html! {} };
    let TortureReport { seed, states, states_per_minute, log_entries, log_flushes, .. } = torture;
    let TortureReport { acknowledgements, checked, failed, failures, boots, .. } = torture;
    html! {
        section {
            h2 { "Crash states" }
            p {
                (failed) " of " (states) " states lose something (seed " (seed) ", " (states_per_minute) " states a minute). The log has "
                (log_entries) " entries, " (log_flushes) " of them flushes, and " (acknowledgements)
                " acknowledgements. e2fsck has checked " (checked) " states."
            }
            @for failure in failures {
                h3 { "State " (failure.number) ", cut off before entry " (failure.point) }
                ul {
                    @for text in failure.losses.iter().take(SENTENCES) { li { (shortened(text, CHARACTERS)) } }
                    @for text in failure.missing.iter().take(SENTENCES) {
                        li { "missing: " (shortened(text, CHARACTERS)) }
                    }
                }
                pre { (failure.command) }
            }
            @if !boots.is_empty() {
                table {
                    thead { tr { th { "state" } th { "device" } th { "detail" } } }
                    tbody {
                        @for boot in boots.iter().take(BOOTS) {
                            tr {
                                td { (boot.number) }
                                td { @if boot.converged { "converged" } @else { "did not converge" } }
                                td { (shortened(&boot.detail, CHARACTERS)) }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use xtask_core::report::{CrashBootReport, CrashStateReport};

    use super::*;
    use crate::samples;

    #[test]
    fn the_page_names_the_loss_and_the_command() {
        let mut report = samples::verified();
        assert_eq!(section(&report).into_string(), "");
        let failure = CrashStateReport {
            number: 17,
            point: 312,
            losses: vec!["/var/lib/iot-agent/state is <empty>.".to_owned()],
            missing: vec!["write 311 (8 sectors): the content of the state".to_owned()],
            command: "cargo xtask torture --state state-17.json".to_owned(),
        };
        let boot = CrashBootReport { number: 17, converged: false, detail: "no status".to_owned() };
        report.torture = Some(TortureReport {
            states: 300,
            failed: 1,
            failures: vec![failure],
            boots: vec![boot],
            ..TortureReport::default()
        });
        let page = section(&report).into_string();
        for words in [
            "1 of 300 states",
            "state is &lt;empty&gt;",
            "missing: write 311",
            "--state state-17.json",
            "did not converge",
        ] {
            assert!(page.contains(words), "{words}: {page}");
        }
        assert!(crate::words::verdict(&report).starts_with("300 crash states were judged"));
    }
}
