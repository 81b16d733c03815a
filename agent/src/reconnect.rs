//! The pauses between the attempts to connect to the bus.

use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;

use async_nats::{ConnectError, ConnectErrorKind};

/// The longest pause between two attempts to connect. A broker refuses connections while it restarts, and devices must be
/// back soon afterwards.
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// The longest pause after the broker has refused the login. A device whose login was revoked then makes some hundred
/// attempts in a day, and not one every two seconds.
const MAX_REFUSAL_PAUSE: Duration = Duration::from_secs(900);

/// The attempts since the last stable connection.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    pub(crate) count: u32,
    /// The attempts since the last one that the broker did not refuse.
    refusals: u32,
}

impl Attempts {
    /// Records an attempt that did not lead to a stable connection. Returns the pause before the next one, and whether the
    /// broker has refused the login.
    pub(crate) fn failed(&mut self, error: Option<&anyhow::Error>) -> (Duration, bool) {
        self.count += 1;
        let is_refusal = error.is_some_and(is_refusal);
        self.refusals = if is_refusal { self.refusals + 1 } else { 0 };
        (if is_refusal { refusal_pause(self.refusals) } else { pause(self.count) }, is_refusal)
    }
}

fn is_refusal(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<ConnectError>().map(ConnectError::kind);
    matches!(kind, Some(ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication))
}

/// Returns the pause: half a second after the first attempt, doubled for each further one up to [`MAX_PAUSE`], minus a
/// random part of up to a half. The random part keeps a fleet from reconnecting all at once after a restart of the broker.
fn pause(attempts: u32) -> Duration {
    let full = Duration::from_millis(250 << attempts.min(6)).min(MAX_PAUSE);
    full - jitter(full / 2)
}

/// Returns the pause: a second after the first refusal, doubled for each further one up to [`MAX_REFUSAL_PAUSE`], minus a
/// random part of up to a quarter.
fn refusal_pause(refusals: u32) -> Duration {
    let full = Duration::from_secs(1 << (refusals - 1).min(12)).min(MAX_REFUSAL_PAUSE);
    full - jitter(full / 4)
}

/// Returns a random duration up to `max`. The standard library gives each `RandomState` random keys.
pub(crate) fn jitter(max: Duration) -> Duration {
    let random = RandomState::new().hash_one(()) as u32;
    max.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_stays_within_its_bounds() {
        for attempts in 1..100 {
            let pause = pause(attempts);
            assert!(pause <= MAX_PAUSE, "{attempts}: {pause:?}");
            assert!(pause >= Duration::from_millis(250), "{attempts}: {pause:?}");
        }
        assert!((0..20).map(|_| pause(5)).collect::<std::collections::HashSet<_>>().len() > 1);
    }

    #[test]
    fn a_refused_device_asks_less_than_two_hundred_times_in_a_day() {
        let refused = anyhow::Error::from(ConnectError::from(ConnectErrorKind::AuthorizationViolation));
        let refused = refused.context("connect to the bus");
        let mut attempts = Attempts::default();
        let (mut waited, mut asked) = (Duration::ZERO, 0);
        while waited < Duration::from_secs(86_400) {
            waited += attempts.failed(Some(&refused)).0;
            asked += 1;
        }
        assert!((90..200).contains(&asked), "{asked}");
        let (pause, is_refusal) = attempts.failed(Some(&anyhow::anyhow!("connection refused")));
        assert!(pause <= MAX_PAUSE && !is_refusal);
        assert!(attempts.failed(Some(&refused)).0 <= Duration::from_secs(1), "the refusals are counted anew");
    }
}
