//! The healing times of the episodes, for `report.json` and for the screen.

use std::collections::BTreeMap;

use xtask_core::cli::{DeviceFault, Schedule};
use xtask_core::format::{human_seconds, round};
use xtask_core::report::{HealingReport, SlowHealing};

/// A healing counts as slow if it takes more than this multiple of the median.
const SLOW: f64 = 3.0;

/// An episode in which the device healed.
#[derive(Debug, Clone, PartialEq)]
pub struct Healed {
    /// The number of the episode.
    pub episode: usize,
    pub schedule: Schedule,
    /// The time from the end of the last fault until the device had healed.
    pub seconds: f64,
    /// The bound of the episode on this machine.
    pub bound_seconds: f64,
}

/// Returns the healing times of each fault and of each pair, those with the slowest median first. The faults of a pair
/// are not counted alone, because each of them can delay the healing from the other one.
pub fn statistics(healed: &[Healed]) -> Vec<HealingReport> {
    let mut groups: BTreeMap<Vec<DeviceFault>, Vec<&Healed>> = BTreeMap::new();
    for one in healed {
        let faults = one.schedule.faults().iter().map(|scheduled| scheduled.fault).collect();
        groups.entry(faults).or_default().push(one);
    }
    let mut rows: Vec<_> = groups.into_iter().map(|(faults, group)| row(&faults, group)).collect();
    let slowness = |row: &HealingReport| (row.median_seconds, row.max_seconds);
    rows.sort_by(|one, other| {
        let ((median, max), (other_median, other_max)) = (slowness(one), slowness(other));
        other_median.total_cmp(&median).then(other_max.total_cmp(&max))
    });
    rows
}

fn row(faults: &[DeviceFault], mut group: Vec<&Healed>) -> HealingReport {
    group.sort_by(|one, other| other.seconds.total_cmp(&one.seconds));
    let seconds: Vec<_> = group.iter().map(|healed| healed.seconds).collect();
    let median = median(&seconds);
    let slow = group.iter().take_while(|healed| healed.seconds > SLOW * median);
    HealingReport {
        faults: faults.iter().map(ToString::to_string).collect(),
        count: group.len(),
        min_seconds: round(seconds.last().copied().unwrap_or_default()),
        median_seconds: round(median),
        max_seconds: round(seconds.first().copied().unwrap_or_default()),
        bound_seconds: round(group.iter().map(|healed| healed.bound_seconds).fold(0.0, f64::max)),
        slow: slow
            .map(|healed| SlowHealing { episode: healed.episode, seconds: round(healed.seconds) })
            .collect(),
    }
}

/// Returns the median of sorted numbers: the mean of the two middle ones if their number is even. Zero for none.
fn median(sorted: &[f64]) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    f64::midpoint(sorted[last / 2], sorted[last.div_ceil(2)])
}

/// Returns the rows as a table for the screen, without an end of line after the last row.
pub fn table(rows: &[HealingReport]) -> String {
    const TITLES: [&str; 6] = ["episodes", "min", "median", "max", "bound", "above 3 × median"];
    let names: Vec<_> = rows.iter().map(|row| row.faults.join(", ")).collect();
    let width = names.iter().map(String::len).chain(["fault".len()]).max().unwrap_or_default();
    let line = |name: &str, cells: [&str; 6]| {
        let [count, min, median, max, bound, slow] = cells;
        let line = format!("{name:width$}  {count:>8}  {min:>7}  {median:>7}  {max:>7}  {bound:>7}  {slow}");
        line.trim_end().to_owned()
    };
    let mut lines = vec![line("fault", TITLES)];
    for (row, name) in rows.iter().zip(&names) {
        let times = [row.min_seconds, row.median_seconds, row.max_seconds, row.bound_seconds];
        let [min, median, max, bound] = times.map(human_seconds);
        let slow: Vec<_> = row.slow.iter().map(slow_text).collect();
        lines.push(line(name, [&row.count.to_string(), &min, &median, &max, &bound, &slow.join(", ")]));
    }
    lines.join("\n")
}

fn slow_text(slow: &SlowHealing) -> String {
    format!("{} in episode {}", human_seconds(slow.seconds), slow.episode)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    fn healed(times: &[(&str, f64)]) -> Vec<Healed> {
        let one = |(index, (schedule, seconds)): (usize, &(&str, f64))| Healed {
            episode: index + 1,
            schedule: schedule.parse().unwrap(),
            seconds: *seconds,
            bound_seconds: 22.0,
        };
        times.iter().enumerate().map(one).collect()
    }

    fn sample() -> Vec<Healed> {
        healed(&[
            ("kill-agent@0", 3.0),
            ("link-down@0+8", 9.25),
            ("kill-agent@1", 2.0),
            ("kill-agent@2", 4.0),
            ("link-down@1+4,power-cut@2+2", 71.5),
            ("kill-agent@3", 13.5),
            ("link-down@2+5", 4.75),
            ("kill-agent@0.5", 9.5),
            ("kill-agent@0.6", 3.0),
        ])
    }

    #[test]
    fn each_fault_has_a_row_with_its_spread_slowest_first() {
        let rows = statistics(&sample());
        let names: Vec<_> = rows.iter().map(|row| row.faults.join(", ")).collect();
        assert_eq!(names, ["link-down, power-cut", "link-down", "kill-agent"]);
        assert_eq!((rows[1].count, rows[1].median_seconds), (2, 7.0), "the mean of two");
        let agent = &rows[2];
        assert_eq!((agent.count, agent.min_seconds, agent.max_seconds), (6, 2.0, 13.5));
        assert_eq!((agent.median_seconds, agent.bound_seconds), (3.5, 22.0));
        assert_eq!(agent.slow, [SlowHealing { episode: 6, seconds: 13.5 }], "9.5 s are not above 10.5 s");
        assert!(rows[0].slow.is_empty() && rows[1].slow.is_empty());
        assert_eq!(statistics(&[]), []);
    }

    #[test]
    fn rows_with_one_median_are_ordered_by_their_maximum() {
        let rows = statistics(&healed(&[
            ("kill-agent@0", 3.0),
            ("oom-agent@0", 1.0),
            ("oom-agent@0", 3.0),
            ("oom-agent@0", 4.0),
        ]));
        assert_eq!(rows[0].faults, ["oom-agent"]);
    }

    #[test]
    fn the_table_and_the_json() {
        let rows = statistics(&sample());
        let json = serde_json::to_string_pretty(&rows).unwrap();
        golden::compare("statistics.txt", format!("{}\n\n{json}\n", table(&rows)));
        assert_eq!(serde_json::from_str::<Vec<HealingReport>>(&json).unwrap(), rows);
    }
}
