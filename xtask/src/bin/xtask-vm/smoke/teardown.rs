//! The end of a smoke's machine. The steps are: fetch the journal while the guest runs, stop the machine, stop the
//! broker, delete the files. Every step is made even if an earlier one failed. A failed step is a warning and does not
//! change the verdict. The exception is the check of the file systems, because it is a check of the device.

use std::path::Path;

use anyhow::Result;
use xtask_core::error::{Verdict, host_fault};
use xtask_core::fs::make_private_dir;
use xtask_core::report::{CONSOLE, MARKERS};
use xtask_core::runs::instance::InstanceRecord;

use super::run::Run;
use super::running::RunningVm;

/// Runs all steps. Returns the detail of the phase.
///
/// # Errors
/// Returns an error if the check of the file systems fails or is not possible. All other errors are warnings of the
/// run.
pub(super) fn all(
    run: &Run<'_>,
    directory: &Path,
    verdict: Verdict,
    mut vm: Option<RunningVm>,
) -> Result<((), String)> {
    collect_evidence(run, directory, verdict, vm.as_mut());
    release_or_stop(run, verdict, vm).map(|detail| ((), detail))
}

/// Copies the console into the report's directory. After a failure, also copies the domain and the logs, and reads the
/// guest's journal and state.
fn collect_evidence(run: &Run<'_>, directory: &Path, verdict: Verdict, vm: Option<&mut RunningVm>) {
    if let Err(error) = make_private_dir(directory) {
        run.warn(&format!("the console and the logs are not copied: {error:#}"));
        return;
    }
    if directory != run.dir.path() {
        for log in [CONSOLE, MARKERS] {
            run.copy(&run.dir.path().join(log), &directory.join(log));
        }
    }
    if matches!(verdict, Verdict::Failed | Verdict::Unavailable) {
        run.copy_evidence(directory);
    }
    if let (Verdict::Failed, Some(vm)) = (verdict, vm) {
        vm.fetch_state(run, directory);
    }
}

/// Keeps the machine running if the options say so and the machine is usable. Otherwise stops it and the broker.
fn release_or_stop(run: &Run<'_>, verdict: Verdict, vm: Option<RunningVm>) -> Result<String> {
    let is_unchanged = |vm: &RunningVm| vm.snapshot.as_ref().is_none_or(|used| used.unchanged);
    let (ended, checked) = match vm {
        Some(vm) if run.options.keep.applies(verdict) && is_unchanged(&vm) => match vm.release(run, None) {
            Ok(InstanceRecord { name, .. }) => {
                run.ui.line(&format!(
                        "kept: {name}\n  enter:   cargo xtask vm ssh {name}\n  console: cargo xtask vm console {name}\n  \
                         remove:  cargo xtask vm rm {name}\n  the broker has ended: the agent in the machine is offline"
                    ));
                return Ok("the machine is kept".to_owned());
            }
            Err(error) => {
                run.warn(&format!("the machine is not kept: {error:#}"));
                (true, Ok(String::new()))
            }
        },
        Some(vm) => stop(run, verdict, vm),
        None => (true, Ok(String::new())),
    };
    // This also runs if the stop failed, because it ends all processes of the run's directory.
    let cleaned = run.dir.clean();
    if let Err(error) = &cleaned {
        run.warn(&format!("a process or a file of the run is left: {error:#}"));
    }
    let left = if ended && cleaned.is_ok() { "nothing is left running" } else { "see the warnings" };
    checked.map(|checked| format!("{left}{checked}"))
}

/// Stops the machine. Returns whether it ended without an error, and the result of the check of its file systems.
fn stop(run: &Run<'_>, verdict: Verdict, vm: RunningVm) -> (bool, Result<String>) {
    let disk = vm.files.overlay.clone();
    let is_checked = run.options.fsck && verdict != Verdict::Interrupted;
    match vm.stop() {
        Ok(()) if is_checked => (true, run.check_disk(&disk)),
        Ok(()) => (true, Ok(String::new())),
        Err(error) if is_checked => {
            let hint = "the file systems are not checked while QEMU may use them; run again";
            (false, Err(host_fault(error, "stop the machine", hint)))
        }
        Err(error) => {
            run.warn(&format!("the machine or the broker did not end: {error:#}"));
            (false, Ok(String::new()))
        }
    }
}
