//! The power cuts of `--power-cuts`, at random moments while the device follows random changes of the desired state.
//! After each, the device must reach the desired state, keep its volumes, and have a sound storage of containers.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use xtask_core::bail_guest;
use xtask_core::error::Failure;
use xtask_core::report::{StatusEvidence, WorkloadEvidence};

use super::deployed::ExpectedAnswer;
use super::fault::Fault;
use super::proof::{Deployed, Proof};
use super::running::RunningVm;
use super::verify;
use super::workload::{EPHEMERAL, PERSISTENT, RETIRED, document};

/// The time within which the power is cut after the last change. In an emulated guest, it covers the load of the image,
/// the creation of the containers and the first seconds of their probation.
const MOMENTS: Duration = Duration::from_secs(20);
/// In about one of this many rounds, all deployments are deleted. The agent then deletes the image, and later loads it
/// again.
const ROUNDS_PER_CLEARING: u32 = 4;

/// The script that prints a line for each defect of the agent's container storage: a container that podman's database
/// does not have, an image that cannot be read or mounted, and an empty file in an image. The first line tells that the
/// script ran; podman 5 also checks its layers.
const CHECK_STORAGE: &str = "\
    cd /; user=iot-agent; uid=$(id -u $user); home=$(getent passwd $user | cut -d: -f6); \
    p() { runuser -u $user -- env HOME=$home XDG_RUNTIME_DIR=/run/user/$uid podman \"$@\" 2>&1; }; \
    echo \"images: $(p images --quiet | wc -l)\"; \
    p ps --all --external --format '{{.Names}} {{.Status}}' | grep -v -E ' (Up|Exited|Created|Initialized)'; \
    for image in $(p images --quiet --no-trunc); do \
      p image inspect $image > /dev/null || echo \"cannot inspect $image\"; \
      p unshare sh -c \"cd \\$(podman image mount $image) && find . -type f -size 0 && podman image unmount $image > /dev/null\" \
        || echo \"cannot mount $image\"; \
    done; \
    if p system check --help | grep -q -e --quick; then p system check --quick || echo 'podman system check fails'; fi";

/// A deployment with the state that is desired of it.
struct DesiredDeployment {
    deployed: Deployed,
    generation: u64,
    /// The revision of the last change.
    revision: u64,
    runs: bool,
    /// The last answer from the deployment's volume; `None` if the deployment has never answered.
    answer: Option<WorkloadEvidence>,
}

/// The desired state of the device over many power cuts.
pub(super) struct PowerCuts {
    deployments: [DesiredDeployment; 3],
    random: fastrand::Rng,
    done: u32,
}

impl PowerCuts {
    /// Begins after the phase *rejoin*: [`PERSISTENT`] and [`EPHEMERAL`] run in their second generation.
    pub(super) fn new(proof: &Proof<'_>, seed: u64) -> Self {
        let deployment =
            |deployed, runs, answer| DesiredDeployment { deployed, generation: 2, revision: 0, runs, answer };
        let deployments = [
            deployment(PERSISTENT, true, proof.evidence.workload_rejoin.clone()),
            deployment(EPHEMERAL, true, proof.ephemeral.clone()),
            deployment(RETIRED, false, None),
        ];
        Self { deployments, random: fastrand::Rng::with_seed(seed), done: 0 }
    }

    /// Changes the desired state, cuts the power, and waits until the device has reached the desired state.
    pub(super) fn next(&mut self, vm: &mut RunningVm, proof: &Proof<'_>) -> Result<((), String)> {
        self.done += 1;
        let before = vm.broker.latest()?.context("the device's status is gone")?;
        self.change(vm)?;
        let moment = MOMENTS.mul_f64(self.random.f64());
        let until = Instant::now() + moment;
        vm.wait("the moment of the power cut", |_| Ok((Instant::now() >= until).then_some(())))?;
        let last = Fault::PowerCut.begin(vm)?.end(vm)?;
        let joined = proof.comes_back(vm, &verify::evidence(&before), &last)?;
        self.reached(vm, proof, &joined)?;
        let images = check_storage(vm)?;
        let wanted = self
            .deployments
            .iter()
            .map(|deployment| if deployment.runs { deployment.generation.to_string() } else { "-".into() });
        let wanted = wanted.collect::<Vec<_>>().join(", ");
        let detail = format!(
            "number {}, {:.1} s after a change to the generations {wanted}; {images}",
            self.done,
            moment.as_secs_f64()
        );
        Ok(((), detail))
    }

    /// Deletes all deployments, or puts or deletes some of them.
    fn change(&mut self, vm: &RunningVm) -> Result<()> {
        let clears = self.random.u32(0..ROUNDS_PER_CLEARING) == 0;
        for deployment in &mut self.deployments {
            if !clears && deployment.runs && self.random.bool() {
                continue;
            }
            deployment.runs = !clears && (!deployment.runs || self.random.u8(0..4) > 0);
            let Deployed { name, port } = deployment.deployed;
            deployment.revision = if deployment.runs {
                deployment.generation += 1;
                vm.broker.desire(name, &document(deployment.generation, port))?
            } else {
                vm.broker.desire_no_more(name)?
            };
        }
        Ok(())
    }

    /// Waits until each deployment is as desired, and keeps the answers.
    fn reached(&mut self, vm: &mut RunningVm, proof: &Proof<'_>, joined: &StatusEvidence) -> Result<()> {
        for deployment in &mut self.deployments {
            if !deployment.runs {
                continue;
            }
            proof.runs(vm, deployment.deployed, deployment.revision)?;
            let wanted = ExpectedAnswer {
                machine: &joined.machine,
                generation: deployment.generation,
                before: deployment.answer.as_ref(),
            };
            deployment.answer = Some(proof.answers(vm, deployment.deployed, &wanted)?);
        }
        let of = |runs: bool| -> Vec<_> {
            self.deployments
                .iter()
                .filter(|deployment| deployment.runs == runs)
                .map(|deployment| deployment.deployed)
                .collect()
        };
        proof.agrees(vm, &joined.boot_id, &of(true), &of(false)).map(drop)
    }
}

/// Checks the agent's container storage as its user. Returns the number of images as text.
pub(super) fn check_storage(vm: &mut RunningVm) -> Result<String> {
    // `torture` has two images, each of which is mounted.
    let output = vm.run_as_root(CHECK_STORAGE, 2 * vm.plan.limits.journal())?;
    Ok(sound(&output)?.to_owned())
}

/// Returns the first line of the script's output, or an error if the script has found a defect.
fn sound(output: &str) -> Result<&str, Failure> {
    let output = output.trim();
    if output.starts_with("images: ") && output.lines().count() == 1 {
        return Ok(output);
    }
    bail_guest!(
        "podman's storage is not sound after the power cut: {output:?}";
        "run again with --keep-on-failure, and look at the storage in the home directory of iot-agent"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_defect_of_the_storage_is_named() {
        assert_eq!(sound("images: 1\n").unwrap(), "images: 1");
        for output in ["", "sh: syntax error\n", "images: 1\ncannot mount 5f\n", "images: 1\n./program\n"] {
            assert!(sound(output).unwrap_err().to_string().contains(&format!("{:?}", output.trim())));
        }
    }
}
