//! The cause of a failure that a status cannot name. A guest whose file system has become read-only, or whose kernel has
//! logged a fault, fails in many ways, and the agent reports only one of them.

use anyhow::{Error, Result};
use xtask_core::error::{self, Kind};
use xtask_core::limits;

use super::observed::check_system;
use super::running::RunningVm;
use crate::guest::watch::Deadline;

/// Adds the fault of the guest's system as the cause of a failure of the guest. A failure in a guest that is sound or
/// does not answer stays as it is. If the connection to a libvirt daemon has ended, every error is the host's.
pub(super) fn explained<T>(vm: &mut RunningVm, outcome: Result<T>) -> Result<T> {
    let error = match outcome {
        Err(error) => error,
        Ok(value) => return Ok(value),
    };
    if Kind::Interrupted.is(&error) {
        return Err(error);
    }
    if let Some(broken) = vm.target.broken_connection("the phase to end") {
        return Err(error.context(broken));
    }
    if Kind::Guest != error::kind(&error) {
        return Err(error);
    }
    match system_fault(vm) {
        Some(fault) if !format!("{error:#}").contains(&fault) => Err(because(error, fault)),
        _ => Err(error),
    }
}

/// Returns the fault of the guest's system; `None` if there is none, or if the guest does not answer in time.
fn system_fault(vm: &mut RunningVm) -> Option<String> {
    if !vm.answers_root() {
        return None;
    }
    // An answer that is still expected may describe the guest before the fault.
    vm.root.forget();
    let deadline = Deadline::after(vm.plan.limits.guest_command());
    while !deadline.is_over() {
        if let Some(view) = vm.look().ok()? {
            return check_system(&view).err().map(|fault| fault.to_string());
        }
        std::thread::sleep(limits::POLL);
    }
    None
}

/// Adds the innermost cause to an error. The error's own failure stays the outermost one.
pub(super) fn because(error: Error, cause: String) -> Error {
    let Some(failure) = error::failure(&error).cloned() else { return error.context(cause) };
    let causes: Vec<_> = error.chain().skip(1).map(ToString::to_string).collect();
    causes.into_iter().rev().fold(Error::msg(cause), Error::context).context(failure)
}

#[cfg(test)]
mod tests {
    use xtask_core::error::Failure;

    use super::*;

    #[test]
    fn a_cause_is_the_innermost_one() {
        let failed = Failure::guest("it is backing-off", "read the journals");
        for (causes, expected) in [
            (None, vec!["it is backing-off", "too old"]),
            (Some("timed out"), vec!["it is backing-off", "timed out", "too old"]),
        ] {
            let error = causes
                .map_or_else(|| failed.clone().into(), |cause| Error::msg(cause).context(failed.clone()));
            let error = because(error, "too old".to_owned());
            assert_eq!(error.chain().map(ToString::to_string).collect::<Vec<_>>(), expected);
            assert_eq!((error::code(&error), error::hint(&error)), (1, Some("read the journals")));
        }
    }
}
