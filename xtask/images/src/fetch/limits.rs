//! The time limits of a download, scaled by one variable.

use std::time::Duration;

use xtask_core::error::Failure;

/// The environment variable whose value multiplies the downloader's waits. The downloader's tests set it.
pub const FETCH_PACE_VARIABLE: &str = "IOT_XTASK_FETCH_PACE";

/// The scale of a download's time limits.
#[derive(Debug, Clone, Copy)]
pub struct FetchLimits {
    /// The factor for every wait.
    pub pace: f64,
}

/// Time for connecting to a host, including TLS and a proxy's tunnel.
pub(super) const CONNECT: Duration = Duration::from_secs(15);
/// An attempt ends if no byte arrives for this time.
pub(super) const STALL: Duration = Duration::from_secs(30);
/// If there is a fallback image, the host must have answered within this time.
pub(super) const PROBE: Duration = Duration::from_secs(8);
/// If there is a fallback image, a connection that fails at once is tried again for this time.
pub(super) const PROBE_AGAIN: Duration = Duration::from_secs(3);
/// Upper bound for a pause that a server asks for by Retry-After.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl FetchLimits {
    /// Reads the pace from `IOT_XTASK_FETCH_PACE`, 1 by default.
    ///
    /// # Errors
    /// Returns a usage error if the value is not a number from 0.001 to 100.
    pub fn from_env() -> Result<Self, Failure> {
        let Some(text) = std::env::var_os(FETCH_PACE_VARIABLE) else { return Ok(Self { pace: 1.0 }) };
        let pace =
            text.to_str().and_then(|text| text.parse().ok()).filter(|pace| (0.001..=100.0).contains(pace));
        pace.map(|pace| Self { pace }).ok_or_else(|| {
            Failure::usage(format!("{FETCH_PACE_VARIABLE}={}: must be 0.001 to 100", text.display()))
        })
    }

    /// Returns one of this module's limits at this pace.
    pub fn paced(self, limit: Duration) -> Duration {
        limit.mul_f64(self.pace)
    }

    /// Returns the pause after `fruitless` consecutive attempts without new bytes: 1 s after the first, doubled each
    /// time up to 32 s.
    pub fn pause(self, fruitless: u32) -> Duration {
        self.paced(Duration::from_secs(1 << fruitless.saturating_sub(1).min(5)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_that_brings_nothing_waits_longer_and_longer() {
        let pauses =
            [0, 1, 2, 3, 6, 60].map(|fruitless| FetchLimits { pace: 1.0 }.pause(fruitless).as_secs());
        assert_eq!(pauses, [1, 1, 2, 4, 32, 32]);
        assert_eq!(FetchLimits { pace: 0.5 }.paced(STALL), Duration::from_secs(15));
    }
}
