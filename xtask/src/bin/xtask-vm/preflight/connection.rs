//! The libvirt that `preflight --connect` names: its daemon, what this user may do there, its network and its host. Each of
//! its answers has a limit, since libvirt's own calls have none.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Instant;

use anyhow::Result;
use rustix::process::{Signal, kill_process};
use xtask_core::libvirt_uri::ConnectUri;
use xtask_core::limits;
use xtask_core::preflight::PreflightRequest;
use xtask_core::preflight::findings::Finding;
use xtask_core::preflight::remote::refusal::Refusal;
use xtask_core::preflight::remote::{ConnectionFacts, evaluate};
use xtask_jobs::Ui;

use crate::libvirt::{children, remote};

/// What the libvirt at `uri` offers for the guests asked for, judged.
pub(super) fn findings(uri: &ConnectUri, asked: &PreflightRequest<'_>, ui: &Ui) -> Result<Vec<Finding>> {
    let before = children();
    let facts = gather(uri, asked, ui);
    if !matches!(&facts, Ok(ConnectionFacts { answer: Ok(_), .. })) {
        // libvirt's ssh, which its hanging call would have ended.
        for child in children().into_iter().filter(|child| !before.contains(child)) {
            // One that has ended by itself is as well.
            let _ = kill_process(child, Signal::TERM);
        }
    }
    Ok(evaluate(&facts?, asked))
}

/// The thread is left where it hangs: it ends with this process, which has little more to do.
fn gather(uri: &ConnectUri, asked: &PreflightRequest<'_>, ui: &Ui) -> Result<ConnectionFacts> {
    let (sender, questions) = mpsc::channel();
    let (name, architectures, machine) = (uri.clone(), asked.architectures.to_vec(), asked.machine.clone());
    let thread = std::thread::spawn(move || {
        // Nobody receives any more where the answer took too long.
        let asks = |what| _ = sender.send(what);
        remote::gather(&name, &architectures, &machine, &asks)
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
                // The crate virt panics where libvirt cannot even close a connection.
                Err(_) => {
                    break Refusal::Message(format!("libvirt's connection broke at the request: {what}"));
                }
            },
        }
    };
    Ok(ConnectionFacts { uri: uri.clone(), answer: Err(refusal) })
}
