//! The pauses between attempts for one deployment.

use std::time::Duration;

use agent_protocol::Phase;
use tokio::time::Instant;

const MAX_PAUSE: Duration = Duration::from_secs(60);
/// The time after which a running container counts as recovered.
const STABLE_AFTER: Duration = Duration::from_secs(60);
/// The time after which the state `stopping` counts as stale. If podman is killed while it stops a container,
/// the state stays `stopping`.
const MAX_TRANSITION: Duration = Duration::from_secs(60);

/// The number of failures after which a new container has failed although podman has not refused it. An attempt
/// to start counts twice, as an attempt and as a failure.
const MANY_FAILURES: u32 = 6;

#[derive(Debug, Clone, Default)]
pub(crate) struct Backoff {
    /// The digest of the document that the attempts are for, or the revision of its deletion.
    digest: String,
    /// The number of consecutive failures.
    failures: u32,
    /// The earliest time of the next attempt, if there must be a pause before it.
    until: Option<Instant>,
    started: Option<Instant>,
    /// The time since which the container has run, as far as this process knows.
    running_since: Option<Instant>,
    /// The number of restarts of the container by the agent.
    pub(crate) restarts: u32,
    /// The time at which podman was first seen to be stopping or removing the container.
    waiting: Option<Instant>,
    pub(crate) last_error: Option<String>,
    /// True if the last attempt failed because this device cannot run the document.
    pub(crate) is_unsupported: bool,
    /// True if starting or renaming the container has failed, so that a new container is needed.
    pub(crate) needs_new_container: bool,
    /// True if this process has made the container. A container from before a power cut may be torn.
    is_made_here: bool,
}

impl Backoff {
    /// Resets the backoff if the earlier attempts were for another document.
    pub(crate) fn begin(&mut self, digest: &str) {
        if self.digest != digest {
            *self = Self { digest: digest.to_owned(), ..Self::default() };
        }
    }

    /// Returns the time until the next attempt is allowed; `None` if it is allowed now.
    pub(crate) fn remaining(&self, now: Instant) -> Option<Duration> {
        self.until.and_then(|until| until.checked_duration_since(now)).filter(|wait| !wait.is_zero())
    }

    /// Records whether podman is stopping or removing the container. Returns whether this has taken longer
    /// than [`MAX_TRANSITION`].
    pub(crate) fn transition_is_stale(&mut self, waiting: bool, now: Instant) -> bool {
        self.waiting = waiting.then(|| self.waiting.unwrap_or(now));
        self.waiting.is_some_and(|since| now - since >= MAX_TRANSITION)
    }

    /// Returns the phase of a deployment whose last attempt failed.
    pub(crate) fn phase(&self) -> Phase {
        if self.is_unsupported { Phase::Refused } else { Phase::BackingOff }
    }

    pub(crate) fn failed(&mut self, now: Instant, error: String) {
        self.last_error = Some(error);
        self.pause_after_attempt(now);
    }

    /// Records a start of the container. The pause before the next start counts from now, so that a container
    /// that runs longer than the pause is restarted at once.
    pub(crate) fn started(&mut self, now: Instant, restart: bool) {
        self.restarts += u32::from(restart);
        self.pause_after_attempt(now);
        (self.started, self.running_since) = (Some(now), None);
        self.needs_new_container = false;
    }

    /// Returns the time that the running container must still run to have run for `probation`; `None` if it has.
    /// Time before the start of this process does not count.
    pub(crate) fn probation_left(&mut self, now: Instant, probation: Duration) -> Option<Duration> {
        let since = *self.running_since.get_or_insert(now);
        probation.checked_sub(now - since).filter(|left| !left.is_zero())
    }

    /// Records that a container was made.
    pub(crate) fn made(&mut self) {
        (self.needs_new_container, self.is_made_here, self.is_unsupported) = (false, true, false);
    }

    /// Returns whether the failure of a step is one of the document. `is_refusal` is true if podman has refused
    /// the step. Any other failure, and one of a container that may be torn, counts only after several attempts.
    pub(crate) fn has_failed_for_good(&self, is_refusal: bool) -> bool {
        is_refusal && self.is_made_here || self.failures >= MANY_FAILURES
    }

    /// Records that the container was seen running.
    pub(crate) fn running(&mut self, now: Instant) {
        // If `started` is empty, this process did not start the container: an earlier process or another
        // program did.
        let stable = self.started.is_none_or(|started| now - started >= STABLE_AFTER);
        if stable {
            self.reset();
        } else if self.restarts == 0 {
            self.last_error = None;
        }
    }

    /// Records that the deployment is as desired.
    pub(crate) fn reset(&mut self) {
        self.last_error = None;
        self.failures = 0;
        self.until = None;
    }

    fn pause_after_attempt(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + pause(self.failures));
    }
}

/// Returns the pause: 1 s after the first failure, then doubled up to [`MAX_PAUSE`].
fn pause(failures: u32) -> Duration {
    Duration::from_secs(1 << failures.saturating_sub(1).min(6)).min(MAX_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_a_success_resets_them() {
        let start = Instant::now();
        let mut backoff = Backoff::default();
        let mut now = start;
        let mut waits = Vec::new();
        for _ in 0..9 {
            backoff.failed(now, "no".into());
            let wait = backoff.remaining(now).unwrap();
            waits.push(wait.as_secs());
            now += wait;
            assert_eq!(backoff.remaining(now), None);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        backoff.reset();
        assert!(backoff.last_error.is_none() && backoff.remaining(start).is_none());
    }

    #[test]
    fn a_crash_loop_slows_down_and_a_stable_run_ends_it() {
        let mut now = Instant::now();
        let mut backoff = Backoff::default();
        backoff.started(now, false);
        for _ in 0..8 {
            now += backoff.remaining(now).unwrap();
            backoff.started(now, true);
        }
        assert_eq!((backoff.restarts, backoff.remaining(now).unwrap().as_secs()), (8, 60));
        backoff.last_error = Some("its container ended".into());
        backoff.running(now + Duration::from_secs(1));
        assert!(backoff.last_error.is_some(), "it may end again");
        backoff.running(now + STABLE_AFTER);
        assert!(backoff.last_error.is_none() && backoff.remaining(now).is_none());
    }

    #[test]
    fn a_torn_container_is_not_a_failure_of_its_document() {
        let mut backoff = Backoff::default();
        assert!(!backoff.has_failed_for_good(true), "it was made before a power cut");
        backoff.made();
        assert!(backoff.has_failed_for_good(true) && !backoff.has_failed_for_good(false));
        for _ in 0..MANY_FAILURES {
            backoff.failed(Instant::now(), "podman has not answered".into());
        }
        assert!(backoff.has_failed_for_good(false));
    }

    #[test]
    fn a_restart_begins_the_probation_anew() {
        let (start, probation) = (Instant::now(), Duration::from_secs(60));
        let mut backoff = Backoff::default();
        assert_eq!(backoff.probation_left(start, probation), Some(probation));
        let later = start + Duration::from_secs(50);
        assert_eq!(backoff.probation_left(later, probation), Some(Duration::from_secs(10)));
        backoff.started(later, true);
        assert_eq!(backoff.probation_left(later, probation), Some(probation));
        assert_eq!(backoff.probation_left(later + probation, probation), None);
        assert_eq!(Backoff::default().probation_left(start, Duration::ZERO), None);
    }

    #[test]
    fn a_stale_transition_is_noticed() {
        let start = Instant::now();
        let mut backoff = Backoff::default();
        assert!(!backoff.transition_is_stale(true, start));
        assert!(!backoff.transition_is_stale(true, start + MAX_TRANSITION / 2));
        assert!(backoff.transition_is_stale(true, start + MAX_TRANSITION));
        assert!(!backoff.transition_is_stale(false, start + MAX_TRANSITION));
        assert!(!backoff.transition_is_stale(true, start + 2 * MAX_TRANSITION), "a new transition begins");
    }

    #[test]
    fn another_document_resets_the_backoff() {
        let mut backoff = Backoff::default();
        backoff.begin("a");
        backoff.failed(Instant::now(), "no".into());
        backoff.begin("a");
        assert!(backoff.last_error.is_some());
        backoff.begin("b");
        assert!(backoff.last_error.is_none());
    }
}
