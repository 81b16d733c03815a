//! Reports the device's state in the status bucket: statuses, and heartbeats between them.

use std::time::Duration;

use agent_protocol::{STATUS_BUCKET, heartbeat_key};
use anyhow::{Context, Result};
use async_nats::Client;
use async_nats::jetstream::kv;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use crate::bus::Bus;
use crate::config::AgentConfig;
use crate::device_state::DeviceState;
use crate::progress::Loop;
use crate::rate_limiter::RateLimiter;
use crate::reconnect::jitter;

/// If this many statuses in a row could not be stored in time, the client gives the connection up.
const MAX_LOST: u32 = 3;
/// The pause before a status that could not be stored in time is sent again.
const RETRY_PAUSE: Duration = Duration::from_secs(5);
/// Upper bound for one iteration of the loop, regardless of the heartbeat.
const LOOP_INTERVAL: Duration = Duration::from_secs(30);
/// Time for storing one document; the bus may be behind a slow mobile link.
const PUT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a message that are left for its headers and subject.
const MESSAGE_OVERHEAD: usize = 4096;

/// The kinds of documents that a device stores in the status bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Report {
    Status,
    Heartbeat,
}

/// The times at which the next documents are due.
#[derive(Debug)]
struct Schedule {
    heartbeat_interval: Duration,
    status_interval: Duration,
    status_due: Instant,
    heartbeat_due: Instant,
    /// The numbers of consecutive documents that the broker has not stored in time.
    lost_statuses: u32,
    lost_heartbeats: u32,
}

impl Schedule {
    /// A connection begins with a status, so the first heartbeat is due later.
    fn new(config: &AgentConfig, now: Instant) -> Self {
        let heartbeat_interval = Duration::from_secs(config.heartbeat_seconds);
        Self {
            heartbeat_interval,
            status_interval: Duration::from_secs(config.status_seconds),
            status_due: now,
            heartbeat_due: now + heartbeat_interval,
            lost_statuses: 0,
            lost_heartbeats: 0,
        }
    }

    /// Returns the next document and its time.
    fn next(&self, limiter: &RateLimiter) -> (Report, Instant) {
        let status = limiter.next().map_or(self.status_due, |next| next.max(self.status_due));
        match status <= self.heartbeat_due {
            true => (Report::Status, status),
            false => (Report::Heartbeat, self.heartbeat_due),
        }
    }

    /// Records that a document is sent. If it is not stored, it is due again at the next heartbeat.
    fn sent(&mut self, report: Report, now: Instant) {
        match report {
            Report::Status => self.status_due = now + self.heartbeat_interval,
            Report::Heartbeat => self.heartbeat_due = now + self.heartbeat_interval,
        }
    }

    fn stored(&mut self, report: Report, now: Instant) {
        match report {
            Report::Status => {
                self.lost_statuses = 0;
                // Without the random part, a fleet would report at the same time after each restart of the broker.
                self.status_due = now + self.status_interval - jitter(self.status_interval / 10);
            }
            Report::Heartbeat => self.lost_heartbeats = 0,
        }
    }

    /// Records that the broker has not stored a document in time. Returns whether the connection must be given up.
    ///
    /// A broker may allow the device statuses but no heartbeats, as brokers of earlier agents do. The next status
    /// therefore shows whether the connection is usable. If it is, heartbeats become as rare as statuses.
    fn lost(&mut self, report: Report, now: Instant) -> bool {
        match report {
            Report::Status => {
                self.lost_statuses += 1;
                self.status_due = now + RETRY_PAUSE;
            }
            Report::Heartbeat => {
                self.lost_heartbeats += 1;
                if self.lost_heartbeats == 1 {
                    self.status_due = now;
                } else if self.lost_heartbeats >= MAX_LOST {
                    self.heartbeat_due = now + self.status_interval;
                }
            }
        }
        self.lost_statuses == MAX_LOST
    }
}

impl Bus {
    /// Reports a status at once, on every change and at a long interval, and heartbeats in between. Returns only if it
    /// cannot go on, with the reason.
    pub(crate) async fn report(&self, client: &Client, limiter: &mut RateLimiter) -> String {
        let mut device_state = self.device_state.clone();
        device_state.mark_unchanged();
        let mut connection = self.connection.subscribe();
        let mut schedule = Schedule::new(&self.config.agent, Instant::now());
        let mut bucket = None;
        loop {
            self.progress.tick(Loop::Bus);
            let (report, at) = schedule.next(limiter);
            tokio::select! {
                biased;
                () = sleep_until(at) => {}
                changed = device_state.changed() => {
                    if changed.is_err() {
                        return "the reconciler ended".to_owned();
                    }
                    schedule.status_due = Instant::now();
                    continue;
                }
                // An error in following the desired state is reported at once.
                _ = connection.changed() => {
                    schedule.status_due = Instant::now();
                    continue;
                }
                () = sleep(LOOP_INTERVAL) => continue,
            }
            if report == Report::Status {
                limiter.sent(Instant::now());
                device_state.mark_unchanged();
            }
            let current = device_state.borrow().clone();
            schedule.sent(report, Instant::now());
            match timeout(PUT_TIMEOUT, self.put(client, &mut bucket, report, &current)).await {
                Ok(Ok(revision)) => {
                    schedule.stored(report, Instant::now());
                    debug!(revision, "stored a {report:?}");
                }
                Ok(Err(error)) => {
                    bucket = None;
                    warn!("{error:#}");
                }
                Err(_elapsed) => {
                    warn!("the broker has not stored a {report:?} within {PUT_TIMEOUT:?}");
                    if schedule.lost(report, Instant::now()) {
                        return format!("storing {MAX_LOST} consecutive statuses timed out");
                    }
                }
            }
        }
    }

    async fn put(
        &self,
        client: &Client,
        bucket: &mut Option<kv::Store>,
        report: Report,
        device_state: &DeviceState,
    ) -> Result<u64> {
        let device_id = &self.config.agent.device_id;
        let (key, document) = match report {
            Report::Status => {
                let max_bytes = client.server_info().max_payload.saturating_sub(MESSAGE_OVERHEAD);
                (device_id.clone(), self.reporter.write(device_state, max_bytes)?)
            }
            Report::Heartbeat => (heartbeat_key(device_id), self.reporter.heartbeat(device_state)?),
        };
        let store = match bucket.take() {
            Some(store) => store,
            // The fleet creates the bucket; a device has no permission to do so.
            None => {
                let mut jetstream = self.jetstream(client);
                // After its own limit of 5 s, async-nats would return an error like any other.
                jetstream.set_timeout(2 * PUT_TIMEOUT);
                jetstream
                    .get_key_value(STATUS_BUCKET)
                    .await
                    .with_context(|| format!("open the bucket {STATUS_BUCKET}"))?
            }
        };
        let stored = store.put(&key, document.into()).await;
        let revision = stored.with_context(|| format!("put {key} into {STATUS_BUCKET}"))?;
        *bucket = Some(store);
        Ok(revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn schedule(now: Instant) -> Schedule {
        let text = "[agent]\ndevice_id = \"a\"\n[credentials]\ntype = \"toml-shared\"\nusername = \"a\"\n\
                    password = \"b\"\n[nats]\nurls = [\"nats://a:1\"]";
        Schedule::new(&Config::parse(text).unwrap().agent, now)
    }

    /// Returns the numbers of statuses and heartbeats in an hour. `lost` says which are not stored in time. Returns the
    /// time as an error if the connection is given up before.
    fn hour(lost: impl Fn(Report) -> bool) -> Result<[usize; 2], Duration> {
        let begun = Instant::now();
        let (mut schedule, mut limiter, mut counts) = (schedule(begun), RateLimiter::default(), [0; 2]);
        loop {
            let (report, now) = schedule.next(&limiter);
            if now >= begun + Duration::from_secs(3600) {
                return Ok(counts);
            }
            if report == Report::Status {
                limiter.sent(now);
            }
            counts[report as usize] += 1;
            schedule.sent(report, now);
            if !lost(report) {
                schedule.stored(report, now);
            } else if schedule.lost(report, now + PUT_TIMEOUT) {
                return Err(now - begun);
            }
        }
    }

    #[test]
    fn an_idle_device_sends_many_heartbeats_and_few_statuses() {
        let [statuses, heartbeats] = hour(|_| false).unwrap();
        assert!((6..=7).contains(&statuses) && heartbeats == 119, "{statuses} {heartbeats}");
    }

    #[test]
    fn refused_heartbeats_become_rare_and_keep_the_connection() {
        let [statuses, heartbeats] = hour(|report| report == Report::Heartbeat).unwrap();
        assert!((7..=8).contains(&statuses) && (6..=9).contains(&heartbeats), "{statuses} {heartbeats}");
        let end = hour(|report| report == Report::Status).unwrap_err();
        assert!(end < Duration::from_secs(60), "{end:?}");
        assert!(hour(|_| true).is_err());
    }
}
