//! How long a phase takes on this machine.

use std::fmt;

use xtask_core::format::human_seconds;

/// What is usual, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usual {
    /// Half of the runs were faster.
    pub median: f64,
    /// The fastest and the slowest.
    pub spread: (f64, f64),
    /// The longest silence of all.
    pub silent: f64,
}

impl fmt::Display for Usual {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (fastest, slowest) = (human_seconds(self.spread.0), human_seconds(self.spread.1));
        write!(f, "usually {}", human_seconds(self.median))?;
        if fastest == slowest { Ok(()) } else { write!(f, ", {fastest} to {slowest}") }
    }
}

impl Usual {
    /// What is to be expected of the rest.
    pub fn rest(&self, elapsed: f64) -> String {
        if elapsed < self.median {
            format!("about {} to go", human_seconds(self.median - elapsed))
        } else if elapsed > self.spread.1 {
            "slower than any earlier run".to_owned()
        } else {
            "any moment".to_owned()
        }
    }
}
