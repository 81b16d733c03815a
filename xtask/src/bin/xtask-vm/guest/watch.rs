//! The wait for an event in a guest. It polls, and ends early if the event can no longer happen.

use std::time::{Duration, Instant};

use anyhow::{Error, Result};
use xtask_core::error::{self, Failure, Kind};
use xtask_core::limits;
use xtask_jobs::Ui;

use super::console::Console;

/// The end of a limit, which several waits can share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// Returns the deadline of a limit that began at `begun`.
    pub(crate) fn since(begun: Instant, limit: Duration) -> Self {
        Self { at: begun + limit, limit }
    }

    /// Returns the deadline of a limit that begins now.
    pub(crate) fn after(limit: Duration) -> Self {
        Self::since(Instant::now(), limit)
    }

    /// Returns the earlier one of this deadline and the deadline of a limit that begins now.
    pub(crate) fn within(self, limit: Duration) -> Self {
        let inner = Self::after(limit);
        if inner.at < self.at { inner } else { self }
    }

    pub(crate) fn is_over(self) -> bool {
        Instant::now() > self.at
    }
}

/// A guest that can be waited for.
pub(crate) trait Watched {
    fn console(&mut self) -> &mut Console;

    /// Returns an error if the awaited event can no longer happen, because QEMU or the broker has ended.
    fn check_alive(&mut self, _what: &str) -> Result<()> {
        Ok(())
    }
}

/// A console is enough to watch a guest if the probe itself checks whether QEMU runs.
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
    pub(crate) deadline: Deadline,
    /// The remedy if the event does not happen in time.
    pub(crate) hint: &'a str,
}

impl Watch<'_> {
    /// Calls `probe` until it returns a value.
    ///
    /// # Errors
    /// Returns an error at once on Ctrl-C, if the guest is not alive, if the console shows that the guest will never be
    /// up, or if the probe returns a [`Failure`] of the guest. Any other error of the probe is reported only when the
    /// time has run out, because a slow guest or host causes many kinds of errors. If the probe's last error is a
    /// failure of the host, the wait returns a failure of the host, too: a broker that does not answer says nothing
    /// about the guest.
    pub(crate) fn until<G: Watched, T>(
        &self,
        guest: &mut G,
        mut probe: impl FnMut(&mut G) -> Result<Option<T>>,
    ) -> Result<T> {
        let mut last_error = None;
        loop {
            self.ui.check()?;
            for line in guest.console().read().map_err(unreadable)? {
                self.ui.detail(&format!("    | {line}"));
            }
            if let Some(fault) = guest.console().fault() {
                // The lines after the first one say where the fault happened.
                std::thread::sleep(limits::BROKER_SETTLE);
                guest.console().read().map_err(unreadable)?;
                return Err(fault.into());
            }
            match probe(guest) {
                Ok(Some(value)) => return Ok(value),
                Ok(None) => {}
                Err(error) if error::failure(&error).is_some() && !Kind::Host.is(&error) => {
                    return Err(error);
                }
                Err(error) => last_error = Some(error),
            }
            guest.check_alive(self.what)?;
            if self.deadline.is_over() {
                return Err(self.late(last_error));
            }
            self.ui.tick(guest.console().last())?;
            std::thread::sleep(limits::POLL);
        }
    }

    /// Returns the error of a wait that has run out of time, given the last error of its probe.
    fn late(&self, last_error: Option<Error>) -> Error {
        let message = format!(
            "timed out waiting for {}: its limit of {} s has passed",
            self.what,
            self.deadline.limit.as_secs()
        );
        match last_error {
            Some(error) if Kind::Host.is(&error) => error.context(message),
            Some(error) => error.context(Failure::guest(message, self.hint)),
            None => Failure::guest(message, self.hint).into(),
        }
    }
}

/// Attributes an error to the host, because the console is a file of this host.
fn unreadable(error: Error) -> Error {
    error::host_fault(error, "read the guest's console", "see the causes; nothing is known about the agent")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waited(limit: Duration, mut probe: impl FnMut() -> Result<Option<u32>>) -> Result<u32> {
        let ui = Ui::quiet();
        let watch =
            Watch { ui: &ui, what: "a status", deadline: Deadline::after(limit), hint: "read console.log" };
        watch.until(&mut Console::default(), |_| probe())
    }

    #[test]
    fn an_error_of_the_host_is_retried_and_stays_the_hosts() {
        let silent = || Err(Failure::host("ask the broker", "run again").into());
        let error = waited(Duration::ZERO, silent).unwrap_err();
        assert_eq!((error::code(&error), error::hint(&error)), (69, Some("run again")));
        assert_eq!(error.to_string(), "timed out waiting for a status: its limit of 0 s has passed");

        let mut asked = 0;
        let late = waited(limits::CHILD_STOP, || {
            asked += 1;
            if asked == 1 { silent() } else { Ok(Some(asked)) }
        });
        assert_eq!(late.unwrap(), 2);
    }

    #[test]
    fn an_error_of_the_guest_ends_a_wait_and_an_unattributed_one_counts_as_the_guests() {
        let error = waited(limits::CHILD_STOP, || Err(Failure::guest("no such unit", "enable it").into()));
        assert_eq!(error.unwrap_err().to_string(), "no such unit");
        let error = waited(Duration::ZERO, || Err(anyhow::anyhow!("connection refused"))).unwrap_err();
        assert_eq!((error::code(&error), error::hint(&error)), (1, Some("read console.log")));
    }

    #[test]
    fn waits_that_share_a_deadline_share_its_limit() {
        let limit = Duration::from_secs(5);
        let over = Deadline::since(Instant::now() - limit, Duration::ZERO);
        assert!(over.is_over() && over.within(limit).is_over(), "an inner limit does not extend a deadline");
        let inner = Deadline::after(limit).within(Duration::ZERO);
        assert_eq!(inner.limit, Duration::ZERO, "the message names the limit that has passed");
        assert!(!Deadline::after(limit).within(limit * 2).is_over());
    }

    #[test]
    fn a_console_that_cannot_be_read_is_the_hosts_fault() {
        let directory = tempfile::tempdir().unwrap();
        let ui = Ui::quiet();
        let watch = Watch { ui: &ui, what: "a status", deadline: Deadline::after(Duration::ZERO), hint: "" };
        let error = watch.until(&mut Console::new(directory.path()), |_| Ok(Some(()))).unwrap_err();
        assert_eq!(error::code(&error), 69, "a directory is no console: {error:#}");
    }
}
