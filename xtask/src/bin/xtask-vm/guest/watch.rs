//! The wait for an event in a guest. It polls, and ends early if the event can no longer happen.

use std::time::{Duration, Instant};

use anyhow::Result;
use xtask_core::error::{self, Failure};
use xtask_core::limits;
use xtask_jobs::Ui;

use super::console::Console;

/// A guest that can be waited for.
pub(crate) trait Watched {
    fn console(&mut self) -> &mut Console;

    /// Returns an error if the awaited event can no longer happen, because QEMU or the broker has ended.
    fn check_alive(&mut self, _what: &str) -> Result<()> {
        Ok(())
    }
}

/// A console can be watched alone if the probe checks QEMU itself.
impl Watched for Console {
    fn console(&mut self) -> &mut Console {
        self
    }
}

/// A wait for an event in a guest.
pub(crate) struct Watch<'a> {
    pub(crate) ui: &'a Ui,
    /// The awaited event, for messages: `the guest to take its keys`.
    pub(crate) what: &'a str,
    pub(crate) limit: Duration,
    /// The remedy if the event does not happen in time.
    pub(crate) hint: &'a str,
}

impl Watch<'_> {
    /// Calls `probe` until it returns a value.
    ///
    /// # Errors
    /// Returns an error at once on Ctrl-C, if the guest is not alive, if the console shows that the guest will never be up, or
    /// if the probe returns a [`Failure`]. Any other error of the probe is reported only when the time has run out, because a
    /// slow guest causes many kinds of errors.
    pub(crate) fn until<G: Watched, T>(
        &self,
        guest: &mut G,
        mut probe: impl FnMut(&mut G) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + self.limit;
        let mut last_error = None;
        loop {
            self.ui.check()?;
            for line in guest.console().read()? {
                self.ui.detail(&format!("    | {line}"));
            }
            if let Some(fault) = guest.console().fault() {
                // The lines after the first one say where the fault happened.
                std::thread::sleep(limits::BROKER_SETTLE);
                guest.console().read()?;
                return Err(fault.into());
            }
            match probe(guest) {
                Ok(Some(value)) => return Ok(value),
                Ok(None) => {}
                Err(error) if error::failure(&error).is_some() => return Err(error),
                Err(error) => last_error = Some(error),
            }
            guest.check_alive(self.what)?;
            if Instant::now() > deadline {
                let seconds = self.limit.as_secs();
                let late = Failure::guest(
                    format!("timed out waiting for {} after {seconds} s", self.what),
                    self.hint,
                );
                return Err(match last_error {
                    Some(error) => error.context(late),
                    None => late.into(),
                });
            }
            self.ui.tick(guest.console().last())?;
            std::thread::sleep(limits::POLL);
        }
    }
}
