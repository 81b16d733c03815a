//! The history of a device's statuses. The broker itself keeps only the last one.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent_protocol::DeviceStatus;
use anyhow::{Context as _, Result};
use async_nats::jetstream::kv;
use futures_util::StreamExt as _;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::ReceivedStatus;

/// A status with the time of its arrival.
#[derive(Debug, Clone)]
pub struct Arrival {
    pub at: Instant,
    pub received: ReceivedStatus,
}

/// Records the statuses of a device as they arrive.
#[derive(Debug, Default)]
pub(crate) struct Arrivals {
    list: Arc<Mutex<Vec<Arrival>>>,
    task: Option<JoinHandle<()>>,
}

impl Arrivals {
    /// Follows the statuses in a bucket. A status that was recorded before is not recorded again. After the broker was
    /// started again, this function must be called again.
    ///
    /// # Errors
    /// Returns an error if the broker does not answer within `limit` or refuses.
    pub(crate) async fn follow(
        &mut self,
        bucket: &kv::Store,
        device_id: &str,
        limit: Duration,
    ) -> Result<()> {
        let what = || format!("follow the statuses of {device_id}");
        let watch = timeout(limit, bucket.watch_with_history(device_id)).await;
        let mut watch = watch.with_context(what)?.with_context(what)?;
        let list = Arc::clone(&self.list);
        let task = tokio::spawn(async move {
            while let Some(Ok(entry)) = watch.next().await {
                // The smoke reads the latest status itself, and reports one that cannot be parsed.
                let Ok(status) = serde_json::from_slice::<DeviceStatus>(&entry.value) else { continue };
                record(&list, ReceivedStatus { revision: entry.revision, status });
            }
        });
        if let Some(earlier) = self.task.replace(task) {
            earlier.abort();
        }
        Ok(())
    }

    pub(crate) fn list(&self) -> Vec<Arrival> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn record(list: &Mutex<Vec<Arrival>>, received: ReceivedStatus) {
    let mut list = list.lock().unwrap_or_else(PoisonError::into_inner);
    if list.last().is_none_or(|last| last.received.revision < received.revision) {
        list.push(Arrival { at: Instant::now(), received });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_that_is_delivered_again_is_recorded_once() {
        let list = Mutex::default();
        for revision in [1, 2, 2, 1, 3] {
            record(&list, ReceivedStatus { revision, status: DeviceStatus::default() });
        }
        let revisions: Vec<_> =
            list.into_inner().unwrap().iter().map(|arrival| arrival.received.revision).collect();
        assert_eq!(revisions, [1, 2, 3]);
    }
}
