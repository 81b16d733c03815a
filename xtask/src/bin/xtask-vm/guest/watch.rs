//! The one wait for a guest. It polls, and ends early if the event can no longer happen.

use std::time::{Duration, Instant};

use anyhow::Result;
use xtask_core::error::{self, Failure};
use xtask_core::limits;
use xtask_jobs::Ui;

use super::console::Console;

/// A guest that can be waited for.
pub(crate) trait Watched {
    /// Its console.
    fn console(&mut self) -> &mut Console;

    /// Fails where what is waited for can never come: its QEMU or its broker has ended.
    fn check_alive(&mut self, _what: &str) -> Result<()> {
        Ok(())
    }
}

/// The console alone, of a guest whose QEMU the probe itself looks at.
impl Watched for Console {
    fn console(&mut self) -> &mut Console {
        self
    }
}

/// A wait.
pub(crate) struct Watch<'a> {
    pub(crate) ui: &'a Ui,
    /// What is waited for, for messages: `the guest to take its keys`.
    pub(crate) what: &'a str,
    pub(crate) limit: Duration,
    /// What to do where it does not come in time.
    pub(crate) hint: &'a str,
}

impl Watch<'_> {
    /// Looks until `probe` has something. Ends at once on Ctrl-C, on a guest that is not alive, on a console that says that
    /// the guest will never be up, and on an error of the probe that says whose it is. Any other error of the probe is
    /// told if time runs out, since a guest that is slow fails in many ways.
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
                // The lines behind the first one say where it happened.
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
