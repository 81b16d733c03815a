//! The hosts of the smokes: this machine, or the libvirts of `--host` or `--connect`. Each libvirt is checked before a
//! smoke starts.

use std::thread::available_parallelism;

use anyhow::Result;
use xtask_core::cli::{PlaceArgs, SmokeArgs};
use xtask_core::error::Failure;
use xtask_core::host::memory;
use xtask_core::libvirt_uri::ConnectUri;
use xtask_core::preflight::findings::{Finding, Severity};
use xtask_core::preflight::remote::ConnectionFacts;
use xtask_core::preflight::{PreflightRequest, Purpose};
use xtask_core::spread::capacity;
use xtask_jobs::Ui;

use crate::libvirt::connection;

/// A host of smokes.
pub(super) struct Host {
    /// `None` for this machine, where a smoke uses libvirt's embedded driver.
    pub(super) uri: Option<ConnectUri>,
    /// The number of smokes that run there at the same time.
    pub(super) capacity: usize,
}

impl Host {
    /// Returns the name of the host in the table.
    pub(super) fn name(&self) -> String {
        self.uri.as_ref().map_or("this machine".to_owned(), ToString::to_string)
    }
}

/// Checks the hosts, and returns them with their capacities.
///
/// # Errors
/// Returns a failure of the host that names each host that cannot run the smokes, and its remedy.
pub(super) fn check(args: &SmokeArgs, ui: &Ui) -> Result<Vec<Host>> {
    let (mut hosts, mut blocking) = (Vec::new(), Vec::new());
    for place in args.places() {
        let Some(uri) = place.connect.clone() else {
            hosts.push(here(args));
            continue;
        };
        ui.note(&format!("check the host {uri}"));
        // A fault of the requested network blocks, as it does in the smoke.
        let place = PlaceArgs { network: Some(place.network()), ..place };
        let (architectures, machine) = (args.repeated.arches.as_slice(), &args.machine);
        let asked = PreflightRequest { architectures, machine, place: &place, purpose: Purpose::Run };
        let (facts, findings) = connection::check(&uri, &asked, ui)?;
        for finding in findings {
            match finding.severity {
                Severity::Blocks => blocking.push((uri.clone(), finding)),
                Severity::Degrades => ui.note(&format!("note: {}", finding.sentence)),
                Severity::Informs => {}
            }
        }
        hosts.push(Host { uri: Some(uri), capacity: capacity_of(&facts, args) });
    }
    if blocking.is_empty() { Ok(hosts) } else { Err(refusal(&blocking).into()) }
}

/// Returns this machine.
fn here(args: &SmokeArgs) -> Host {
    let cpus = available_parallelism().ok().and_then(|cpus| u32::try_from(cpus.get()).ok());
    let memory = memory::available().map(|memory| memory.bytes);
    Host { uri: None, capacity: capacity(cpus, memory, &args.machine) }
}

/// Returns the failure for the findings that block. The sentence of each finding names its host.
fn refusal(blocking: &[(ConnectUri, Finding)]) -> Failure {
    let sentences: Vec<_> = blocking.iter().map(|(_, finding)| finding.sentence.as_str()).collect();
    let remedies: Vec<_> = blocking
        .iter()
        .filter_map(|(uri, finding)| finding.by_hand().map(|remedy| format!("for {uri}: {remedy}")))
        .collect();
    let message = format!("a host cannot run the smokes, so none was started: {}", sentences.join("; "));
    Failure::host(message, format!("{}; or run the smokes on other hosts", remedies.join("; ")))
}

/// Returns the capacity of the host of a libvirt; 0 if the libvirt did not answer.
fn capacity_of(facts: &ConnectionFacts, args: &SmokeArgs) -> usize {
    let Ok(offer) = &facts.answer else { return 0 };
    let node = offer.node.as_ref().ok();
    let memory = offer.free_memory.as_ref().ok().copied().or(node.map(|node| node.memory));
    capacity(node.map(|node| node.cpus), memory, &args.machine)
}
