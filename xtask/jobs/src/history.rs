//! The durations of phases on this machine, and the longest times for which the guest's console was silent. From
//! these, the screen shows how long a phase usually takes and whether it may be stuck.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use xtask_core::cache::Cache;
use xtask_core::format::{human_seconds, round};
use xtask_core::fs::{make_private_dir, write_atomically};
use xtask_core::limits;
use xtask_core::report::Phase;

/// The number of runs that are recorded for each phase.
const REMEMBERED: usize = 20;
/// The phases whose result is usually in the cache. A run is recorded for such a phase only if the phase built
/// something.
const FINDS: [Phase; 2] = [Phase::Build, Phase::Image];

/// The durations of one kind of run on this host: the same architecture, accelerator, CPU, processors, memory and
/// image, and warm or cold.
pub struct History {
    path: PathBuf,
    phases: BTreeMap<String, Past>,
}

/// The last runs of a phase, the newest last.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Past {
    seconds: Vec<f64>,
    /// The longest silence of the guest's console in each of these runs, in seconds.
    silent: Vec<f64>,
}

impl History {
    /// Loads the history. A file that cannot be read or has an older format counts as empty, because the history is
    /// only informative.
    pub fn load(cache: &Cache, kind: &str) -> Self {
        let path = of_host(cache).join(format!("{kind}.json"));
        let phases = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Self { path, phases: phases.unwrap_or_default() }
    }

    /// Returns the usual durations of the phase with this title.
    pub fn of(&self, phase: &str) -> Option<Usual> {
        let past = self.phases.get(phase)?;
        let mut sorted = past.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        Some(Usual {
            median: *sorted.get(sorted.len() / 2)?,
            spread: (*sorted.first()?, *sorted.last()?),
            silent: past.silent.iter().copied().fold(0.0, f64::max),
        })
    }

    /// Records a phase that passed, unless it was a cache hit.
    pub fn note(&mut self, phase: &str, seconds: f64, silent: Duration) {
        if FINDS.iter().any(|finds| finds.title() == phase) && seconds < limits::CACHE_HIT.as_secs_f64() {
            return;
        }
        let past = self.phases.entry(phase.to_owned()).or_default();
        for (list, value) in [(&mut past.seconds, seconds), (&mut past.silent, silent.as_secs_f64())] {
            list.push(round(value));
            let old = list.len().saturating_sub(REMEMBERED);
            list.drain(..old);
        }
    }

    /// Writes the history to the cache.
    pub fn keep(&self, cache: &Cache) -> Result<()> {
        make_private_dir(&of_host(cache))?;
        write_atomically(&self.path, serde_json::to_string_pretty(&self.phases)?)
    }
}

/// The usual durations of a phase, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usual {
    /// The median duration.
    pub median: f64,
    /// The shortest and the longest duration.
    pub spread: (f64, f64),
    /// The longest silence of the guest's console in all runs.
    pub silent: f64,
}

impl fmt::Display for Usual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (fastest, slowest) = (human_seconds(self.spread.0), human_seconds(self.spread.1));
        write!(f, "usually {}", human_seconds(self.median))?;
        if fastest == slowest { Ok(()) } else { write!(f, ", {fastest} to {slowest}") }
    }
}

impl Usual {
    /// Describes the remaining time.
    pub fn rest(&self, elapsed: f64) -> String {
        if elapsed < self.median {
            format!("about {} to go", human_seconds(self.median - elapsed))
        } else if elapsed > self.spread.1 {
            "slower than any earlier run".to_owned()
        } else {
            "any moment".to_owned()
        }
    }
}

/// Returns the directory of this host's history. Each host (uname(2), nodename) has its own, because several hosts of
/// different speed may share a home directory.
fn of_host(cache: &Cache) -> PathBuf {
    let name = rustix::system::uname();
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "-_".contains(character);
    let name = name.nodename().to_string_lossy().replace(|character| !is_plain(character), "_");
    cache.history().join(format!("host-{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use xtask_core::fs::write_private;

    #[test]
    fn the_usual_is_a_median_with_its_spread_and_only_of_the_last_runs() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let mut history = History::load(&cache, "kind");
        assert_eq!(history.of(&Phase::Boot.title()), None);
        for seconds in [900.0, 66.0, 60.0, 75.0] {
            history.note(&Phase::Boot.title(), seconds, Duration::from_secs(9));
        }
        for _ in 0..REMEMBERED - 3 {
            history.note(&Phase::Boot.title(), 66.0, Duration::from_secs(8));
        }
        for seconds in [57.0, 0.1, 0.1] {
            history.note(&Phase::Image.title(), seconds, Duration::ZERO);
        }
        assert_eq!(
            history.of(&Phase::Image.title()).unwrap().to_string(),
            "usually 57 s",
            "only the build is recorded"
        );
        history.keep(&cache).unwrap();
        let usual = History::load(&cache, "kind").of(&Phase::Boot.title()).unwrap();
        assert_eq!(usual, Usual { median: 66.0, spread: (60.0, 75.0), silent: 9.0 });
        assert_eq!(usual.to_string(), "usually 66 s, 60 s to 75 s");
        assert_eq!(
            [20.0, 70.0, 80.0].map(|now| usual.rest(now)),
            ["about 46 s to go", "any moment", "slower than any earlier run"]
        );
    }

    #[test]
    fn an_older_versions_file_is_as_good_as_none() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        make_private_dir(&of_host(&cache)).unwrap();
        write_private(&of_host(&cache).join("kind.json"), r#"{"boot": 66.0}"#).unwrap();
        assert_eq!(History::load(&cache, "kind").of(&Phase::Boot.title()), None);
    }
}
