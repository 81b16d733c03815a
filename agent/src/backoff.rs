//! How often something has been tried for a deployment, and when it may be tried again.

use std::time::Duration;

use tokio::time::Instant;

/// The longest pause between two attempts.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// What has run for so long has recovered.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// What podman is about for longer than that it has forgotten: killed in the middle, it goes on saying `stopping`.
const MAX_TRANSITION: Duration = Duration::from_secs(60);

/// One deployment's.
#[derive(Debug, Clone, Default)]
pub(crate) struct Backoff {
    /// Of which document; another one begins anew.
    digest: String,
    /// In a row.
    failures: u32,
    /// Not before.
    until: Option<Instant>,
    started: Option<Instant>,
    /// Of its container, by the agent.
    pub(crate) restarts: u32,
    /// Since when podman is about something with its container.
    waiting: Option<Instant>,
    /// What went wrong last.
    pub(crate) error: Option<String>,
    /// Starting the container that is there has failed: another one is wanted.
    pub(crate) remake: bool,
}

impl Backoff {
    /// For this document, which may be another one than before.
    pub(crate) fn of(&mut self, digest: &str) -> &mut Self {
        if self.digest != digest {
            *self = Self { digest: digest.to_owned(), ..Self::default() };
        }
        self
    }

    /// How long it has to wait still.
    pub(crate) fn wait(&self, now: Instant) -> Option<Duration> {
        self.until.and_then(|until| until.checked_duration_since(now)).filter(|wait| !wait.is_zero())
    }

    /// Podman is about something with its container; whether it has been for too long.
    pub(crate) fn waits_too_long(&mut self, waits: bool, now: Instant) -> bool {
        self.waiting = waits.then(|| self.waiting.unwrap_or(now));
        self.waiting.is_some_and(|since| now - since >= MAX_TRANSITION)
    }

    /// An attempt failed.
    pub(crate) fn failed(&mut self, now: Instant, error: String) {
        self.error = Some(error);
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + pause(self.failures));
    }

    /// Its container was started. The next start is not before a pause, counted from here: one that runs longer does not wait.
    pub(crate) fn started(&mut self, now: Instant, again: bool) {
        self.restarts += u32::from(again);
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + pause(self.failures));
        self.started = Some(now);
        self.remake = false;
    }

    /// Its container is seen to run.
    pub(crate) fn runs(&mut self, now: Instant) {
        // One that this process has not started was there before it, or somebody else started it.
        let stable = self.started.is_none_or(|started| now - started >= STABLE_AFTER);
        if stable || self.restarts == 0 {
            self.error = None;
        }
        if stable {
            self.failures = 0;
            self.until = None;
        }
    }

    /// It is as desired, and nothing is left to try.
    pub(crate) fn settled(&mut self) {
        self.error = None;
        self.failures = 0;
        self.until = None;
    }
}

/// 1 s after the first failure, then twice as long each time.
fn pause(failures: u32) -> Duration {
    Duration::from_secs(1 << failures.saturating_sub(1).min(6)).min(MAX_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_end_with_the_trouble() {
        let start = Instant::now();
        let mut backoff = Backoff::default();
        let mut now = start;
        let mut waits = Vec::new();
        for _ in 0..9 {
            backoff.failed(now, "no".into());
            let wait = backoff.wait(now).unwrap();
            waits.push(wait.as_secs());
            now += wait;
            assert_eq!(backoff.wait(now), None);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        backoff.settled();
        assert!(backoff.error.is_none() && backoff.wait(start).is_none());
    }

    #[test]
    fn a_crash_loop_slows_down_and_a_stable_run_ends_it() {
        let mut now = Instant::now();
        let mut backoff = Backoff::default();
        backoff.started(now, false);
        for _ in 0..8 {
            now += backoff.wait(now).unwrap();
            backoff.started(now, true);
        }
        assert_eq!((backoff.restarts, backoff.wait(now).unwrap().as_secs()), (8, 60));
        backoff.error = Some("its container ended".into());
        backoff.runs(now + Duration::from_secs(1));
        assert!(backoff.error.is_some(), "it may end again");
        backoff.runs(now + STABLE_AFTER);
        assert!(backoff.error.is_none() && backoff.wait(now).is_none());
    }

    #[test]
    fn what_podman_is_about_for_too_long_is_noticed() {
        let start = Instant::now();
        let mut backoff = Backoff::default();
        assert!(!backoff.waits_too_long(true, start));
        assert!(!backoff.waits_too_long(true, start + MAX_TRANSITION / 2));
        assert!(backoff.waits_too_long(true, start + MAX_TRANSITION));
        assert!(!backoff.waits_too_long(false, start + MAX_TRANSITION));
        assert!(!backoff.waits_too_long(true, start + 2 * MAX_TRANSITION), "it began anew");
    }

    #[test]
    fn another_document_begins_anew() {
        let mut backoff = Backoff::default();
        backoff.of("a").failed(Instant::now(), "no".into());
        assert!(backoff.of("a").error.is_some());
        assert!(backoff.of("b").error.is_none());
    }
}
