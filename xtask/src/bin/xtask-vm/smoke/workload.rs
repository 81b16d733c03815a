//! The phase *workload* and what follows from it: what the fleet desires runs on the device, and is gone when it is desired no
//! more; after the power cut it runs again before there is a broker, and then as it was changed while the machine was off.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _};
use std::net::TcpStream;
use std::time::Instant;

use agent_protocol::deployment::{Limits, Port, Protocol, Volume};
use agent_protocol::{ContainerSpec, Deployment, Document};
use anyhow::{Context, Result, anyhow, ensure};
use xtask_core::error::Failure;
use xtask_core::limits;
use xtask_core::machine::WORKLOAD_PORTS;
use xtask_core::report::{StatusEvidence, WorkloadEvidence};

use super::deployed::{ExpectedAnswer, ExpectedDeployment};
use super::offline::OfflineRecovery;
use super::verify::Judgement;
use super::{RunningVm, Session};
use crate::guest::workload::IMAGE;

/// A deployment: its name, and the guest's port that it is published on.
struct Deployed(&'static str, u16);

/// It stays, and is changed while the machine is off.
const PERSISTENT: Deployed = Deployed("persistent", WORKLOAD_PORTS[0]);
/// It is deleted.
const EPHEMERAL: Deployed = Deployed("ephemeral", WORKLOAD_PORTS[1]);
/// Where the program listens in its container.
const CONTAINER_PORT: u16 = 8080;
/// The most that is read of an answer.
const MOST_BYTES: u64 = 4096;

/// What the fleet desires: the workload of this generation, with a port, a volume and limits.
fn document(generation: u64, port: u16) -> Document {
    let container = ContainerSpec {
        env: BTreeMap::from([("GENERATION".to_owned(), generation.to_string())]),
        ports: vec![Port { host: port, container: CONTAINER_PORT, address: None, protocol: Protocol::Tcp }],
        volumes: vec![Volume { name: "data".to_owned(), mount: "/data".to_owned(), read_only: false }],
        limits: Limits { memory_mib: Some(64), processes: Some(32), ..Limits::default() },
        ..ContainerSpec::of(IMAGE)
    };
    Document::of(Deployment::PodmanContainer(container))
}

/// Two deployments run and answer; the one that is deleted is gone, by the agent's word and from outside, and the other goes on.
pub(super) fn run(
    session: &mut Session<'_>,
    vm: &mut RunningVm,
    joined: &StatusEvidence,
) -> Result<(WorkloadEvidence, String)> {
    let started = Instant::now();
    let mut wanted = Vec::new();
    for Deployed(name, port) in [PERSISTENT, EPHEMERAL] {
        wanted.push(ExpectedDeployment::running(name, vm.broker.desire(name, &document(1, port))?));
    }
    let limit = vm.limits().workload();
    let answer = ExpectedAnswer { machine: &joined.machine, generation: 1, before: None };
    for (mut wanted, Deployed(name, _)) in wanted.into_iter().zip([PERSISTENT, EPHEMERAL]) {
        let what = format!("a status with the deployment {name} running");
        vm.wait_for_status(session, &what, limit, |seen| wanted.check(seen))?;
    }
    // A port that has never answered would not prove a deletion by its silence.
    let first = ask(session, vm, &PERSISTENT, &answer)?;
    ask(session, vm, &EPHEMERAL, &answer)?;
    ensure_boot(&first, joined)?;
    let running = started.elapsed();
    let deleted = delete_ephemeral(session, vm)?;
    let after = ask(session, vm, &PERSISTENT, &answer)?;
    if after != first {
        return Err(Failure::guest(
            format!("deleting {} changed {} too: {after:?}, before {first:?}", EPHEMERAL.0, PERSISTENT.0),
            "a change of one deployment must leave the others' containers alone",
        )
        .into());
    }
    session.report.evidence.workload = Some(first.clone());
    let detail = format!(
        "{} in a container after {:.1} s, started {} time(s); {} deleted at revision {deleted} and gone",
        first.machine,
        running.as_secs_f64(),
        first.starts,
        EPHEMERAL.0
    );
    Ok((first, detail))
}

/// The same kernel in the container as under the agent.
fn ensure_boot(answer: &WorkloadEvidence, status: &StatusEvidence) -> Result<()> {
    if answer.boot_id == status.boot_id {
        return Ok(());
    }
    Err(Failure::guest(
        format!("the workload runs in the boot {}, the agent in {}", answer.boot_id, status.boot_id),
        "something other than the container in the guest answers on the workload's port",
    )
    .into())
}

/// The revision of the deletion.
fn delete_ephemeral(session: &mut Session<'_>, vm: &mut RunningVm) -> Result<u64> {
    let Deployed(name, port) = EPHEMERAL;
    let revision = vm.broker.desire_no_more(name)?;
    let limit = vm.limits().removal();
    let deadline = Instant::now() + limit;
    let mut wanted = ExpectedDeployment::removed(name, revision);
    // The broker's own limit is the later one.
    vm.wait(session, &format!("the deployment {name} to be gone"), limit * 2, |vm| {
        let seen = vm.broker.latest()?;
        let judgement = seen.as_ref().map_or(Judgement::NotYet, |seen| wanted.check(seen));
        if let Judgement::Refuted(diagnosis) = judgement {
            return Err(diagnosis.into());
        }
        let answer = said_by(vm.machine.port_to(port)?);
        if matches!(judgement, Judgement::Proven) && answer.as_ref().is_err_and(is_refusal) {
            return Ok(Some(()));
        }
        if Instant::now() < deadline {
            return Ok(None);
        }
        let port = if answer.is_ok() { "still answers" } else { "is silent" };
        let status = wanted.describe(seen.as_ref());
        Err(Failure::guest(
            format!(
                "the deployment {name} was deleted at revision {revision}; {} s later its port {port} and the status {status}",
                limit.as_secs()
            ),
            "the agent must stop and remove the container of a deleted deployment",
        )
        .into())
    })?;
    Ok(revision)
}

/// While the machine is off: the fleet changes its mind, and then the broker is gone. The revision of the change.
pub(super) fn change_while_off(vm: &mut RunningVm) -> Result<u64> {
    let revision = vm.broker.desire(PERSISTENT.0, &document(2, PERSISTENT.1))?;
    vm.broker.go_away()?;
    Ok(revision)
}

/// The workload as it was before the power cut, out of what the device has on its disk: there is no broker.
pub(super) fn back_without_broker(
    session: &mut Session<'_>,
    vm: &mut RunningVm,
    before: &WorkloadEvidence,
) -> Result<WorkloadEvidence> {
    let what = "the workload's answer after the power cut, with no broker in reach";
    let limit = vm.limits().rejoin();
    let wanted =
        ExpectedAnswer { machine: &before.machine, generation: before.generation, before: Some(before) };
    let mut waited = OfflineRecovery::begin();
    let answer = vm.wait(session, what, limit, |vm| {
        let error = match said_by(vm.machine.port_to(PERSISTENT.1)?) {
            Ok(answer) => match wanted.check(&answer)? {
                Some(()) => return Ok(Some(answer)),
                None => anyhow!("the workload answers as generation {}", answer.generation),
            },
            Err(error) => error,
        };
        vm.check_workload(PERSISTENT.0, &mut waited)?;
        Err(error)
    })?;
    if answer.boot_id == before.boot_id {
        return Err(Failure::guest(
            format!(
                "after the power cut the workload still reports the boot id {} from before",
                answer.boot_id
            ),
            "something other than the container in the guest answers on the workload's port",
        )
        .into());
    }
    session.report.evidence.workload_offline = Some(answer.clone());
    Ok(answer)
}

/// The workload as it was changed at `revision`, while the machine was off.
pub(super) fn changed(
    session: &mut Session<'_>,
    vm: &mut RunningVm,
    revision: u64,
    offline: &WorkloadEvidence,
    rejoined: &StatusEvidence,
) -> Result<WorkloadEvidence> {
    let mut wanted = ExpectedDeployment::running(PERSISTENT.0, revision);
    let limit = vm.limits().workload();
    let what = "a status with the change that was made while the machine was off";
    vm.wait_for_status(session, what, limit, |seen| wanted.check(seen))?;
    let answer = ask(
        session,
        vm,
        &PERSISTENT,
        &ExpectedAnswer { machine: &offline.machine, generation: 2, before: Some(offline) },
    )?;
    ensure_boot(&answer, rejoined)?;
    session.report.evidence.workload_rejoin = Some(answer.clone());
    Ok(answer)
}

/// Waits for the answer of a deployment that runs.
fn ask(
    session: &mut Session<'_>,
    vm: &mut RunningVm,
    Deployed(name, port): &Deployed,
    wanted: &ExpectedAnswer<'_>,
) -> Result<WorkloadEvidence> {
    let limit = vm.limits().workload();
    vm.wait(session, &format!("the answer of the deployment {name}"), limit, |vm| {
        let answer = said_by(vm.machine.port_to(*port)?)?;
        Ok(wanted.check(&answer)?.map(|()| answer))
    })
}

/// Whether nobody listens; one who is slow may still be there.
fn is_refusal(error: &anyhow::Error) -> bool {
    let slow = |error: &std::io::Error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
    !error.chain().filter_map(|cause| cause.downcast_ref()).any(slow)
}

/// One line, from whoever listens behind a port of this host's loopback. QEMU takes each connection, and ends it where the
/// guest does not.
fn said_by(port: u16) -> Result<WorkloadEvidence> {
    let what = || format!("ask the workload behind port {port}");
    let stream = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), limits::WORKLOAD_ANSWER);
    let stream = stream.with_context(what)?;
    stream.set_read_timeout(Some(limits::WORKLOAD_ANSWER)).with_context(what)?;
    let mut line = String::new();
    BufReader::new(stream).take(MOST_BYTES).read_line(&mut line).with_context(what)?;
    ensure!(line.ends_with('\n'), "{}: no answer", what());
    serde_json::from_str(&line).with_context(|| format!("{}: read {line:?}", what()))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn what_is_desired_is_a_document_that_the_agent_reads() {
        for generation in [1, 2] {
            let document = document(generation, PERSISTENT.1);
            assert_eq!(Document::parse(&document.to_bytes()).unwrap(), document);
        }
    }

    #[test]
    fn who_closes_is_gone_and_who_is_slow_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let answered = |answer: &'static [u8]| {
            let listener = listener.try_clone().unwrap();
            let thread = std::thread::spawn(move || listener.accept().unwrap().0.write_all(answer).unwrap());
            let answer = said_by(port);
            thread.join().unwrap();
            answer
        };
        let line = b"{\"machine\":\"aarch64\",\"boot_id\":\"b\",\"generation\":1,\"starts\":2}\n";
        assert_eq!(answered(line).unwrap().starts, 2);
        assert!(is_refusal(&answered(b"").unwrap_err()), "as QEMU does where the guest does not listen");
        let slow = said_by(port).unwrap_err();
        assert!(!is_refusal(&slow), "{slow:#}");
        drop(listener);
        assert!(is_refusal(&said_by(port).unwrap_err()));
    }
}
