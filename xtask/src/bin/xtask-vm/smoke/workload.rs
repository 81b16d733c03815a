//! The phase *workload* and its continuation in later phases: the changes of the desired state before the power cut
//! and while the machine is off, and the checks that the device follows them.

use std::collections::BTreeMap;
use std::time::Instant;

use agent_protocol::deployment::{Limits, Port, Protocol, Volume};
use agent_protocol::{ContainerSpec, Deployment, Document};
use anyhow::Result;
use xtask_core::bail_guest;
use xtask_core::error::Failure;
use xtask_core::image::Image;
use xtask_core::machine::WORKLOAD_PORTS;
use xtask_core::report::{StatusEvidence, WorkloadEvidence};

use super::deployed::ExpectedAnswer;
use super::fault::Fault;
use super::proof::{Deployed, Proof, same_boot};
use super::running::RunningVm;
use crate::guest::root::RootView;
use crate::guest::workload::IMAGE;

/// A deployment that is never deleted. It is changed while the machine is off.
pub(super) const PERSISTENT: Deployed = Deployed { name: "persistent", port: WORKLOAD_PORTS[0] };
/// A deployment that is deleted, and added again just before the power cut.
pub(super) const EPHEMERAL: Deployed = Deployed { name: "ephemeral", port: WORKLOAD_PORTS[1] };
/// A deployment that is deleted just before the power cut.
pub(super) const RETIRED: Deployed = Deployed { name: "retired", port: WORKLOAD_PORTS[2] };
/// The port on which the program listens in its container.
const CONTAINER_PORT: u16 = 8080;
/// The probation of a changed deployment. Until it is over, the device has the previous container as well, so no view
/// agrees with the desired state.
pub(super) const PROBATION_SECONDS: u32 = 5;

/// Returns the document of a deployment: the workload of this generation, with a port, a volume and limits. The image is
/// that of the archive.
pub(super) fn document(generation: u64, port: u16) -> Document {
    document_with(IMAGE, generation, port, PROBATION_SECONDS)
}

/// Returns a document like [`document`], with the image of this reference and another probation in seconds.
pub(super) fn document_with(image: &str, generation: u64, port: u16, probation: u32) -> Document {
    let container = ContainerSpec {
        env: BTreeMap::from([("GENERATION".to_owned(), generation.to_string())]),
        ports: vec![Port { host: port, container: CONTAINER_PORT, address: None, protocol: Protocol::Tcp }],
        volumes: vec![Volume { name: "data".to_owned(), mount: "/data".to_owned(), read_only: false }],
        limits: Limits { memory_mib: Some(64), processes: Some(32), ..Limits::default() },
        probation_seconds: Some(probation),
        ..ContainerSpec::of(image)
    };
    Document::of(Deployment::PodmanContainer(container))
}

/// Restarts the broker and adds three deployments. Waits until the agent has found the broker again, and until the
/// deployments run and answer. Then deletes one deployment, and waits until the agent reports it as removed and its
/// port is silent. Checks that this has not changed the container of another deployment.
pub(super) fn run(
    vm: &mut RunningVm,
    proof: &mut Proof<'_>,
    joined: &StatusEvidence,
) -> Result<(WorkloadEvidence, String)> {
    let started = Instant::now();
    let last = Fault::NoBroker.begin(vm)?.end(vm)?;
    let mut desired = Vec::new();
    for deployed in [PERSISTENT, EPHEMERAL, RETIRED] {
        desired.push((deployed, vm.broker.desire(deployed.name, &document(1, deployed.port))?));
    }
    proof.reconnects(vm, &last)?;
    for (deployed, revision) in desired {
        proof.runs(vm, deployed, revision)?;
    }
    // A silent port proves a deletion only if it has answered before.
    let wanted = ExpectedAnswer { machine: &joined.machine, generation: 1, before: None };
    let first = proof.answers(vm, PERSISTENT, &wanted)?;
    proof.ephemeral = Some(proof.answers(vm, EPHEMERAL, &wanted)?);
    proof.answers(vm, RETIRED, &wanted)?;
    same_boot(&first, joined)?;
    check_pages(&first, &vm.plan.image)?;
    let running = started.elapsed();
    let deleted = vm.broker.desire_no_more(EPHEMERAL.name)?;
    proof.is_gone(vm, EPHEMERAL, deleted)?;
    let after = proof.answers(vm, PERSISTENT, &wanted)?;
    if after != first {
        bail_guest!(
            "deleting {} changed {} too: {after:?}, before {first:?}", EPHEMERAL.name, PERSISTENT.name;
            "a change of one deployment must leave the others' containers alone"
        );
    }
    proof.evidence.workload = Some(first.clone());
    let detail = format!(
        "{} in a container after {:.1} s, started {} time(s); {} deleted at revision {deleted} and gone",
        first.machine,
        running.as_secs_f64(),
        first.starts,
        EPHEMERAL.name
    );
    Ok((first, detail))
}

/// Adds [`EPHEMERAL`] again and deletes [`RETIRED`], while the disk completes no writes. The agent must not
/// acknowledge a change that is not on its disk. Then lets the disk go on, and returns the revisions of both changes
/// once the agent has acknowledged them. The power cut follows before podman has started the container of [`EPHEMERAL`]
/// or stopped that of [`RETIRED`].
pub(super) fn change_before_cut(vm: &mut RunningVm, proof: &mut Proof<'_>) -> Result<(u64, u64)> {
    let held = Fault::HeldWrites.begin(vm)?;
    let put = vm.broker.desire(EPHEMERAL.name, &document(2, EPHEMERAL.port))?;
    let deleted = vm.broker.desire_no_more(RETIRED.name)?;
    proof.acknowledges_nothing(vm, put)?;
    held.end(vm)?;
    proof.acknowledges(vm, deleted)?;
    Ok((put, deleted))
}

/// Checks, while there is no broker, that the device has started the deployments that it had acknowledged, and that it
/// has not started the deleted one.
pub(super) fn recovered(
    vm: &mut RunningVm,
    proof: &mut Proof<'_>,
    before: &WorkloadEvidence,
) -> Result<(WorkloadEvidence, RootView)> {
    let offline = proof.runs_offline(vm, PERSISTENT, before)?;
    // A deletion keeps the volumes.
    let ephemeral = proof.ephemeral.clone();
    let wanted = ExpectedAnswer { machine: &before.machine, generation: 2, before: ephemeral.as_ref() };
    proof.answers_offline(vm, EPHEMERAL, &wanted)?;
    let view = proof.agrees(vm, &offline.boot_id, &[PERSISTENT, EPHEMERAL], &[RETIRED])?;
    Ok((offline, view))
}

/// Changes [`PERSISTENT`] while the machine is off, and then stops the broker. Returns the revision of the change.
pub(super) fn change_while_off(vm: &mut RunningVm) -> Result<u64> {
    let revision = vm.broker.desire(PERSISTENT.name, &document(2, PERSISTENT.port))?;
    vm.stop_broker()?;
    Ok(revision)
}

/// The revisions of the fleet's changes around the power cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Changes {
    /// The revision of the new generation of [`EPHEMERAL`], just before the power cut.
    pub(super) added: u64,
    /// The revision of the deletion of [`RETIRED`], straight before the power cut.
    pub(super) deleted: u64,
    /// The revision of the new generation of [`PERSISTENT`], while the machine was off.
    pub(super) updated: u64,
}

/// Waits until the workload runs as it was changed while the machine was off, and until the deployment that was
/// deleted before is gone.
pub(super) fn changed(
    vm: &mut RunningVm,
    proof: &mut Proof<'_>,
    changes: Changes,
    offline: &WorkloadEvidence,
) -> Result<WorkloadEvidence> {
    proof.runs(vm, PERSISTENT, changes.updated)?;
    proof.runs(vm, EPHEMERAL, changes.added)?;
    proof.is_gone(vm, RETIRED, changes.deleted)?;
    let wanted = ExpectedAnswer { machine: &offline.machine, generation: 2, before: Some(offline) };
    let answer = proof.answers(vm, PERSISTENT, &wanted)?;
    proof.evidence.workload_rejoin = Some(answer.clone());
    Ok(answer)
}

/// Checks that the guest's kernel has the page size that the catalogue states. The catalogue states none for other
/// images.
fn check_pages(answer: &WorkloadEvidence, image: &Image) -> Result<(), Failure> {
    match image.expected.as_ref().map(|expected| expected.page_size) {
        Some(expected) if Some(expected) != answer.page_size => bail_guest!(
            "the guest's kernel has pages of {} bytes, but the catalogue states {expected} bytes for the image {}",
            answer.page_size.unwrap_or_default(), image.name;
            "read console.log for the kernel that booted; if it is the right one, correct page_size in \
             xtask/core/images.toml"
        ),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use xtask_core::arch::VmArchitecture;
    use xtask_core::image::catalogue::Catalogue;

    use super::*;

    #[test]
    fn a_kernel_with_other_pages_than_the_image_is_refused() {
        let image = Catalogue::built_in().find("debian-13-16k", VmArchitecture::Aarch64).unwrap();
        let answer = |page_size| WorkloadEvidence {
            machine: "aarch64".to_owned(),
            page_size: Some(page_size),
            boot_id: "b".to_owned(),
            generation: 1,
            starts: 1,
        };
        check_pages(&answer(16384), &image).unwrap();
        let error = check_pages(&answer(4096), &image).unwrap_err().to_string();
        assert!(error.contains("pages of 4096 bytes, but the catalogue states 16384 bytes"), "{error}");
        check_pages(&answer(4096), &Image { expected: None, ..image }).unwrap();
    }

    #[test]
    fn what_is_desired_is_a_document_that_the_agent_reads() {
        for generation in [1, 2] {
            let document = document(generation, PERSISTENT.port);
            assert_eq!(Document::parse(&document.to_bytes()).unwrap(), document);
        }
    }
}
