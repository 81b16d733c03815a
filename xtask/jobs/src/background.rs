//! A job behind the one that the screen shows.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the job is on the screen, and whether anybody still wants it.
#[derive(Debug, Default)]
pub struct Background {
    is_shown: AtomicBool,
    is_cancelled: AtomicBool,
}

impl Background {
    /// The screen is the job's from now on.
    pub fn show(&self) {
        self.is_shown.store(true, Ordering::Relaxed);
    }

    /// Lets the job fail at its next sign of life.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_shown(&self) -> bool {
        self.is_shown.load(Ordering::Relaxed)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }
}
