//! Kills a smoke or its QEMU by SIGKILL at random moments. The next smoke must reach the phase `join`.

use std::fmt;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use xtask_core::cache::Cache;
use xtask_core::cli::SoakArgs;
use xtask_core::fs::{directories, is_own, remove_tree};
use xtask_core::limits;
use xtask_core::message;
use xtask_core::processes::{Process, owned};
use xtask_core::snapshot::RAM;

use super::{alone, end, start};

/// The target of a kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    /// The whole process group of the smoke, so that no process is left to clean up.
    Workflow,
    /// QEMU alone: the smoke must notice the kill and end by itself.
    Qemu,
}

impl Victim {
    /// Returns whether a smoke may end with this exit code (`None`: by a signal) when the time `later` has passed
    /// since the kill.
    fn may_end(self, code: Option<i32>, later: Duration) -> bool {
        match (self, code) {
            // The verdict was already reached, or the smoke was about to cut the machine's power anyway.
            (_, Some(0)) => true,
            (Self::Workflow, code) => code.is_none(),
            (Self::Qemu, code) => matches!(code, Some(1 | 69)) && later < limits::AFTER_KILL,
        }
    }
}

/// How many moments a round tries if there is no process to kill.
const DRAWS: u32 = 10;

/// Kills the smoke or QEMU at a random moment. Then a smoke in the same cache must reach the phase `join`. Every
/// fourth round begins without a snapshot, so that the making of snapshots is hit too.
pub(super) fn kill_and_go_on(args: &SoakArgs, round: u32) -> Result<String> {
    for _ in 0..DRAWS {
        if let Some(message) = kill_once(args, round)? {
            return Ok(message);
        }
        message!("soak kill {round}: no process to kill yet; trying another moment");
    }
    bail!("no process to kill at {DRAWS} moments: smokes are shorter here than the kill window")
}

/// The moment of a kill.
#[derive(Debug, Clone, Copy)]
struct Moment {
    after: Duration,
    /// True if `after` counts from the moment when QEMU begins to write the snapshot's memory; false if it counts from
    /// the smoke's start.
    of_save: bool,
}

impl Moment {
    /// Draws a moment. Half of the rounds that make a snapshot are killed while the snapshot is saved. Saving takes
    /// only a few seconds, so a moment that is drawn from the whole smoke would rarely fall into this time.
    fn draw(round: u32, boots: bool, makes_a_snapshot: bool) -> Result<Self> {
        let of_save = makes_a_snapshot && round % 8 == 1;
        let window = match (of_save, boots) {
            (true, _) => limits::SAVE_WINDOW,
            (false, true) => limits::KILL_WINDOW,
            (false, false) => limits::WARM_KILL_WINDOW,
        };
        Ok(Self { after: window.mul_f64(random()?), of_save })
    }

    /// Waits for the moment. If the moment counts from the saving of a snapshot, the wait also ends when the smoke
    /// ends.
    fn awaited(self, child: &mut Child, cache: &Cache, before: &[PathBuf]) -> Result<()> {
        let saves = |run: &PathBuf| run.join("w/snapshot").join(RAM).exists();
        while self.of_save && !new_runs(cache, before).iter().any(saves) {
            if ended(child)?.is_some() {
                return Ok(());
            }
            std::thread::sleep(limits::CHILD_POLL);
        }
        std::thread::sleep(self.after);
        Ok(())
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let after = self.after.as_secs_f64();
        if self.of_save {
            write!(f, "{after:.1} s after it began to save")
        } else {
            write!(f, "at {after:.1} s")
        }
    }
}

fn ended(child: &mut Child) -> Result<Option<ExitStatus>> {
    child.try_wait().context("check the state of the smoke")
}

/// Runs one round and returns a line about it, or `None` if no process could be killed.
fn kill_once(args: &SoakArgs, round: u32) -> Result<Option<String>> {
    let cache = Cache::open()?;
    let makes_a_snapshot = !args.cold && round % 4 == 1;
    if makes_a_snapshot {
        // The soak may have begun hours ago. Since then, a user may have made an instance on a snapshot.
        alone()?;
        for snapshot in directories(&cache.snapshots()).iter().filter(|snapshot| is_own(snapshot)) {
            remove_tree(snapshot)?;
        }
    }
    let moment = Moment::draw(round, makes_a_snapshot || args.cold, makes_a_snapshot)?;
    let victim = if random()? < 0.5 { Victim::Workflow } else { Victim::Qemu };
    let before = directories(&cache.runs());
    let mut child = start(args, &[])?;
    let killed = moment
        .awaited(&mut child, &cache, &before)
        .and_then(|()| kill(&mut child, victim, &cache, &before))
        .and_then(|hit| {
            let at = Instant::now();
            Ok((hit, awaited(&mut child, hit)?, at.elapsed()))
        });
    if killed.is_err() {
        // End the smoke, so that the next round has the cache to itself.
        end_group(&child)?;
        child.wait().context("wait for the smoke")?;
    }
    let (hit, status, later) = killed?;
    let seconds = later.as_secs_f64();
    ensure!(
        if hit { victim.may_end(status.code(), later) } else { status.success() },
        "kill {victim:?} {moment} (killed a process: {hit}): the smoke ended {seconds:.1} s later with \
         {status}; if it is not verified, it must end within {} s",
        limits::AFTER_KILL.as_secs()
    );
    if !hit {
        return Ok(None);
    }
    let started = Instant::now();
    end(start(args, &["--until", "join"])?, started).context("run the smoke after the kill")?;
    let what = match victim {
        Victim::Workflow => "the workflow killed",
        Victim::Qemu => "QEMU killed",
    };
    let snapshot = if makes_a_snapshot { ", without a snapshot" } else { "" };
    let message =
        format!("{what} {moment}{snapshot}, ended {seconds:.1} s later, {status}; the next smoke joined");
    Ok(Some(message))
}

/// Returns the directories of the runs that are not in `before`.
fn new_runs(cache: &Cache, before: &[PathBuf]) -> Vec<PathBuf> {
    directories(&cache.runs()).into_iter().filter(|run| !before.contains(run)).collect()
}

/// Kills the victim. Returns `false` if there is no process to kill.
fn kill(child: &mut Child, victim: Victim, cache: &Cache, before: &[PathBuf]) -> Result<bool> {
    if ended(child)?.is_some() {
        return Ok(false);
    }
    if victim == Victim::Workflow {
        return end_group(child);
    }
    let is_qemu = |process: &Process| {
        let name = std::fs::read_to_string(format!("/proc/{}/comm", process.pid.as_raw_nonzero()));
        name.is_ok_and(|name| name.starts_with("qemu-system"))
    };
    let runs = new_runs(cache, before);
    let qemu = runs.iter().flat_map(|run| owned(&run.join("w"))).find(is_qemu);
    qemu.map_or(Ok(false), |process| process.kill().context("kill QEMU"))
}

/// Sends SIGKILL to the process group of a smoke. Returns `false` if the group has already ended.
fn end_group(child: &Child) -> Result<bool> {
    match kill_process_group(Pid::from_child(child), Signal::KILL) {
        Err(rustix::io::Errno::SRCH) => Ok(false),
        killed => killed.map(|()| true).context("kill the smoke"),
    }
}

/// Waits until the smoke has ended, and returns its exit status. After a kill (`hit`), the wait has a limit.
fn awaited(child: &mut Child, hit: bool) -> Result<ExitStatus> {
    let (limit, killed) = (limits::AFTER_KILL_TO_VERDICT, Instant::now());
    loop {
        if let Some(status) = ended(child)? {
            return Ok(status);
        }
        let late = hit && killed.elapsed() > limit;
        ensure!(!late, "the smoke has not ended {} s after the kill", limit.as_secs());
        std::thread::sleep(limits::POLL);
    }
}

/// Returns a random number from 0 to 1.
fn random() -> Result<f64> {
    let mut bytes = [0; 2];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("ask the kernel for a random number")?;
    Ok(f64::from(u16::from_le_bytes(bytes)) / 65_536.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_smoke_that_ends_wrongly_after_a_kill_fails_its_round() {
        let (soon, late) = (Duration::from_secs(1), limits::AFTER_KILL + Duration::from_secs(1));
        for (victim, code, later, right) in [
            (Victim::Workflow, None, soon, true),
            (Victim::Workflow, Some(1), soon, false),
            (Victim::Workflow, Some(0), late, true),
            (Victim::Qemu, Some(1), soon, true),
            (Victim::Qemu, Some(69), soon, true),
            (Victim::Qemu, Some(1), late, false),
            (Victim::Qemu, Some(101), soon, false),
            (Victim::Qemu, None, soon, false),
            (Victim::Qemu, Some(0), late, true),
        ] {
            assert_eq!(victim.may_end(code, later), right, "{victim:?} {code:?} {later:?}");
        }
    }
}
