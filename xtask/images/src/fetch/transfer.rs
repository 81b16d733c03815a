//! One attempt: sends the request, reads the head of the answer, and takes the body.

use std::time::Instant;

use anyhow::Result;
use bytes::Bytes;
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, IF_RANGE, RANGE};
use reqwest::{Client, Response};
use tokio::time::{Interval, MissedTickBehavior, interval};
use xtask_core::error::Failure;
use xtask_core::format::human_seconds;
use xtask_core::limits;

use super::RetryPolicy;
use super::answer::{self, PartRequest, ResponseKind};
use super::client::{Trouble, passing, proxy_refuses, trouble};
use super::download::Download;
use super::limits::{PROBE, STALL};
use super::partial::{Begun, Note};
use super::progress::{TransferRate, size};
use super::sink::Sink;

impl Download<'_> {
    /// Makes one attempt. Afterwards, `begun` has the bytes that have arrived, regardless of the outcome.
    pub(super) async fn attempt(
        &mut self,
        client: &Client,
        begun: &mut Option<Begun>,
    ) -> Result<(), Trouble> {
        let asked = begun.as_ref().and_then(Begun::rest);
        let response = self.ask(client, asked.as_ref()).await?;
        let headers = response.headers();
        let (from, total) = match answer::read(response.status(), headers, asked.as_ref()) {
            ResponseKind::Whole { total } => (0, total),
            ResponseKind::Rest { total } => (asked.as_ref().map_or(0, |asked| asked.from), Some(total)),
            ResponseKind::StartOver(why) => {
                *begun = None;
                return Err(Trouble::StartOver(why));
            }
            ResponseKind::Passing { what, after } => {
                let error = self.failed(&what, "run again later: the download resumes where it stopped");
                return Err(Trouble::Passing { error, after });
            }
            ResponseKind::ProxyRefuses(what) => {
                let error = proxy_refuses(self.address, &what);
                return Err(Trouble::Final(error.into()));
            }
            ResponseKind::Final { what, hint } => return Err(self.failed(&what, hint).into()),
        };
        // A file of another size cannot have the digest.
        let known = self.wanted.source.bytes;
        if let Some(total) = total.filter(|total| known.is_some_and(|known| known != *total)) {
            return Err(self.wrong_size(&total.to_string()).into());
        }
        // If the server starts from the beginning, the old bytes are deleted before the free space is checked.
        let anew = from == 0 && begun.take().is_some();
        if anew {
            self.place.discard()?;
        }
        let expected = total.or(known);
        if let Some(expected) = expected {
            self.check_space(expected.saturating_sub(from))?;
        }
        let ready = match begun.take() {
            Some(ready) => {
                self.ui.note(&format!("resuming at {}", size(from)));
                ready
            }
            None => self.begin(anew, headers, total)?,
        };
        self.pour(response, ready, expected, begun).await?;
        self.check_end(begun.as_ref().map_or(0, |begun| begun.length), expected)
    }

    /// Sends the request. Returns the head of the answer, or the reason why there is none.
    async fn ask(&mut self, client: &Client, asked: Option<&PartRequest>) -> Result<Response, Trouble> {
        let mut request = client.get(self.address.url()).header(ACCEPT_ENCODING, "identity");
        if let Some(PartRequest { from, validator, .. }) = asked {
            request = request.header(RANGE, format!("bytes={from}-")).header(IF_RANGE, validator);
        }
        let probes = self.wanted.retry_policy != RetryPolicy::Full && !self.answered;
        let now = Instant::now();
        let deadline =
            if probes { self.started + self.limits.paced(PROBE) } else { now + self.limits.paced(STALL) };
        let mut tick = ticks();
        let mut answer = std::pin::pin!(request.send());
        loop {
            tokio::select! {
                answer = &mut answer => {
                    let response = answer.map_err(|error| trouble(error, self.address))?;
                    self.answered = true;
                    return Ok(response);
                }
                _ = tick.tick() => {
                    self.ui.tick("waiting for the server's answer")?;
                }
                () = tokio::time::sleep_until(deadline.into()) => {
                    return Err(self.broken("no answer in time"));
                }
            }
        }
    }

    fn failed(&self, what: &str, hint: &str) -> anyhow::Error {
        Failure::host(format!("download {}: {what}", self.address), hint).into()
    }

    /// Returns the trouble for a transfer that the network broke off. Another attempt resumes it.
    fn broken(&self, what: &str) -> Trouble {
        passing(format!("download {}: {what}", self.address))
    }

    /// Creates an empty partial file and its note.
    fn begin(&mut self, again: bool, headers: &HeaderMap, total: Option<u64>) -> Result<Begun> {
        if again {
            self.ui.note("the server sends the whole file: it has changed or the server cannot resume");
        }
        self.resumed_from = 0;
        let digest = self.wanted.source.digest.clone();
        let validator = answer::validator(headers, digest.is_some());
        let note = Note { url: self.address.identity(), digest, validator, total };
        self.place.begin(note).map_err(|error| self.disk_error(error))
    }

    /// Writes the body through the sink. Afterwards, `begun` has the bytes that have arrived.
    async fn pour(
        &mut self,
        mut response: Response,
        ready: Begun,
        expected: Option<u64>,
        begun: &mut Option<Begun>,
    ) -> Result<(), Trouble> {
        let from = ready.length;
        let sink = Sink::start(ready)?;
        let ended = self.take(&mut response, &sink, from, expected).await;
        let (now, written) = sink.finish();
        *begun = Some(now);
        written.map_err(|error| self.disk_error(error.into()))?;
        ended
    }

    /// Takes the body until it ends, or until the transfer fails.
    async fn take(
        &mut self,
        response: &mut Response,
        sink: &Sink,
        from: u64,
        expected: Option<u64>,
    ) -> Result<(), Trouble> {
        let mut tick = ticks();
        let mut came = from;
        let mut last = Instant::now();
        let mut progress = TransferRate::begin(last, came);
        loop {
            tokio::select! {
                piece = response.chunk() => {
                    let Some(piece) = piece.map_err(|error| trouble(error, self.address))? else { return Ok(()) };
                    came += piece.len() as u64;
                    if expected.is_some_and(|expected| came > expected) {
                        return Err(self.wrong_size(&format!("more than {}", expected.unwrap_or_default())).into());
                    }
                    if !self.hand_over(sink, piece, &mut tick).await? {
                        // `Sink::finish` returns the sink's own error.
                        return Ok(());
                    }
                    last = Instant::now();
                }
                _ = tick.tick() => {
                    self.ui.tick(&progress.look(Instant::now(), came, expected))?;
                    if last.elapsed() >= self.limits.paced(STALL) {
                        let seconds = human_seconds(last.elapsed().as_secs_f64());
                        return Err(self.broken(&format!("received nothing for {seconds}")));
                    }
                }
            }
        }
    }

    /// Hands a piece to the sink, and waits for a disk that is slower than the network. Returns false if the sink has
    /// failed.
    async fn hand_over(&mut self, sink: &Sink, piece: Bytes, tick: &mut Interval) -> Result<bool> {
        loop {
            tokio::select! {
                place = sink.pieces.reserve() => {
                    let Ok(place) = place else { return Ok(false) };
                    place.send(piece);
                    return Ok(true);
                }
                _ = tick.tick() => {
                    self.ui.tick("waiting for the disk")?;
                }
            }
        }
    }

    /// Checks the length. A body may end early without an error: in HTTP/1.0, the file ends with the connection.
    fn check_end(&self, length: u64, expected: Option<u64>) -> Result<(), Trouble> {
        match expected {
            Some(expected) if length < expected => {
                Err(self.broken(&format!("it ended after {length} of {expected} bytes")))
            }
            Some(expected) if length > expected => Err(self.wrong_size(&length.to_string()).into()),
            _ => Ok(()),
        }
    }

    fn wrong_size(&self, found: &str) -> anyhow::Error {
        let expected = self.wanted.source.bytes.map_or_else(|| "fewer".to_owned(), |bytes| bytes.to_string());
        let what = format!("the file has {found} bytes, expected {expected}");
        self.failed(&what, "check whether its publisher has replaced the file")
    }
}

fn ticks() -> Interval {
    let mut ticks = interval(limits::POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
