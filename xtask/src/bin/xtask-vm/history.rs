//! How long phases took on this machine, and how long they were silent, so that a wait can say what is usual, and what is not.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use xtask::cache::Cache;
use xtask::format::{human_seconds, round};
use xtask::fs::{make_private_dir, write_private};
use xtask::limits;
use xtask::report::{Phase, PhaseStatus};

use crate::screen::Screen;

/// Runs that are remembered of each phase.
const REMEMBERED: usize = 20;
/// Phases that mostly find what they make; what is usual of them is how long the making takes.
const FINDS: [Phase; 2] = [Phase::Build, Phase::Image];

/// The times of one kind of run on this host: an architecture, an accelerator, a CPU, processors and memory, an image, warm or cold.
pub(crate) struct History {
    path: PathBuf,
    phases: BTreeMap<String, Past>,
}

/// What is known of one phase: of its last runs, the newest last.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Past {
    seconds: Vec<f64>,
    /// The longest that the guest's console said nothing.
    silent: Vec<f64>,
}

/// What is usual, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Usual {
    /// Half of the runs were faster.
    pub(crate) median: f64,
    /// The fastest and the slowest.
    pub(crate) spread: (f64, f64),
    /// The longest silence of all.
    pub(crate) silent: f64,
}

impl History {
    /// What is known; a file that cannot be read, or is of an older version, is as good as none, since it only informs.
    pub(crate) fn load(cache: &Cache, kind: &str) -> Self {
        let path = of_host(cache).join(format!("{kind}.json"));
        let phases = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Self { path, phases: phases.unwrap_or_default() }
    }

    /// What is usual of a phase, by its title.
    pub(crate) fn of(&self, phase: &str) -> Option<Usual> {
        let past = self.phases.get(phase)?;
        let mut sorted = past.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        Some(Usual {
            median: *sorted.get(sorted.len() / 2)?,
            spread: (*sorted.first()?, *sorted.last()?),
            silent: past.silent.iter().copied().fold(0.0, f64::max),
        })
    }

    /// Notes a phase that passed, and was no mere look for what is there.
    pub(crate) fn note(&mut self, phase: &str, seconds: f64, silent: Duration) {
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

    /// Keeps what was noted.
    pub(crate) fn keep(&self, cache: &Cache) -> Result<()> {
        make_private_dir(&of_host(cache))?;
        // Whole or not at all: who dies while it is written has not lost what was known.
        let beside = self.path.with_extension("new");
        write_private(&beside, serde_json::to_string_pretty(&self.phases)?)?;
        std::fs::rename(&beside, &self.path).with_context(|| format!("rename {}", beside.display()))
    }
}

/// A home that several hosts share is as slow as none of them (uname(2), nodename).
fn of_host(cache: &Cache) -> PathBuf {
    let name = rustix::system::uname();
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "-_".contains(character);
    let name = name.nodename().to_string_lossy().replace(|character| !is_plain(character), "_");
    cache.history().join(format!("host-{name}"))
}

/// The time of something that may take over two seconds and is no phase of a smoke.
pub(crate) struct Watch {
    history: History,
    what: String,
    started: Instant,
}

impl Watch {
    /// Says what is usual of it. `kind` and `what` tell it apart, `title` is its line's.
    pub(crate) fn start(cache: &Cache, screen: &mut Screen, (kind, what): (&str, &str), title: &str) -> Self {
        let history = History::load(cache, kind);
        screen.start(title, history.of(what));
        Self { history, what: what.to_owned(), started: Instant::now() }
    }

    /// Says how it ended, and keeps how long it took where it went well. What is over at once, as the boot of a machine that ran
    /// already, is no measure of what has to be waited for.
    pub(crate) fn end(mut self, cache: &Cache, screen: &mut Screen, outcome: Result<&str, &anyhow::Error>) {
        let (elapsed, silent) = (self.started.elapsed(), screen.longest_silence());
        match outcome {
            Ok(message) => screen.end(PhaseStatus::Passed, message),
            Err(error) => return screen.end(PhaseStatus::Failed, &error.to_string()),
        }
        if elapsed < limits::CACHE_HIT {
            return;
        }
        self.history.note(&self.what, elapsed.as_secs_f64(), silent);
        if let Err(error) = self.history.keep(cache) {
            screen.note(&format!("cannot record how long it took: {error:#}"));
        }
    }
}

/// Does it under a [`Watch`].
pub(crate) fn timed<T>(
    (cache, screen): (&Cache, &mut Screen),
    known_as: (&str, &str),
    title: &str,
    body: impl FnOnce(&mut Screen) -> Result<(T, String)>,
) -> Result<T> {
    let watch = Watch::start(cache, screen, known_as, title);
    let outcome = body(screen);
    watch.end(cache, screen, outcome.as_ref().map(|(_, message)| &**message));
    outcome.map(|(value, _)| value)
}

impl fmt::Display for Usual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (fastest, slowest) = (human_seconds(self.spread.0), human_seconds(self.spread.1));
        write!(f, "usually {}", human_seconds(self.median))?;
        if fastest == slowest { Ok(()) } else { write!(f, ", {fastest} to {slowest}") }
    }
}

impl Usual {
    /// What is to be expected of the rest.
    pub(crate) fn rest(&self, elapsed: f64) -> String {
        if elapsed < self.median {
            format!("about {} to go", human_seconds(self.median - elapsed))
        } else if elapsed > self.spread.1 {
            "slower than any earlier run".to_owned()
        } else {
            "any moment".to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_is_a_median_with_its_spread_and_only_of_the_last_runs() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let mut history = History::load(&cache, "kind");
        assert_eq!(history.of(Phase::Boot.title()), None);
        for seconds in [900.0, 66.0, 60.0, 75.0] {
            history.note(Phase::Boot.title(), seconds, Duration::from_secs(9));
        }
        for _ in 0..REMEMBERED - 3 {
            history.note(Phase::Boot.title(), 66.0, Duration::from_secs(8));
        }
        for seconds in [57.0, 0.1, 0.1] {
            history.note(Phase::Image.title(), seconds, Duration::ZERO);
        }
        assert_eq!(history.of(Phase::Image.title()).unwrap().to_string(), "usually 57 s", "to be made");
        history.keep(&cache).unwrap();
        let usual = History::load(&cache, "kind").of(Phase::Boot.title()).unwrap();
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
        assert_eq!(History::load(&cache, "kind").of(Phase::Boot.title()), None);
    }
}
