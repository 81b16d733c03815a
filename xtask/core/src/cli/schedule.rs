//! The schedule of an episode of `torture --faults`, and its text: the value of `torture --schedule`.

use std::fmt::{Display, Formatter};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::device_fault::DeviceFault;

/// The latest beginning and the greatest length of a fault.
const MAX: Tenths = Tenths(6000);
/// The maximum number of faults of an episode.
const MAX_FAULTS: usize = 32;

/// A time in tenths of a second, because the text of a schedule has one decimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Tenths(pub u32);

impl Tenths {
    /// Returns the time as a duration.
    pub fn duration(self) -> Duration {
        Duration::from_millis(100 * u64::from(self.0))
    }
}

impl FromStr for Tenths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (whole, tenth) = text.split_once('.').unwrap_or((text, "0"));
        let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        let parsed = (is_number(whole) && is_number(tenth) && tenth.len() == 1)
            .then(|| Some(Self(whole.parse::<u32>().ok()?.checked_mul(10)? + tenth.parse::<u32>().ok()?)))
            .flatten();
        parsed.filter(|tenths| *tenths <= MAX).ok_or_else(|| {
            format!("{text:?} is no number of seconds from 0 to {}, with at most one decimal", MAX.0 / 10)
        })
    }
}

/// Writes the seconds, with one decimal if it is not zero. With `{:.1}`, always writes the decimal.
impl Display for Tenths {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        let (whole, tenth) = (self.0 / 10, self.0 % 10);
        match tenth == 0 && formatter.precision().is_none() {
            true => write!(formatter, "{whole}"),
            false => write!(formatter, "{whole}.{tenth}"),
        }
    }
}

/// A fault with its time in an episode. Its text is `FAULT@BEGIN+LENGTH`, or `FAULT@BEGIN` for a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ScheduledFault {
    pub fault: DeviceFault,
    /// The time since the beginning of the episode.
    pub begin: Tenths,
    /// The time until the fault ends. Zero for a fault that is a moment ([`DeviceFault::is_moment`]).
    pub length: Tenths,
}

impl ScheduledFault {
    /// Returns the time since the beginning of the episode at which the fault ends.
    pub fn end(&self) -> Tenths {
        Tenths(self.begin.0 + self.length.0)
    }
}

impl Display for ScheduledFault {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}@{:.1}", self.fault, self.begin)?;
        if self.fault.is_moment() { Ok(()) } else { write!(formatter, "+{}", self.length) }
    }
}

impl FromStr for ScheduledFault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, times) = text.split_once('@').ok_or_else(|| {
            format!("{text:?} has no time; write FAULT@BEGIN+LENGTH in seconds, such as link-down@1.5+8")
        })?;
        let fault: DeviceFault = name.parse()?;
        let (begin, length) = match times.split_once('+') {
            Some((begin, length)) => (begin, Some(length.parse::<Tenths>()?)),
            None => (times, None),
        };
        let length = match length {
            // `+0` says the same as no length.
            Some(length) if fault.is_moment() && length.0 > 0 => {
                return Err(format!("{fault} is a moment and has no length; leave +{length} out"));
            }
            Some(Tenths(0)) if !fault.is_moment() => {
                return Err(format!("{fault} must last; its length is 0"));
            }
            None if !fault.is_moment() => {
                return Err(format!("{text:?} has no length; write {text}+LENGTH, in seconds"));
            }
            length => length.unwrap_or_default(),
        };
        Ok(Self { fault, begin: begin.parse()?, length })
    }
}

/// The faults of an episode, in the order of their beginnings. In reports, a schedule is its text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Schedule(Vec<ScheduledFault>);

impl Schedule {
    /// Returns the schedule of these faults, which may be in any order.
    pub fn new(mut faults: Vec<ScheduledFault>) -> Self {
        faults.sort_by_key(|fault| fault.begin);
        Self(faults)
    }

    /// Returns the faults, in the order of their beginnings.
    pub fn faults(&self) -> &[ScheduledFault] {
        &self.0
    }

    /// Returns the time since the beginning of the episode at which the last fault ends.
    pub fn end(&self) -> Tenths {
        self.0.iter().map(ScheduledFault::end).max().unwrap_or_default()
    }
}

impl Display for Schedule {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        for (place, fault) in self.0.iter().enumerate() {
            write!(formatter, "{}{fault}", if place == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let faults: Vec<_> = text.split(',').map(str::parse).collect::<Result<_, _>>()?;
        match faults.len() <= MAX_FAULTS {
            true => Ok(Self::new(faults)),
            false => Err(format!("{} faults are more than {MAX_FAULTS}; leave some out", faults.len())),
        }
    }
}

impl From<Schedule> for String {
    fn from(schedule: Schedule) -> Self {
        schedule.to_string()
    }
}

/// Unlike the flag, reports can have the empty schedule: an episode that fails without any fault is shrunk to it.
impl TryFrom<String> for Schedule {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text.is_empty() { Ok(Self::default()) } else { text.parse() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_a_schedule_is_read_and_written_unchanged() {
        for text in [
            "link-down@1.5+8,power-cut@2.0+4",
            "clock-1970@0.0+0.1",
            "kill-agent@600.0,qemu-stopped@600.0+30.5",
        ] {
            let schedule: Schedule = text.parse().unwrap();
            assert_eq!(schedule.to_string(), text);
            let json = serde_json::to_string(&schedule).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
        }
        assert_eq!(serde_json::from_str::<Schedule>("\"\"").unwrap(), Schedule::default());
    }

    #[test]
    fn each_fault_at_each_kind_of_time_makes_the_round_trip() {
        for fault in DeviceFault::all().iter().copied() {
            for (begin, length) in [(0, 1), (7, 10), (10, 123), (6000, 6000)] {
                let length = if fault.is_moment() { 0 } else { length };
                let one = ScheduledFault { fault, begin: Tenths(begin), length: Tenths(length) };
                assert_eq!(one.to_string().parse(), Ok(one));
            }
        }
    }

    #[test]
    fn the_faults_are_ordered_and_the_last_end_counts() {
        let schedule: Schedule = "kill-agent@9,link-down@1+8.5,power-cut@2+4".parse().unwrap();
        assert_eq!(schedule.to_string(), "link-down@1.0+8.5,power-cut@2.0+4,kill-agent@9.0");
        assert_eq!(schedule.end().duration(), Duration::from_millis(9500));
        assert_eq!(Schedule::default().end(), Tenths(0));
    }

    #[test]
    fn a_wrong_schedule_is_refused_with_its_reason() {
        let many = vec!["kill-agent@1"; 33].join(",");
        for (text, words) in [
            ("", "\"\" has no time; write FAULT@BEGIN+LENGTH"),
            ("link-down", "has no time"),
            ("link-up@1+2", "there is no fault \"link-up\""),
            ("link-down@1", "write link-down@1+LENGTH"),
            ("link-down@1+0", "its length is 0"),
            ("link-down@1+0.0", "its length is 0"),
            ("kill-agent@1+2", "kill-agent is a moment and has no length; leave +2 out"),
            ("link-down@1.25+2", "\"1.25\" is no number of seconds from 0 to 600"),
            ("link-down@-1+2", "\"-1\" is no number"),
            ("link-down@1+601", "\"601\" is no number"),
            ("link-down@99999999999+1", "is no number"),
            ("link-down@.5+1", "is no number"),
            ("link-down@1+2,", "has no time"),
            (&many, "33 faults are more than 32"),
        ] {
            let error = text.parse::<Schedule>().unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
