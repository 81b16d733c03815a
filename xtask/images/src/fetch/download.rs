//! Makes one download: uses the bytes of an earlier run, makes attempts, and verifies the file.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use xtask_core::error::{Failure, Kind};
use xtask_core::format::human_seconds;
use xtask_core::image::DownloadSource;
use xtask_core::{bail_host, limits};

use super::address::Address;
use super::client::{self, Trouble};
use super::limits::{FetchLimits, PROBE_AGAIN};
use super::partial::{Begun, DownloadPaths};
use super::progress::size;
use super::retry::{Retry, spread};
use super::{FetchRequest, Fetched, RetryPolicy, seen};
use xtask_jobs::Ui;

/// Bytes that must stay free beside the file.
const SPARE_BYTES: u64 = 16 << 20;

/// One download, with all its attempts.
pub(super) struct Download<'a> {
    pub(super) limits: FetchLimits,
    pub(super) wanted: &'a FetchRequest<'a>,
    pub(super) address: &'a Address,
    pub(super) place: &'a DownloadPaths,
    pub(super) ui: &'a Ui,
    /// The start of the first attempt.
    pub(super) started: Instant,
    /// True if the host has answered at least one attempt.
    pub(super) answered: bool,
    /// The number of bytes that this download takes over from an earlier run; 0 if the download has started over.
    pub(super) resumed_from: u64,
}

impl Download<'_> {
    pub(super) fn run(mut self) -> Result<Fetched> {
        let mut begun = self.find()?;
        self.resumed_from = begun.as_ref().map_or(0, |begun| begun.length);
        let mut retry = Retry::new(self.limits, self.resumed_from);
        if let Some(whole) = begun.take_if(|begun| self.is_whole(begun)) {
            return self.finish(&whole, &retry);
        }
        let client = client::build(self.limits)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("start the download's runtime")?;
        self.started = Instant::now();
        let ended = loop {
            retry.attempts += 1;
            let Err(trouble) = runtime.block_on(self.attempt(&client, &mut begun)) else { break Ok(()) };
            let length = begun.as_ref().map_or(0, |begun| begun.length);
            if let Err(error) = self.settle(trouble, length, &mut retry) {
                break Err(error);
            }
        };
        // Dropping the runtime would wait for a resolver that hangs in its own thread. This does not wait.
        runtime.shutdown_background();
        let resumable = begun.as_ref().filter(|begun| begun.rest().is_some());
        if let (Err(error), Some(begun)) = (&ended, resumable)
            && Kind::Interrupted.is(error)
        {
            self.ui.note(&format!("kept {} of the download: the next run resumes there", size(begun.length)));
        }
        ended.map_err(|error| self.after_an_answer(error))?;
        self.finish(begun.as_ref().context("the server ended the download before its first byte")?, &retry)
    }

    /// Turns [`Kind::Unreachable`] into [`Kind::Host`] if there is a fallback image and the server has answered at
    /// least once. The fallback image is used only if the server has never answered.
    fn after_an_answer(&self, error: anyhow::Error) -> anyhow::Error {
        let was_there = self.wanted.retry_policy != RetryPolicy::Full && self.answered;
        if was_there && Kind::Unreachable.is(&error) {
            let hint = "run again: the download resumes where it stopped";
            return Failure::host(error.to_string(), hint).into();
        }
        error
    }

    /// Returns the usable bytes that an earlier run left.
    fn find(&mut self) -> Result<Option<Begun>> {
        let DownloadSource { digest, bytes, .. } = self.wanted.source;
        let looking = seen("reading", self.ui);
        let found = self.place.find(&self.address.identity(), digest.as_ref(), looking)?;
        let total = |begun: &Begun| bytes.or(begun.note.total);
        let sane = |begun: &Begun| begun.length > 0 && total(begun).is_none_or(|total| begun.length <= total);
        let found = found.filter(sane).filter(|begun| self.is_whole(begun) || begun.rest().is_some());
        match &found {
            Some(begun) => {
                self.ui.note(&format!("resuming after {} from an earlier run", size(begun.length)))
            }
            None => self.place.discard()?,
        }
        Ok(found)
    }

    /// Returns whether an earlier run has left the complete file. A run may have died after the last byte and before
    /// the file was renamed.
    fn is_whole(&self, begun: &Begun) -> bool {
        self.wanted.source.digest.as_ref().is_some_and(|digest| begun.sums.clone().finish().1 == *digest)
    }

    /// Handles a failed attempt, after which the file has `length` bytes. Waits for the next attempt, or returns the
    /// error.
    fn settle(&mut self, trouble: Trouble, length: u64, retry: &mut Retry) -> Result<()> {
        let (error, after) = match trouble {
            Trouble::Final(error) => return Err(error),
            Trouble::StartOver(why) => {
                self.ui.note(&format!("{why}: starting over"));
                self.resumed_from = 0;
                return self.place.discard();
            }
            Trouble::Passing { error, after } => (error, after),
        };
        if self.wanted.retry_policy != RetryPolicy::Full && !self.answered {
            // The name server may start a second later than this run, so the first failures are not final.
            let until = self.started + self.limits.paced(PROBE_AGAIN);
            let again = |pause: &Duration| {
                self.wanted.retry_policy == RetryPolicy::ProbeFirst && Instant::now() + *pause < until
            };
            if let Some(pause) = retry.pause(length, after, spread()).filter(again) {
                self.ui.note(&format!("{error}; trying once more"));
                return self.wait(pause);
            }
            // If there is a fallback, a host that does not answer in time counts as unreachable.
            let unreachable = || Failure::unreachable(error.to_string(), "check the network").into();
            return Err(if Kind::Unreachable.is(&error) { error } else { unreachable() });
        }
        let Some(pause) = retry.pause(length, after, spread()) else {
            let attempts = retry.attempts;
            self.ui.note(&format!("giving up after {attempts} attempts, the last ones without progress"));
            return Err(error);
        };
        let seconds = human_seconds(pause.as_secs_f64());
        self.ui.note(&format!("{error}; next attempt in {seconds}, from {}", size(length)));
        self.wait(pause)
    }

    fn wait(&mut self, pause: Duration) -> Result<()> {
        let until = Instant::now() + pause;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.ui.tick(&format!("next attempt in {}", human_seconds(left.as_secs_f64())))?;
            std::thread::sleep(left.min(limits::POLL));
        }
    }

    /// Compares the digest, and gives the file its final name.
    fn finish(self, begun: &Begun, retry: &Retry) -> Result<Fetched> {
        self.ui.uninterruptible().tick("writing the rest to the disk")?;
        let (sha256, found) = begun.sums.clone().finish();
        if let Some(wanted) = self.wanted.source.digest.as_ref().filter(|wanted| **wanted != found) {
            self.place.discard()?;
            let hint = if self.resumed_from > 0 {
                "run again: it starts from the beginning; a part of this file was from an earlier run"
            } else {
                "check that the digest belongs to this file; a mirror may also be behind its publisher"
            };
            bail_host!("download {}: it has {found}, expected {wanted}", self.address; "{hint}");
        }
        self.place.finish(begun).map_err(|error| self.disk_error(error))?;
        let (bytes, resumed_from, attempts) = (begun.length, self.resumed_from, retry.attempts);
        Ok(Fetched { sha256, bytes, resumed_from, attempts, already: false })
    }

    /// Refuses a file that would not fit. `missing` is the number of bytes that are not on disk yet.
    pub(super) fn check_space(&self, missing: u64) -> Result<()> {
        let directory = self.place.directory();
        let space = rustix::fs::statvfs(directory)
            .with_context(|| format!("read the free space in {}", directory.display()))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        let needed = missing.saturating_add(SPARE_BYTES);
        if needed > free {
            let (directory, free, needed) = (directory.display(), size(free), size(needed));
            bail_host!(
                "download {}: {directory} has {free} free, {needed} needed", self.address;
                "free space in {directory}"
            );
        }
        Ok(())
    }

    /// Deletes the partial file if `error` says that the disk is full, so that the disk does not stay full.
    pub(super) fn disk_error(&self, error: anyhow::Error) -> anyhow::Error {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if !matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
            return error;
        }
        let (path, directory) = (self.place.partial.display(), self.place.directory().display());
        let error = match self.place.discard() {
            Ok(()) => error,
            Err(left) => error.context(format!("{left:#}")),
        };
        let full = format!("download {} to {path}: the disk is full", self.address);
        error.context(Failure::host(
            full,
            format!("free space in {directory}; the partial download was deleted"),
        ))
    }
}
