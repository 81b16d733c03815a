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
    /// Listens for the signals from now on. A signal that this process was started to ignore stays ignored: nohup(1)
    /// ignores SIGHUP, and a shell without job control ignores SIGINT for a command that ends with `&`.
    pub(crate) fn install() -> Result<Self> {
        let interrupt = Self::default();
        let asked = Arc::clone(&interrupt.asked);
        let mut signals = Signals::new(heeded()?).context("listen for Ctrl-C")?;
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

/// Returns the signals that request a stop, without those that this process ignores.
fn heeded() -> Result<impl Iterator<Item = i32>> {
    let ignored = ignored().context("find the ignored signals in /proc/self/status")?;
    Ok([SIGINT, SIGTERM, SIGHUP].into_iter().filter(move |signal| ignored & (1 << (signal - 1)) == 0))
}

/// Returns the set of ignored signals, in which signal number N is bit N - 1 (proc_pid_status(5)).
fn ignored() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).context("no line SigIgn")?;
    Ok(u64::from_str_radix(mask.trim(), 16)?)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// The test runs itself in a process that ignores SIGHUP, because the disposition of a signal holds for all
    /// threads.
    #[test]
    fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
        const INNER: &str = "IOT_XTASK_TEST_IGNORES_SIGHUP";
        if std::env::var_os(INNER).is_some() {
            let interrupt = Interrupt::install().unwrap();
            let hangup = 1 << (SIGHUP - 1);
            assert_eq!(ignored().unwrap() & hangup, hangup);
            assert_eq!(heeded().unwrap().collect::<Vec<_>>(), [SIGINT, SIGTERM]);
            signal_hook::low_level::raise(SIGHUP).unwrap();
            interrupt.check().unwrap();
            return;
        }
        // SIGINT may be ignored in this process, too.
        let mut inner = Command::new("env");
        inner
            .args(["--ignore-signal=HUP", "--default-signal=INT,TERM"])
            .arg(std::env::current_exe().unwrap());
        inner.args(["--exact", "interrupt::tests::a_signal_that_was_ignored_at_the_start_stays_ignored"]);
        inner.env(INNER, "");
        let output = inner.output().unwrap();
        let shown = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && shown.contains("1 passed"), "{shown}");
    }
}
