//! The limits of a download's waits, scaled by one variable.

use std::time::Duration;

use xtask_core::error::Failure;

/// The variable that multiplies the downloader's waits; its tests set it.
pub const FETCH_PACE_VARIABLE: &str = "IOT_XTASK_FETCH_PACE";

/// The limits of a download's waits.
#[derive(Debug, Clone, Copy)]
pub struct FetchLimits {
    /// Multiplies every wait.
    pub pace: f64,
}

/// Until a host has taken a connection, TLS and a proxy's tunnel included.
pub(super) const CONNECT: Duration = Duration::from_secs(15);
/// Without a byte an attempt is over.
pub(super) const STALL: Duration = Duration::from_secs(30);
/// Where there is a fallback: until the host has answered at all.
pub(super) const PROBE: Duration = Duration::from_secs(8);
/// Where there is a fallback: for so long a connection that fails at once is tried again.
pub(super) const PROBE_AGAIN: Duration = Duration::from_secs(3);
/// What a server may ask for by Retry-After; longer is this long.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl FetchLimits {
    /// At the pace of `IOT_XTASK_FETCH_PACE`, 1 by default.
    ///
    /// # Errors
    /// A usage error where that is no positive number.
    pub fn from_env() -> Result<Self, Failure> {
        let Some(text) = std::env::var_os(FETCH_PACE_VARIABLE) else { return Ok(Self { pace: 1.0 }) };
        let pace =
            text.to_str().and_then(|text| text.parse().ok()).filter(|pace| (0.001..=100.0).contains(pace));
        pace.map(|pace| Self { pace }).ok_or_else(|| {
            Failure::usage(format!("{FETCH_PACE_VARIABLE}={}: must be 0.001 to 100", text.display()))
        })
    }

    /// One of this module's limits at this pace.
    pub fn paced(self, limit: Duration) -> Duration {
        limit.mul_f64(self.pace)
    }

    /// The pause after an attempt that brought nothing, by how many of them there were in a row: 1 s, doubled each time.
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
