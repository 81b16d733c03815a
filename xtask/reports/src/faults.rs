//! The episodes of `torture --faults`: how fast the device healed, and the episodes that failed.

use maud::{Markup, html};
use xtask_core::report::{FaultsReport, Report};

use crate::shortened;

/// The maximum number of characters of an error, and the maximum number of rows of a table.
const CHARACTERS: usize = 400;
const ROWS: usize = 300;

/// Returns the verdict of a run without a failed episode, in sentences.
pub(crate) fn verdict(faults: &FaultsReport, time: &str) -> String {
    format!(
        "The device was disturbed in {} episodes. Each time, it reached the desired state within the bound of its faults, \
         and nothing was lost. All of this took {time}.",
        faults.episodes.len()
    )
}

/// Returns the section of the page; nothing for other runs.
pub(crate) fn section(report: &Report) -> Markup {
    let Some(faults) = &report.faults else { return html! {} };
    let FaultsReport { seed, planned, episodes, healing } = faults;
    let failed = episodes.iter().filter(|episode| !episode.is_sound());
    html! {
        section {
            h2 { "Faults of the running device" }
            p {
                (episodes.len()) " of " (planned) " episodes were run"
                @if let Some(seed) = seed { " (seed " (seed) ")" }
                ". A device heals within the time of its faults' causes and 10 s."
            }
            @for episode in failed {
                h3 { "Episode " (episode.number) ": " (episode.schedule) }
                p { (shortened(&episode.detail, CHARACTERS)) }
                @if let Some(command) = &episode.command { pre { (command) } }
            }
            table {
                thead { tr { th { "faults" } th { "episodes" } th { "least" } th { "median" } th { "most" } th { "bound" } } }
                tbody {
                    @for row in healing.iter().take(ROWS) {
                        tr {
                            td { (row.faults.join(", ")) }
                            td { (row.count) }
                            td { (row.min_seconds) " s" }
                            td { (row.median_seconds) " s" }
                            td { (row.max_seconds) " s" }
                            td { (row.bound_seconds) " s" }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use xtask_core::report::{EpisodeReport, HealingReport};

    use super::*;
    use crate::samples;

    #[test]
    fn the_page_has_the_failed_episode_with_its_command_and_the_times() {
        let mut report = samples::verified();
        assert_eq!(section(&report).into_string(), "");
        let failed = EpisodeReport {
            number: 7,
            schedule: "link-down@1.0+4".to_owned(),
            detail: "the agent is <silent>".to_owned(),
            command: Some("cargo xtask torture --schedule link-down@1.0+4".to_owned()),
            ..EpisodeReport::default()
        };
        let row =
            HealingReport { faults: vec!["power-cut".to_owned()], count: 3, ..HealingReport::default() };
        report.faults =
            Some(FaultsReport { seed: Some(5), planned: 9, episodes: vec![failed], healing: vec![row] });
        let page = section(&report).into_string();
        for words in ["1 of 9 episodes", "seed 5", "Episode 7", "&lt;silent&gt;", "--schedule", "power-cut"] {
            assert!(page.contains(words), "{words}: {page}");
        }
        assert!(crate::words::verdict(&report).starts_with("The device was disturbed in 1 episodes"));
    }
}
