//! Describes the progress of a download in words: `123 of 600 MiB, 45 MiB/s, 11 s left`.

use std::time::Instant;

use xtask_core::format::human_seconds;

/// The weight of the latest sample in the rate. A rate over about ten samples does not jump, and still shows a stall.
const SMOOTHING: f64 = 0.2;

/// The rate of a transfer, smoothed over time.
#[derive(Debug)]
pub(super) struct TransferRate {
    last: (Instant, u64),
    rate: Option<f64>,
}

impl TransferRate {
    pub(super) fn begin(now: Instant, bytes: u64) -> Self {
        Self { last: (now, bytes), rate: None }
    }

    /// Describes `bytes` of `total` at `now`. This function must be called at a steady pace.
    pub(super) fn look(&mut self, now: Instant, bytes: u64, total: Option<u64>) -> String {
        let (then, before) = self.last;
        let seconds = now.duration_since(then).as_secs_f64();
        if seconds > 0.0 {
            let latest = bytes.saturating_sub(before) as f64 / seconds;
            self.rate = Some(self.rate.map_or(latest, |rate| rate + SMOOTHING * (latest - rate)));
            self.last = (now, bytes);
        }
        let rate = self.rate.unwrap_or_default();
        let left = total.filter(|_| rate >= 1.0).map_or(String::new(), |total| {
            format!(", {} left", human_seconds((total.saturating_sub(bytes) as f64 / rate).ceil()))
        });
        format!("{}, {}/s{left}", of(bytes, total), size(rate as u64))
    }
}

fn of(bytes: u64, total: Option<u64>) -> String {
    let Some(total) = total else { return size(bytes) };
    let (unit, name) = unit(total);
    format!("{} of {} {name}", bytes / unit, total / unit)
}

/// Formats a size: `600 MiB`.
pub(super) fn size(bytes: u64) -> String {
    let (unit, name) = unit(bytes);
    format!("{} {name}", bytes / unit)
}

/// Returns the largest unit in which a number of bytes is shown without decimal places.
fn unit(bytes: u64) -> (u64, &'static str) {
    match bytes {
        0..10_240 => (1, "bytes"),
        10_240..10_485_760 => (1 << 10, "KiB"),
        _ => (1 << 20, "MiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_words_are_readable() {
        let begin = Instant::now();
        let after = |seconds| begin + Duration::from_secs(seconds);
        let mut progress = TransferRate::begin(begin, 78 << 20);
        assert_eq!(
            progress.look(after(1), 123 << 20, Some(618 << 20)),
            "123 of 618 MiB, 45 MiB/s, 11 s left"
        );
        assert_eq!(
            progress.look(after(2), 123 << 20, Some(618 << 20)),
            "123 of 618 MiB, 36 MiB/s, 14 s left"
        );
        assert_eq!(TransferRate::begin(begin, 0).look(after(2), 300_000, None), "292 KiB, 146 KiB/s");
        assert_eq!(TransferRate::begin(begin, 0).look(begin, 0, Some(1 << 20)), "0 of 1024 KiB, 0 bytes/s");
    }
}
