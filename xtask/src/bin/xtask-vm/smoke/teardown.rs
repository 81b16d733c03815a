//! The end of a smoke's machine, in order: the journal while the guest lives, the machine, the broker, the files. Every
//! step is made, whatever became of the one before.

use std::path::Path;

use anyhow::Result;
use xtask_core::error::Verdict;
use xtask_core::fs::make_private_dir;
use xtask_core::runs::instance::InstanceRecord;

use super::run::Run;
use super::running::RunningVm;

/// Runs all steps; returns the phase's detail.
pub(super) fn all(
    run: &Run<'_>,
    directory: &Path,
    verdict: Verdict,
    mut vm: Option<RunningVm>,
) -> Result<((), String)> {
    let evidence = collect_evidence(run, directory, verdict, vm.as_mut());
    let detail = release_or_stop(run, verdict, vm)?;
    evidence.map(|()| ((), detail))
}

/// Into the report's directory: the console always, the rest where something failed.
fn collect_evidence(
    run: &Run<'_>,
    directory: &Path,
    verdict: Verdict,
    vm: Option<&mut RunningVm>,
) -> Result<()> {
    make_private_dir(directory)?;
    let own = run.dir.path().join("console.log");
    if own.exists() && directory != run.dir.path() {
        fs_err::copy(&own, directory.join("console.log"))?;
    }
    if verdict == Verdict::Failed {
        run.copy_evidence(directory)?;
        if let Some(vm) = vm {
            vm.fetch_journal(&directory.join("journal.log"));
        }
    }
    Ok(())
}

/// Keeps the machine if `--keep` is given and it is usable; otherwise stops everything.
fn release_or_stop(run: &Run<'_>, verdict: Verdict, vm: Option<RunningVm>) -> Result<String> {
    let is_unchanged = |vm: &RunningVm| vm.snapshot.as_ref().is_none_or(|used| used.unchanged);
    let stopped = match vm {
        Some(vm) if run.options.keep && verdict != Verdict::Interrupted && is_unchanged(&vm) => {
            match vm.release(run, None) {
                Ok(InstanceRecord { name, .. }) => {
                    run.ui.line(&format!(
                        "kept: {name}\n  enter:   cargo xtask vm ssh {name}\n  console: cargo xtask vm console {name}\n  \
                         remove:  cargo xtask vm rm {name}\n  the broker has ended: the agent in the machine is offline"
                    ));
                    return Ok("the machine is kept".to_owned());
                }
                Err(error) => Err(error),
            }
        }
        Some(vm) => {
            let disk = vm.files.overlay.clone();
            let interrupted = verdict == Verdict::Interrupted;
            let stopped = vm.stop();
            stopped.and_then(|()| if interrupted { Ok(String::new()) } else { run.check_disk(&disk) })
        }
        None => Ok(String::new()),
    };
    // Also where stopping failed: this ends what the run's directory owns.
    run.dir.clean()?;
    stopped.map(|checked| format!("nothing is left running{checked}"))
}
