//! The explanation of crash states that lose something: the smallest state that still fails, and the missing writes.

use std::collections::BTreeSet;

use anyhow::Result;
use xtask_core::report::CrashStateReport;
use xtask_crash::{CrashState, MissingWrite, NO_FILE, SECTOR, StateDisk, describe, shrink};
use xtask_judge::{Judge, Loss, Rule};

use super::super::run::Run;
use super::boots::write_disk;
use super::bundle;
use super::recorded::Recorded;
use super::states::{self, Judged, Tally};

/// The number of entries after a state among which a write is looked for that came too late.
const LATE: usize = 800;
/// The numbers of entries after such a write at which the owners of its blocks are looked for.
const NAMED: [usize; 4] = [0, 4, 20, 100];
/// The maximum number of states that are explained.
const EXPLAINED: usize = 10;

/// A state that loses something, with its explanation.
pub(super) struct Failing {
    pub(super) number: u64,
    /// The smallest state in which the first loss still occurs.
    pub(super) state: CrashState,
    pub(super) losses: Vec<String>,
    pub(super) missing: Vec<String>,
    pub(super) command: String,
}

impl Failing {
    pub(super) fn report(&self) -> CrashStateReport {
        CrashStateReport {
            number: self.number,
            point: self.state.point as u64,
            losses: self.losses.clone(),
            missing: self.missing.clone(),
            command: self.command.clone(),
        }
    }
}

/// Explains the first state of each kind of loss.
pub(super) fn explain(
    run: &Run<'_>,
    recorded: &Recorded,
    judge: &Judge,
    tally: &Tally,
) -> Result<Vec<Failing>> {
    let mut seen = BTreeSet::new();
    let mut explained = Vec::new();
    for judged in &tally.failed {
        let Some(loss) = judged.judgement.losses.first() else { continue };
        if explained.len() < EXPLAINED && seen.insert((loss.rule, loss.path.clone())) {
            run.ui.tick(&format!("looking for the missing writes of the crash state {}", judged.number))?;
            explained.push(explained_state(run, recorded, judge, judged, (loss.rule, &loss.path))?);
        }
    }
    Ok(explained)
}

fn explained_state(
    run: &Run<'_>,
    recorded: &Recorded,
    judge: &Judge,
    judged: &Judged,
    (rule, path): (Rule, &str),
) -> Result<Failing> {
    let is_same = |loss: &Loss| loss.rule == rule && loss.path == path;
    // e2fsck is not asked again for each smaller state.
    let smallest = if rule == Rule::FileSystem {
        judged.state.clone()
    } else {
        shrink(&recorded.log, &judged.state, |state| {
            run.ui.check()?;
            let losses = states::judge(recorded, judge, state)?.losses;
            Ok(losses.iter().any(is_same))
        })?
    };
    let late = match smallest.missing.is_empty() {
        true => late_write(run, recorded, judge, &smallest, is_same)?,
        false => None,
    };
    let missing = match late {
        Some(entry) => late_sentences(run, recorded, entry)?,
        None => sentences(run, recorded, &smallest)?,
    };
    Ok(Failing {
        number: judged.number,
        state: smallest,
        losses: judged.judgement.losses.iter().map(|loss| loss.text.clone()).collect(),
        missing,
        command: bundle::command(run, &bundle::file(run, judged.number)),
    })
}

/// Returns a sentence for each missing write of a state.
fn sentences(run: &Run<'_>, recorded: &Recorded, state: &CrashState) -> Result<Vec<String>> {
    let base = CrashState { point: 0, missing: Vec::new() };
    describe(&recorded.base, &recorded.log, state, &write_disk(run, recorded, &base)?)
}

/// Returns the sentences for a write that came too late. A file owns its new blocks only once a later entry has committed
/// them, and it may give them up soon after that.
fn late_sentences(run: &Run<'_>, recorded: &Recorded, entry: usize) -> Result<Vec<String>> {
    let entries = recorded.log.entries();
    let whole = MissingWrite::run(entry, 0..entries[entry].length.div_ceil(SECTOR));
    let mut found = Vec::new();
    for later in NAMED {
        let point = entries.len().min(entry + 1 + later);
        found = sentences(run, recorded, &CrashState { point, missing: vec![whole.clone()] })?;
        if !found.iter().any(|text| text.ends_with(NO_FILE)) {
            break;
        }
    }
    Ok(found.iter().map(|text| format!("not written before the power cut: {text}")).collect())
}

/// If a state lacks no write of the log, the guest had not yet written what is lost. Returns the entry that ends the loss;
/// `None` if no entry soon after the state does.
fn late_write(
    run: &Run<'_>,
    recorded: &Recorded,
    judge: &Judge,
    state: &CrashState,
    is_same: impl Fn(&Loss) -> bool,
) -> Result<Option<usize>> {
    let last = recorded.log.entries().len().min(state.point + LATE);
    for point in state.point + 1..=last {
        run.ui.check()?;
        let later = CrashState { point, missing: Vec::new() };
        let disk = StateDisk::new(&recorded.base, &recorded.log, &later).load()?;
        // The later disk is judged by what had been acknowledged before the power cut.
        if !judge.judge(state.point, &disk)?.losses.iter().any(&is_same) {
            return Ok(Some(point - 1));
        }
    }
    Ok(None)
}
