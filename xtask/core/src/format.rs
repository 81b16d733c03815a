//! Formats numbers and times for people.

use std::time::SystemTime;

use clap::ValueEnum;

/// Returns the current time in whole seconds, as RFC 3339 in UTC.
pub fn now_rfc3339() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// Returns the whole seconds from an RFC 3339 time to `now`. Returns `None` if the text is not an RFC 3339 time. Also
/// returns `None` if the time is later than `now`, which happens if the clock was set back.
pub fn seconds_since(rfc3339: &str, now: SystemTime) -> Option<u64> {
    let then = humantime::parse_rfc3339(rfc3339).ok()?;
    Some(now.duration_since(then).ok()?.as_secs())
}

/// Rounds to milliseconds, which are precise enough for a report.
pub fn round(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}

/// Returns the name by which the command line calls a value.
pub fn name_of(value: &impl ValueEnum) -> String {
    value.to_possible_value().expect("no value is hidden").get_name().to_owned()
}

/// Returns a word for a command line of a POSIX shell, in quotes if it needs them.
pub fn shell_word(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:,=+@%".contains(&byte);
    if !word.is_empty() && word.bytes().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Formats a size as `17 KiB`, `589 MiB` or `2.1 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes.div_ceil(1 << 10)),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes >> 20),
        _ => gib(bytes),
    }
}

/// Formats a size in GiB, whatever its magnitude: `2.1 GiB`.
pub fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64)
}

/// Formats a duration as `0.3 s`, `61 s` or `12 min 5 s`.
pub fn human_seconds(seconds: f64) -> String {
    if seconds < 10.0 {
        format!("{seconds:.1} s")
    } else if seconds < 600.0 {
        format!("{seconds:.0} s")
    } else {
        let whole = seconds.round() as u64;
        format!("{} min {} s", whole / 60, whole % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_counted_from_a_written_time() {
        let now = humantime::parse_rfc3339("2026-11-24T10:00:00Z").unwrap();
        assert_eq!(seconds_since("2026-11-23T09:59:00Z", now), Some(86_460));
        assert_eq!(seconds_since("2026-11-24T10:00:00Z", now), Some(0));
        assert_eq!(seconds_since("2026-11-24T10:00:01Z", now), None, "the clock was set back");
        assert_eq!(seconds_since("yesterday", now), None);
        assert_eq!(seconds_since(&now_rfc3339(), SystemTime::now()).unwrap() / 60, 0);
    }

    #[test]
    fn bytes_are_readable() {
        for (bytes, text) in [(1, "1 KiB"), (617_000_000, "588 MiB"), (5 << 29, "2.5 GiB")] {
            assert_eq!(human_bytes(bytes), text);
        }
    }

    #[test]
    fn seconds_are_readable() {
        for (seconds, text) in [(0.26, "0.3 s"), (61.2, "61 s"), (725.0, "12 min 5 s")] {
            assert_eq!(human_seconds(seconds), text);
        }
    }

    #[test]
    fn a_word_reaches_a_program_unchanged() {
        assert_eq!(shell_word("/tmp/c-1/state_2.json"), "/tmp/c-1/state_2.json");
        for word in ["", "/tmp/a b", "it's", "$HOME", "a;b", "~", "é"] {
            let echo = format!("printf %s {}", shell_word(word));
            let output = std::process::Command::new("sh").args(["-c", &echo]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }
}
