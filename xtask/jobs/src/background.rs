//! A job that runs in the background while the screen shows another one.

use std::sync::atomic::{AtomicBool, Ordering};

/// The state of a background job: whether the screen shows it, and whether it was cancelled.
#[derive(Debug, Default)]
pub struct Background {
    is_shown: AtomicBool,
    is_cancelled: AtomicBool,
}

impl Background {
    /// Shows the job on the screen from now on.
    pub fn show(&self) {
        self.is_shown.store(true, Ordering::Relaxed);
    }

    /// Makes the job fail when it reports its progress the next time.
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
