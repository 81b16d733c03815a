//! Checks the libvirt that `--connect` names: its daemon, this user's permissions, its network and its host. Each
//! answer has a time limit here, since libvirt's calls have none.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Instant;

use anyhow::Result;
use xtask_core::libvirt_uri::ConnectUri;
use xtask_core::limits;
use xtask_core::preflight::findings::Finding;
use xtask_core::preflight::remote::refusal::Refusal;
use xtask_core::preflight::remote::{ConnectionFacts, evaluate};
use xtask_core::preflight::{PreflightRequest, Purpose};
use xtask_jobs::Ui;

use super::reaper::{children, end_children_since};
use super::remote;

/// Returns the facts about the libvirt at `uri` for the requested guests, and the findings about them.
pub(crate) fn check(
    uri: &ConnectUri,
    asked: &PreflightRequest<'_>,
    ui: &Ui,
) -> Result<(ConnectionFacts, Vec<Finding>)> {
    let before = children();
    let facts = gather(uri, asked, ui);
    if !matches!(&facts, Ok(ConnectionFacts { answer: Ok(_), .. })) {
        end_children_since(&before);
    }
    let facts = facts?;
    let findings = evaluate(&facts, asked);
    Ok((facts, findings))
}

/// Asks the questions in a thread. If an answer takes too long, the thread is abandoned. It ends together with this
/// process, soon afterwards.
fn gather(uri: &ConnectUri, asked: &PreflightRequest<'_>, ui: &Ui) -> Result<ConnectionFacts> {
    let (sender, questions) = mpsc::channel();
    let (name, architectures, machine) = (uri.clone(), asked.architectures.to_vec(), asked.machine.clone());
    let place = asked.place.clone();
    let thread = std::thread::spawn(move || {
        // After a timeout, the receiver no longer exists.
        let asks = |what| _ = sender.send(what);
        let asked = PreflightRequest {
            architectures: &architectures,
            machine: &machine,
            place: &place,
            purpose: Purpose::Run,
        };
        remote::gather(&name, &asked, &asks)
    });
    let (mut what, mut since) = ("begin", Instant::now());
    let refusal = loop {
        ui.check()?;
        match questions.recv_timeout(limits::POLL) {
            Ok(next) => (what, since) = (next, Instant::now()),
            Err(RecvTimeoutError::Timeout) if since.elapsed() < limits::CONNECTION => {}
            Err(RecvTimeoutError::Timeout) => {
                break Refusal::Silent { asked: what, limit: limits::CONNECTION };
            }
            Err(RecvTimeoutError::Disconnected) => match thread.join() {
                Ok(facts) => return Ok(facts),
                // The crate virt panics if libvirt cannot close a connection.
                Err(_) => {
                    break Refusal::Message(format!("libvirt's connection broke at the question: {what}"));
                }
            },
        }
    };
    Ok(ConnectionFacts { uri: uri.clone(), answer: Err(refusal) })
}
