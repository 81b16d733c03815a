//! The watchdog's evidence: systemd is warned that the agent is alive only as long as each of its loops has come round of late
//! (sd_notify(3), WATCHDOG=1). A loop that hangs has the agent started again.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

/// The longest that one round of a loop may take: stopping a container that does not want to, or a status on a slow line.
const MAX_LOOP_TIME: Duration = Duration::from_secs(180);

/// When each loop came round last.
#[derive(Debug)]
pub struct Progress {
    last: Mutex<[Instant; 2]>,
}

/// A loop of the agent.
#[derive(Debug, Clone, Copy)]
pub enum Loop {
    /// Observes, compares, acts.
    Reconciler,
    /// Connects, reports, answers.
    Bus,
}

impl Default for Progress {
    fn default() -> Self {
        Self { last: Mutex::new([Instant::now(); 2]) }
    }
}

impl Progress {
    /// The loop has come round.
    pub fn tick(&self, which: Loop) {
        self.lock()[which as usize] = Instant::now();
    }

    /// The loop that has not come round, if one has not.
    pub fn stuck(&self) -> Option<Loop> {
        let last = *self.lock();
        [Loop::Reconciler, Loop::Bus]
            .into_iter()
            .find(|which| last[*which as usize].elapsed() > MAX_LOOP_TIME)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, [Instant; 2]> {
        self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Tells systemd, as often as it wants, for as long as no loop hangs; never returns. Without a watchdog, waits for ever.
pub async fn watchdog(progress: &Progress) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    let mut warned = false;
    loop {
        match progress.stuck() {
            None => {
                if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]) {
                    tracing::warn!("systemd's watchdog could not be warned: {error}");
                }
            }
            Some(which) if !warned => {
                warned = true;
                tracing::error!("the agent's {which:?} loop hangs: systemd will start the agent again");
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
