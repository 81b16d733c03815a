//! Limits how often a status is sent: a short burst, so that changes are reported at once, and at most 30 in
//! any minute. The algorithm is the generic cell rate algorithm (ITU-T I.371).

use std::time::Duration;

use tokio::time::Instant;

/// The number of statuses that may be sent without a pause.
const BURST: u32 = 6;
/// The long-term interval between statuses. Together with the burst, it allows 30 statuses in any minute.
const INTERVAL: Duration = Duration::from_millis(2500);

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RateLimiter {
    /// The theoretical arrival time of the algorithm: each status moves it by [`INTERVAL`].
    arrival: Option<Instant>,
}

impl RateLimiter {
    /// Returns the earliest time for the next status; `None` means now.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.arrival?.checked_sub(INTERVAL * (BURST - 1))
    }

    pub(crate) fn sent(&mut self, now: Instant) {
        self.arrival = Some(self.arrival.map_or(now, |until| until.max(now)) + INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the send times, in seconds from the first, of a sender that always has another status to send.
    fn sent_within(seconds: u64) -> Vec<f64> {
        let begun = Instant::now();
        let (mut now, mut limiter, mut sent) = (begun, RateLimiter::default(), Vec::new());
        while now <= begun + Duration::from_secs(seconds) {
            sent.push((now - begun).as_secs_f64());
            limiter.sent(now);
            now = limiter.next().unwrap_or(now).max(now + Duration::from_millis(1));
        }
        sent
    }

    #[test]
    fn a_burst_is_allowed_and_no_minute_has_more_than_thirty() {
        let sent = sent_within(600);
        assert!(sent[BURST as usize - 1] < 0.1, "{sent:?}");
        for (at, first) in sent.iter().enumerate() {
            let in_a_minute = sent[at..].iter().take_while(|time| **time < first + 60.0).count();
            assert!(in_a_minute <= 30, "{in_a_minute} from {first} s on");
        }
        let longest = sent.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
        assert!(longest < 2.6, "no status waits longer than the interval: {longest}");
    }

    #[test]
    fn a_pause_allows_another_burst() {
        let begun = Instant::now();
        let mut limiter = RateLimiter::default();
        assert_eq!(limiter.next(), None);
        for _ in 0..BURST {
            limiter.sent(begun);
        }
        assert_eq!(limiter.next(), Some(begun + INTERVAL));
        let later = begun + INTERVAL * BURST;
        limiter.sent(later);
        assert!(limiter.next().is_none_or(|next| next <= later));
    }
}
