//! The waits for a deployment that starts. If its container fails, the error has the container's last lines, because the
//! agent reports only the exit code.

use std::time::Instant;

use anyhow::Result;
use xtask_core::bail_guest;
use xtask_core::error::Kind;
use xtask_core::report::WorkloadEvidence;

use super::cause::because;
use super::deployed::{ExpectedAnswer, ExpectedDeployment};
use super::observed::container_of;
use super::proof::{Deployed, Proof};
use super::running::RunningVm;

/// The number of the last lines that are read. After several starts, podman has the lines of all of them.
const LINES: usize = 5;

impl Proof<'_> {
    /// Waits until the agent reports that a deployment runs with the desired state of `revision`.
    pub(super) fn runs(&self, vm: &mut RunningVm, deployed: Deployed, revision: u64) -> Result<()> {
        let name = deployed.name;
        let mut wanted = ExpectedDeployment::running(name, revision);
        let deadline = vm.deadline.within(vm.plan.limits.convergence());
        let begun = Instant::now();
        let waited = vm.wait_for_status(&format!("a status with the deployment {name} running"), |seen| {
            if wanted.check(seen)? {
                return Ok(true);
            }
            if !deadline.is_over() {
                return Ok(false);
            }
            let status = wanted.describe(Some(seen));
            bail_guest!(
                "the deployment {name} is desired at revision {revision}; {} s later the status {status}", begun.elapsed().as_secs();
                "the agent must run each deployment that is desired, also one that was changed while the device was off"
            )
        });
        self.explained(vm, deployed, &wanted, waited).map(drop)
    }

    /// Waits for the expected answer of a deployment that the agent has reported as running. If its container has ended
    /// in the meantime, the agent's statuses end the wait.
    pub(super) fn answers(
        &self,
        vm: &mut RunningVm,
        deployed: Deployed,
        wanted: &ExpectedAnswer<'_>,
    ) -> Result<WorkloadEvidence> {
        let Deployed { name, port } = deployed;
        let mut running = ExpectedDeployment::running(name, 0);
        let waited = vm.wait(&format!("the answer of the deployment {name}"), |vm| {
            let error = match vm.answer_of(port) {
                Ok(answer) => return Ok(wanted.check(&answer)?.then_some(answer)),
                Err(error) => error,
            };
            if let Some(seen) = vm.broker.latest()? {
                running.check(&seen)?;
            }
            Err(error)
        });
        self.explained(vm, deployed, &running, waited)
    }

    /// Adds the last lines of a container that has failed as the cause of a failure of the guest. Other errors stay as
    /// they are.
    fn explained<T>(
        &self,
        vm: &mut RunningVm,
        deployed: Deployed,
        wanted: &ExpectedDeployment,
        waited: Result<T>,
    ) -> Result<T> {
        let error = match waited {
            Err(error) if wanted.failed_with.is_some() && Kind::Guest.is(&error) => error,
            other => return other,
        };
        let container = container_of(&self.device_id, deployed);
        let cause = match vm.last_lines(&container) {
            Ok(text) => format!("the container {container} has printed: {text}"),
            Err(error) => format!("cannot read the output of the container {container}: {error:#}"),
        };
        Err(because(error, cause))
    }
}

impl RunningVm {
    fn last_lines(&mut self, container: &str) -> Result<String> {
        let command =
            format!("podman --url unix:///run/iot-agent/podman.sock logs --tail {LINES} {container} 2>&1");
        Ok(shortened(&self.run_as_root(&command, self.plan.limits.guest_command())?))
    }
}

/// Returns lines as one line, and equal ones that follow each other only once.
fn shortened(text: &str) -> String {
    let mut lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.dedup();
    if lines.is_empty() { "nothing".to_owned() } else { lines.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_lines_of_several_starts_are_one() {
        assert_eq!(shortened("started\nno such page\r\nno such page\n\n"), "started; no such page");
        assert_eq!(shortened("\n"), "nothing");
    }
}
