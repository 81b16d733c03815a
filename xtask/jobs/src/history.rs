//! How long phases took on this machine, and how long they were silent, so that a wait can say what is usual, and what is not.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use xtask_core::cache::Cache;
use xtask_core::format::round;
use xtask_core::fs::{make_private_dir, write_atomically};
use xtask_core::limits;
use xtask_core::report::{Phase, PhaseStatus};

use crate::screen::Screen;
use crate::usual::Usual;

/// Runs that are remembered of each phase.
const REMEMBERED: usize = 20;
/// Phases that mostly find what they make; what is usual of them is how long the making takes.
const FINDS: [Phase; 2] = [Phase::Build, Phase::Image];

/// The times of one kind of run on this host: an architecture, an accelerator, a CPU, processors and memory, an image, warm or cold.
pub struct History {
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

impl History {
    /// What is known; a file that cannot be read, or is of an older version, is as good as none, since it only informs.
    pub fn load(cache: &Cache, kind: &str) -> Self {
        let path = of_host(cache).join(format!("{kind}.json"));
        let phases = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Self { path, phases: phases.unwrap_or_default() }
    }

    /// What is usual of a phase, by its title.
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

    /// Notes a phase that passed, and was no mere look for what is there.
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

    /// Keeps what was noted.
    pub fn keep(&self, cache: &Cache) -> Result<()> {
        make_private_dir(&of_host(cache))?;
        write_atomically(&self.path, serde_json::to_string_pretty(&self.phases)?)
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
pub struct Watch {
    history: History,
    what: String,
    started: Instant,
}

impl Watch {
    /// Says what is usual of it. `kind` and `what` tell it apart, `title` is its line's.
    pub fn start(cache: &Cache, screen: &mut Screen, (kind, what): (&str, &str), title: &str) -> Self {
        let history = History::load(cache, kind);
        screen.start(title, history.of(what));
        Self { history, what: what.to_owned(), started: Instant::now() }
    }

    /// Says how it ended, and keeps how long it took where it went well. What is over at once, as the boot of a machine that ran
    /// already, is no measure of what has to be waited for.
    pub fn end(mut self, cache: &Cache, screen: &mut Screen, outcome: Result<&str, &anyhow::Error>) {
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
pub fn timed<T>(
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

#[cfg(test)]
mod tests {
    use super::*;
    use xtask_core::fs::write_private;

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
