//! The watchdog: the agent reports to systemd that it is alive (sd_notify(3), WATCHDOG=1) only while each of
//! its loops makes progress. If a loop hangs, systemd restarts the agent.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// Upper bound for one iteration of a loop. The slowest iterations stop a container that ignores SIGTERM and
/// start another one, or send a status over a slow line.
const MAX_LOOP_TIME: Duration = Duration::from_secs(300);

/// The time of the latest iteration of each loop.
#[derive(Debug)]
pub(crate) struct Progress {
    last: Mutex<[Instant; 2]>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Loop {
    Reconciler,
    Bus,
}

impl Default for Progress {
    fn default() -> Self {
        Self { last: Mutex::new([Instant::now(); 2]) }
    }
}

impl Progress {
    pub(crate) fn tick(&self, which: Loop) {
        self.lock()[which as usize] = Instant::now();
    }

    /// Returns a loop whose last iteration began more than [`MAX_LOOP_TIME`] ago.
    pub(crate) fn stuck(&self) -> Option<Loop> {
        let last = *self.lock();
        [Loop::Reconciler, Loop::Bus]
            .into_iter()
            .find(|which| last[*which as usize].elapsed() > MAX_LOOP_TIME)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, [Instant; 2]> {
        self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Notifies systemd three times per watchdog interval while no loop hangs. Never returns.
pub(crate) async fn watchdog(progress: &Progress) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let mut warned = false;
    loop {
        match progress.stuck() {
            None => {
                if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]) {
                    tracing::warn!("cannot notify systemd's watchdog: {error}");
                }
            }
            Some(which) if !warned => {
                warned = true;
                tracing::error!("the agent's {which:?} loop hangs; systemd will restart the agent");
            }
            Some(_) => {}
        }
        tokio::time::sleep(limit / 3).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_hangs_is_found() {
        let progress = Progress::default();
        assert!(progress.stuck().is_none());
        tokio::time::sleep(MAX_LOOP_TIME + Duration::from_secs(1)).await;
        progress.tick(Loop::Bus);
        assert!(matches!(progress.stuck(), Some(Loop::Reconciler)));
        progress.tick(Loop::Reconciler);
        assert!(progress.stuck().is_none());
        tokio::time::sleep(MAX_LOOP_TIME + Duration::from_secs(1)).await;
        progress.tick(Loop::Reconciler);
        assert!(matches!(progress.stuck(), Some(Loop::Bus)));
    }
}
