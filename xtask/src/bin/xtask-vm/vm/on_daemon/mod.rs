//! The commands of `cargo xtask vm` for machines on a libvirt daemon. [`power`] switches a machine on and off, and [`gc`]
//! collects dead runs. The console is in [`super::console`], for all machines.

mod gc;
pub(super) mod power;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use xtask_core::cache::Cache;
use xtask_core::cli::{LightVmCommand, Verbosity};
use xtask_core::error::Failure;
use xtask_core::libvirt_uri::ConnectUri;
use xtask_core::message;
use xtask_core::runs::instance::{self, DaemonRecord, Instance};
use xtask_core::runs::listing::{self, State};
use xtask_core::runs::owner::NAME;
use xtask_jobs::Ui;

use crate::guest::monitor::state;
use crate::libvirt::daemon::Daemon;
use crate::libvirt::daemon::run_domain::RunDomain;

/// Runs a command that needs no libvirt for a machine of the embedded driver.
pub(crate) fn run(command: &LightVmCommand, verbosity: Verbosity) -> Result<()> {
    let ui = Ui::install(verbosity)?;
    let cache = Cache::open()?;
    match command {
        LightVmCommand::List { json } => list(&cache, *json, &ui),
        LightVmCommand::PowerCut(args) => {
            power::cut(&mut instance::find(&cache, args.machine.as_deref())?, &ui)
        }
        LightVmCommand::Rm(args) => remove(&instance::find(&cache, args.machine.as_deref())?, &ui),
        LightVmCommand::Gc(args) => gc::gc(args, &ui),
        LightVmCommand::Ssh(_)
        | LightVmCommand::Open { .. }
        | LightVmCommand::Exec { .. }
        | LightVmCommand::Logs(_) => {
            Err(Failure::usage("xtask-vm does not run this command; run it as cargo xtask").into())
        }
    }
}

/// Returns the URI of the daemon that runs an instance.
fn uri_of(instance: &Instance) -> Result<ConnectUri> {
    let daemon = instance.machine.daemon.as_ref();
    let DaemonRecord { uri, .. } = daemon.context("the machine is not on a libvirt daemon")?;
    Ok(uri.parse()?)
}

fn domain_of(instance: &Instance) -> String {
    format!("{NAME}{}", instance.machine.id)
}

/// Returns the domain of an instance on its daemon.
///
/// # Errors
/// Returns a failure of the host if the daemon does not answer or does not have the domain.
pub(super) fn run_domain(instance: &Instance, ui: &Ui) -> Result<RunDomain> {
    let uri = uri_of(instance)?;
    let found = RunDomain::find(Daemon::open_in_time(&uri, ui)?, &instance.machine.id, ui)?;
    let lost = || {
        let (name, domain) = (&instance.machine.name, domain_of(instance));
        let hint = format!("cargo xtask vm rm {name} deletes what is left of the machine on this host");
        Failure::host(format!("find {name}: {uri} no longer has its domain {domain}"), hint)
    };
    Ok(found.ok_or_else(lost)?)
}

/// Lists all instances. A daemon that does not answer makes the states of its machines unknown.
fn list(cache: &Cache, as_json: bool, ui: &Ui) -> Result<()> {
    let instances = instance::all(cache);
    let mut of_daemons = BTreeMap::<&str, Vec<&Instance>>::new();
    for instance in &instances {
        if let Some(daemon) = &instance.machine.daemon {
            of_daemons.entry(&daemon.uri).or_default().push(instance);
        }
    }
    let mut states = BTreeMap::new();
    for (uri, of_daemon) in of_daemons {
        match states_on(uri, &of_daemon, ui) {
            Ok(found) => states.extend(found),
            Err(error) => {
                ui.check()?;
                let names: Vec<_> = of_daemon.iter().map(|one| one.machine.name.as_str()).collect();
                message!("warning: the state of {} is unknown: {error:#}", names.join(", "));
            }
        }
    }
    listing::show(&instances, as_json, |one| match &one.machine.daemon {
        None => state(one),
        Some(_) => states.get(&one.machine.id).cloned().unwrap_or(State::Unknown),
    })
}

/// Returns the states of the instances on one daemon, by their ids.
fn states_on(uri: &str, instances: &[&Instance], ui: &Ui) -> Result<Vec<(String, State)>> {
    let uri: ConnectUri = uri.parse()?;
    let mut states = Vec::new();
    for one in instances {
        match RunDomain::find(Daemon::open_in_time(&uri, ui)?, &one.machine.id, ui)? {
            Some(run_domain) => states.push((one.machine.id.clone(), run_domain.state()?)),
            None => {
                let (name, domain) = (&one.machine.name, domain_of(one));
                message!("warning: the state of {name} is unknown: {uri} no longer has its domain {domain}");
            }
        }
    }
    Ok(states)
}

/// Removes an instance: first its domain and volumes, then its directory. If the daemon does not answer, the directory
/// stays, because it is the only record of the machine on this host.
fn remove(instance: &Instance, ui: &Ui) -> Result<()> {
    let (uri, name, domain) = (uri_of(instance)?, &instance.machine.name, domain_of(instance));
    let first = || match RunDomain::find(Daemon::open_in_time(&uri, ui)?, &instance.machine.id, ui)? {
        Some(mut run_domain) => run_domain.remove(),
        None => {
            message!("warning: {uri} no longer has the domain {domain}, which lists the machine's volumes");
            Ok(())
        }
    };
    let processes = instance::remove(instance, || {
        first().map_err(|error| {
            error.context(Failure::host(
                format!(
                    "remove {name}: the domain {domain} and its volumes may still exist on {uri}; nothing was deleted \
                     on this host"
                ),
                format!("run cargo xtask vm rm {name} again when this libvirt answers"),
            ))
        })
    })?;
    message!(
        "removed {name}: deleted its domain and disk on {uri}, ended {processes} process(es) on this host"
    );
    Ok(())
}
