//! How often a status may be sent: a few at once, so that what happens is told as it happens, and 30 in a minute at most, whatever
//! happens on the device (the generic cell rate algorithm, ITU-T I.371).

use std::time::Duration;

use tokio::time::Instant;

/// So many may follow one another without a pause.
const BURST: u32 = 6;
/// The share of each in the long run: with the burst, 30 in any minute.
const INTERVAL: Duration = Duration::from_millis(2500);

/// What was sent so far, as far as it holds up what comes.
#[derive(Debug, Clone, Copy, Default)]
pub struct RateLimiter {
    /// Until then the shares of those that were sent reach.
    paid_until: Option<Instant>,
}

impl RateLimiter {
    /// When the next one may be sent; `None` where that is now.
    pub fn next(&self) -> Option<Instant> {
        self.paid_until?.checked_sub(INTERVAL * (BURST - 1))
    }

    /// One is sent.
    pub fn sent(&mut self, now: Instant) {
        self.paid_until = Some(self.paid_until.map_or(now, |until| until.max(now)) + INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When each is sent, in seconds from the first, by somebody who always has one more to send, for so many seconds.
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
    fn a_few_are_sent_at_once_and_no_minute_has_more_than_thirty() {
        let sent = sent_within(600);
        assert!(sent[BURST as usize - 1] < 0.1, "{sent:?}");
        for (at, first) in sent.iter().enumerate() {
            let in_a_minute = sent[at..].iter().take_while(|time| **time < first + 60.0).count();
            assert!(in_a_minute <= 30, "{in_a_minute} from {first} s on");
        }
        let longest = sent.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
        assert!(longest < 2.6, "nothing is held up for longer than its share: {longest}");
    }

    #[test]
    fn after_a_rest_there_are_a_few_again() {
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
