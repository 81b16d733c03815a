//! The phase *preflight*: the facts about this host, or about the host of the libvirt of `--connect`, and the plan.

use anyhow::{Context, Result};
use xtask_core::cli::PlaceArgs;
use xtask_core::error::Failure;
use xtask_core::host::facts::Facts;
use xtask_core::host::tools;
use xtask_core::libvirt_uri::ConnectUri;
use xtask_core::plan::Plan;
use xtask_core::preflight::remote::ConnectionOffer;
use xtask_core::preflight::{Preflight, PreflightRequest, Purpose};
use xtask_core::report::{DaemonReport, Phase};

use super::options::RunOptions;
use super::prepare::check_flags;
use super::recorder::Recorder;
use super::run::Run;
use crate::guest::filesystem::CHECKER;
use crate::libvirt::connection;

/// Runs the phase *preflight*. Returns the plan: the requested options, resolved for this host.
pub(super) fn planned(run: &Run<'_>, recorder: &mut Recorder<'_>) -> Result<Plan> {
    let (HostFacts { facts, daemon }, plan) = recorder.phase(Phase::Preflight, None, || preflight(run))?;
    recorder.host(&facts, daemon);
    recorder.plan(&plan);
    Ok(plan)
}

/// The facts about this host, and about the daemon that runs the guest, for the report.
struct HostFacts {
    facts: Facts,
    daemon: Option<DaemonReport>,
}

fn preflight(run: &Run<'_>) -> Result<((HostFacts, Plan), String)> {
    let RunOptions { arch, machine, place, timeout_scale, fsck, records, .. } = run.options;
    let purpose = if records { Purpose::Torture } else { Purpose::Run };
    let asked = PreflightRequest { architectures: &[arch], machine, place, purpose };
    let mut preflight = Preflight::check(run.workspace, &asked)?;
    preflight.verdict()?;
    let offer =
        place.connect.as_ref().map(|uri| asked_libvirt(run, uri, &asked, &mut preflight)).transpose()?;
    if fsck && tools::find(CHECKER).is_none() {
        return Err(Failure::host(format!("--fsck: {CHECKER} is not on PATH"), "install e2fsprogs").into());
    }
    let facts = preflight.facts.into_iter().next().context("preflight returned no facts")?;
    let plan = match &offer {
        None => Plan::resolve(&facts, timeout_scale)?,
        Some(offer) => Plan::on_daemon(&facts, offer, place, timeout_scale)?,
    };
    check_flags(&run.options, &plan)?;
    let why = plan.accelerator_note().map_or(String::new(), |note| format!(" ({note})"));
    let at =
        place.connect.as_ref().map_or(String::new(), |uri| format!("{uri}, {} network, ", place.network()));
    let detail = format!("{at}QEMU {}, {}{why}", plan.qemu_version, plan.accelerator());
    let daemon = offer.map(|offer| DaemonReport {
        uri: place.connect.as_ref().map(ToString::to_string).unwrap_or_default(),
        network: place.network().to_string(),
        pool: place.pool().to_owned(),
        host: offer.host_name.ok(),
        cpus: offer.node.ok().map(|node| node.cpus),
    });
    Ok(((HostFacts { facts, daemon }, plan), detail))
}

/// Checks the libvirt that runs the guest, and returns its answer. Adds the findings about it to `preflight`.
///
/// # Errors
/// Returns a failure of the host if a finding blocks.
fn asked_libvirt(
    run: &Run<'_>,
    uri: &ConnectUri,
    asked: &PreflightRequest<'_>,
    preflight: &mut Preflight,
) -> Result<ConnectionOffer> {
    let network = Some(asked.place.network());
    let place = &PlaceArgs { network, ..asked.place.clone() };
    let (facts, findings) = connection::check(uri, &PreflightRequest { place, ..*asked }, &run.ui)?;
    preflight.add(findings);
    preflight.verdict()?;
    facts.answer.ok().context("libvirt has answered")
}
