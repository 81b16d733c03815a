//! The pauses between the downloads of an image that has failed. They depend on the reason, because a registry answers
//! a wrong name in the same way for a long time, and counts the requests of a fleet.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::reconnect::jitter;

/// The first and the longest pause after a failure of the network or of the device.
const OF_NETWORK: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(600)];
/// The first and the longest pause after the registry has refused: no such image, or no permission.
const OF_REFUSAL: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(3600)];
/// The first and the longest pause after the registry has said that there are too many requests.
const OF_LIMIT: [Duration; 2] = [Duration::from_secs(300), Duration::from_secs(3600)];

/// The texts of podman about an answer 401, 403 or 404 of a registry (distribution specification, error codes).
const REFUSALS: [&str; 7] = [
    "manifest unknown",
    "name unknown",
    "unauthorized",
    "authentication required",
    "denied",
    "status: 40",
    "invalid username",
];
/// The texts of podman about an answer 429.
const LIMITS: [&str; 2] = ["toomanyrequests", "too many requests"];

/// A download that has failed.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    /// The number of failures in a row.
    count: u32,
    pub(super) error: String,
    /// The time of the next attempt.
    until: Instant,
    /// The version of the file with the logins when the download began.
    logins: LoginsVersion,
}

/// The version of the file with the logins to registries ([`crate::credentials::modified`]).
pub(super) type LoginsVersion = Option<(SystemTime, u64)>;

impl Failure {
    /// Records a failure after an earlier one of the same image, if there was one.
    pub(super) fn after(earlier: Option<&Self>, error: String, logins: LoginsVersion) -> Self {
        let count = earlier.map_or(0, |earlier| earlier.count) + 1;
        let pause = jittered(pause(&error, count));
        Self { count, error, until: Instant::now() + pause, logins }
    }

    /// Returns the end of the pause. The pause also ends if the logins were replaced.
    pub(super) fn pauses_until(&self, logins: LoginsVersion) -> Option<Instant> {
        (Instant::now() < self.until && self.logins == logins).then_some(self.until)
    }
}

/// Returns the pause after `count` failures in a row, the last one with this error.
fn pause(error: &str, count: u32) -> Duration {
    let text = error.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    let [first, longest] = match () {
        () if has(&LIMITS) => OF_LIMIT,
        () if has(&REFUSALS) => OF_REFUSAL,
        () => OF_NETWORK,
    };
    first.saturating_mul(1 << (count - 1).min(10)).min(longest)
}

/// Returns a pause between 75 % and 125 %, so that the devices of a fleet do not ask at the same time.
pub(super) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.75) + jitter(pause / 2)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_pause_depends_on_the_reason_and_grows() {
        let seconds = |error: &str, count| pause(error, count).as_secs();
        let network = "pull: dial tcp: connection refused";
        assert_eq!([1, 2, 3, 9, 40].map(|count| seconds(network, count)), [5, 10, 20, 600, 600]);
        let unknown = "reading manifest 1 in r.example/a: manifest unknown: manifest unknown";
        assert_eq!([1, 2, 9].map(|count| seconds(unknown, count)), [60, 120, 3600]);
        let limit = "reading manifest: toomanyrequests: You have reached your pull rate limit";
        assert_eq!([1, 5].map(|count| seconds(limit, count)), [300, 3600]);
        let limit =
            "initializing source: pinging container registry r.example: too many requests to registry";
        assert_eq!(seconds(limit, 1), 300);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_ends_with_its_time_or_with_new_logins() {
        let logins = |seconds| Some((SystemTime::UNIX_EPOCH + Duration::from_secs(seconds), 1));
        let first = Failure::after(None, "unauthorized".to_owned(), logins(1));
        let pauses = |failure: &Failure, seconds| failure.pauses_until(logins(seconds)).is_some();
        assert!(pauses(&first, 1) && !pauses(&first, 2) && first.pauses_until(None).is_none());
        let second = Failure::after(Some(&first), "unauthorized".to_owned(), logins(2));
        tokio::time::advance(Duration::from_secs(80)).await;
        assert!(pauses(&second, 2) && !pauses(&first, 1));
    }

    #[test]
    fn devices_ask_at_different_times() {
        let pauses: BTreeSet<_> = (0..20).map(|_| jittered(Duration::from_secs(60))).collect();
        assert!(
            pauses.len() > 1 && pauses.iter().all(|pause| (45..=75).contains(&pause.as_secs())),
            "{pauses:?}"
        );
    }
}
