//! The handling of Ctrl-C. The first SIGINT, SIGTERM or SIGHUP sets a flag. Every wait checks this flag, so that the
//! run ends in order. A later signal ends the process at once, and a later run deletes the files that are left.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use xtask_core::error::{Failure, Verdict};
use xtask_core::limits;

/// The flag that is set after a request to stop.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt {
    asked: Arc<AtomicBool>,
}

impl Interrupt {
    /// Listens for the signals from now on.
    pub(crate) fn install() -> Result<Self> {
        let interrupt = Self::default();
        let asked = Arc::clone(&interrupt.asked);
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("listen for Ctrl-C")?;
        std::thread::spawn(move || {
            let mut first = None;
            for _ in signals.forever() {
                asked.store(true, Ordering::Relaxed);
                // timeout(1) and CI runners signal first the process and then its group. Count these two signals as
                // one.
                if first.get_or_insert_with(Instant::now).elapsed() > limits::INTERRUPT_DEBOUNCE {
                    signal_hook::low_level::exit(Verdict::Interrupted.exit_code().into());
                }
            }
        });
        Ok(interrupt)
    }

    /// Fails if a stop was requested.
    pub(crate) fn check(&self) -> Result<()> {
        if self.asked.load(Ordering::Relaxed) { Err(Failure::interrupted().into()) } else { Ok(()) }
    }
}
