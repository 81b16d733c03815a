//! Decides whether and when there is another attempt.

use std::time::Duration;

use super::limits::{FetchLimits, LONGEST_PAUSE};

/// Upper bound for consecutive attempts without new bytes.
const MAX_FRUITLESS: u32 = 5;
/// Upper bound for all attempts. An image can be downloaded over a line that breaks each minute, but the attempts must
/// end some time.
const MAX_ATTEMPTS: u32 = 100;

/// The attempts so far.
#[derive(Debug)]
pub(super) struct Retry {
    limits: FetchLimits,
    farthest: u64,
    fruitless: u32,
    /// The number of attempts that were begun.
    pub(super) attempts: u32,
}

impl Retry {
    /// Starts the count of attempts. `there` is the number of bytes that an earlier run left.
    pub(super) fn new(limits: FetchLimits, there: u64) -> Self {
        Self { limits, farthest: there, fruitless: 0, attempts: 0 }
    }

    /// Returns the pause before the next attempt, or `None` if there were enough attempts. `length` is the number of
    /// bytes in the file after the latest attempt. Bytes that an earlier attempt had already received do not count as
    /// new. `after` is the pause that the server asked for. `spread` (0 to 1) varies the pause, so that the clients of
    /// a server that was away do not all come back at the same moment.
    pub(super) fn pause(&mut self, length: u64, after: Option<Duration>, spread: f64) -> Option<Duration> {
        self.fruitless = if length > self.farthest { 0 } else { self.fruitless + 1 };
        self.farthest = self.farthest.max(length);
        if self.fruitless >= MAX_FRUITLESS || self.attempts >= MAX_ATTEMPTS {
            return None;
        }
        let own = self.limits.pause(self.fruitless).mul_f64(0.75 + spread / 2.0);
        Some(after.map_or(own, |wish| wish.min(self.limits.paced(LONGEST_PAUSE)).max(own)))
    }
}

/// Returns a random number from 0 to 1 from the kernel.
pub(super) fn spread() -> f64 {
    let mut random = [0; 2];
    // If the kernel gives no random number, the pause is the mean one.
    match rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()) {
        Ok(_) => f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX),
        Err(_no_randomness) => 0.5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(pause: Option<Duration>) -> Option<u64> {
        pause.map(|pause| pause.as_secs())
    }

    #[test]
    fn fruitless_attempts_end_and_progress_begins_anew() {
        let mut retry = Retry::new(FetchLimits { pace: 1.0 }, 10);
        // The second attempt starts over. It receives fewer bytes than the earlier run left, so none of them is new.
        let lengths = [10, 7, 20, 20, 20, 20, 20, 20];
        let pauses = lengths.map(|length| seconds(retry.pause(length, None, 0.5)));
        assert_eq!(pauses, [Some(1), Some(2), Some(1), Some(1), Some(2), Some(4), Some(8), None]);
    }

    #[test]
    fn there_is_a_last_attempt_even_with_progress() {
        let mut retry = Retry::new(FetchLimits { pace: 1.0 }, 0);
        let made = (1..).take_while(|length| {
            retry.attempts += 1;
            retry.pause(*length, None, 0.0).is_some()
        });
        assert_eq!(made.count(), 99);
    }

    #[test]
    fn the_servers_wish_counts_up_to_a_cap() {
        let pause = |wish| {
            let mut retry = Retry::new(FetchLimits { pace: 1.0 }, 0);
            seconds(retry.pause(0, Some(Duration::from_secs(wish)), 0.5))
        };
        assert_eq!([0, 7, 3600].map(pause), [Some(1), Some(7), Some(60)]);
        let spread = spread();
        assert!((0.0..=1.0).contains(&spread));
    }
}
