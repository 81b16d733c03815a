//! `vm start`, `vm stop` and `vm power-cut` for a machine on a libvirt daemon. The way to the guest's sshd changes with
//! each start, so it is recorded anew.

use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use xtask_core::bail_host;
use xtask_core::cache::Cache;
use xtask_core::cli::Network;
use xtask_core::error::{Failure, host_fault};
use xtask_core::limits;
use xtask_core::machine::RunFiles;
use xtask_core::message;
use xtask_core::runs::instance::{Instance, Route};
use xtask_core::runs::listing::State;
use xtask_jobs::{Step, Ui};

use super::{run_domain, uri_of};
use crate::guest::console::Console;
use crate::guest::watch::{Deadline, Watch, Watched};
use crate::libvirt::daemon::run_domain::RunDomain;
use crate::libvirt::{Condition, Machine, paused};
use crate::vm::power::{asked_for, console_of_new_boot, kind, run_in_guest};

/// A guest that boots.
struct Booting<'a> {
    console: Console,
    run_domain: &'a RunDomain,
    name: &'a str,
}

impl Watched for Booting<'_> {
    fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    fn check_alive(&mut self, what: &str) -> Result<()> {
        let name = self.name;
        match self.run_domain.state()? {
            State::Running => Ok(()),
            State::Stopped(state) => Err(stopped(name, &format!("wait for {what}"), &state).into()),
            State::Off | State::Unknown => bail_host!(
                "QEMU ended while the machine booted";
                "see its last output: cargo xtask vm console {name} --no-follow"
            ),
        }
    }
}

/// A guest that shuts down.
struct Stopping<'a> {
    console: Console,
    run_domain: &'a RunDomain,
}

impl Watched for Stopping<'_> {
    fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    fn check_alive(&mut self, what: &str) -> Result<()> {
        Ok(self.run_domain.daemon.check(what)?)
    }
}

fn stopped(name: &str, attempted: &str, state: &str) -> Failure {
    Failure::host(
        format!("{attempted}: QEMU has stopped the guest, and its state is {state}"),
        format!(
            "if the state is io-error, free space in the storage pool; then use cargo xtask vm power-cut {name} and \
             cargo xtask vm start {name}"
        ),
    )
}

/// Records the way to the guest's sshd, or that there is none.
fn set_route(instance: &mut Instance, route: Option<Route>) -> Result<()> {
    match &mut instance.machine.daemon {
        Some(daemon) if daemon.route != route => daemon.route = route,
        _ => return Ok(()),
    }
    instance.save()
}

/// Boots the machine from its own disk, and waits until ssh can log in.
pub(in crate::vm) fn boot(_: &Cache, instance: &mut Instance, ui: &Ui) -> Result<()> {
    let console = console_of_new_boot(instance)?;
    let mut run_domain = run_domain(instance, ui)?;
    match run_domain.condition()? {
        Condition::Running => {
            ui.tick("it is already running")?;
            return wait_for_ssh(instance, &run_domain, &run_domain.machine()?, console, ui);
        }
        // QEMU has stopped the guest, or the process that started it died before the guest ran.
        Condition::Paused | Condition::Off => run_domain.machine()?.destroy()?,
        Condition::Gone => {}
    }
    set_route(instance, None)?;
    run_domain.lift_restriction()?;
    let (_, expected) = asked_for(instance)?;
    let files = RunFiles::of_run(&instance.work(), instance.machine.console.clone())?;
    let mut machine = switched_on(&mut run_domain, &files, &instance.machine.name)?;
    machine = paused::resume_verified(machine, &expected, &instance.work())?;
    wait_for_ssh(instance, &run_domain, &machine, console, ui)?;
    machine.let_go();
    run_domain.close_streams();
    Ok(())
}

fn switched_on(run_domain: &mut RunDomain, files: &RunFiles, name: &str) -> Result<Machine> {
    let network = run_domain.network()?;
    run_domain.start_paused(files).map_err(|error| {
        let hint = match (&network, format!("{error:#}")) {
            (Network::Nat(network), words) if words.contains("is not active") => {
                let start = run_domain.daemon.uri().virsh(&format!("net-start {network}"));
                format!("start its network: {start}")
            }
            _ => "see the causes; its disk is unchanged".to_owned(),
        };
        host_fault(error, format!("start {name}"), hint)
    })
}

fn wait_for_ssh(
    instance: &mut Instance,
    run_domain: &RunDomain,
    machine: &Machine,
    console: Console,
    ui: &Ui,
) -> Result<()> {
    let (name, network) = (instance.machine.name.clone(), run_domain.network()?);
    let hint = format!("see how far it got: cargo xtask vm console {name}");
    let watch = Watch {
        ui,
        what: "the machine's ssh server",
        deadline: Deadline::after(limits::BARE_BOOT),
        hint: &hint,
    };
    let mut looked: Option<Instant> = None;
    watch.until(&mut Booting { console, run_domain, name: &name }, |_| {
        if looked.is_some_and(|last| last.elapsed() < limits::SSH_AGAIN) {
            return Ok(None);
        }
        looked = Some(Instant::now());
        let Some(route) = run_domain.route(&network, machine)? else {
            bail_host!(
                "the network {network} has leased no address to the guest";
                "check its DHCP server (virsh net-dumpxml, net-dhcp-leases) and the host's firewall"
            );
        };
        set_route(instance, Some(route))?;
        Ok(run_in_guest(instance, &["true"], limits::SERVER_START, ui).is_ok().then_some(()))
    })
}

/// Shuts the guest down, and waits until its QEMU has ended.
pub(in crate::vm) fn stop(cache: &Cache, instance: &mut Instance, ui: &Ui) -> Result<()> {
    let name = instance.machine.name.clone();
    let run_domain = run_domain(instance, ui)?;
    match run_domain.state()? {
        State::Running => {}
        State::Stopped(state) => return Err(stopped(&name, &format!("stop {name}"), &state).into()),
        State::Off | State::Unknown => {
            ui.note(&format!("{name} was already off"));
            return set_route(instance, None);
        }
    }
    let step = Step { kind: &kind(instance), what: "shutdown", title: "shutdown" };
    ui.step(cache, step, || {
        shut_down(instance, &run_domain, ui).map_err(|error| {
            let hint = format!("cut its power: cargo xtask vm power-cut {name}");
            host_fault(error, format!("stop {name}"), hint)
        })?;
        Ok(((), format!("{name} is off")))
    })?;
    set_route(instance, None)
}

fn shut_down(instance: &mut Instance, run_domain: &RunDomain, ui: &Ui) -> Result<()> {
    // The address may be another one than at the start.
    if let Some(route) = run_domain.route(&run_domain.network()?, &run_domain.machine()?)? {
        set_route(instance, Some(route))?;
    }
    // ssh's connection ends with the guest, which may already be off. So an error is reported only if the guest
    // continues to run.
    let asked = run_in_guest(instance, &["sudo", "-n", "systemctl", "poweroff"], limits::SHUTDOWN, ui);
    let name = &instance.machine.name;
    let hint = format!("cut its power: cargo xtask vm power-cut {name}");
    let what = format!("{name} to be off");
    let watch = Watch { ui, what: &what, deadline: Deadline::after(limits::SHUTDOWN), hint: &hint };
    let console = console_of_new_boot(instance)?;
    watch.until(&mut Stopping { console, run_domain }, |_| match (run_domain.condition()?, &asked) {
        (Condition::Gone, _) => Ok(Some(())),
        (_, Ok(_)) => Ok(None),
        (_, Err(error)) => Err(anyhow!("{error:#}")),
    })
}

/// Cuts the power of a machine that is on.
pub(super) fn cut(instance: &mut Instance, ui: &Ui) -> Result<()> {
    let _lock = instance.lock()?;
    let name = instance.machine.name.clone();
    let attempted = format!("cut the power of {name}");
    let run_domain = run_domain(instance, ui)?;
    if run_domain.state()? == State::Off {
        set_route(instance, None)?;
        bail!(instance.off(&attempted));
    }
    let was_hard = run_domain
        .cut_power()
        .map_err(|error| host_fault(error, &attempted, "see the causes; the machine may still run"))?;
    set_route(instance, None).context(attempted)?;
    if !was_hard {
        let uri = uri_of(instance)?;
        message!(
            "warning: this user may not kill a QEMU of {uri}, so libvirt ended it, and QEMU has flushed the guest's disk"
        );
    }
    message!("{name} is off; boot it with cargo xtask vm start {name}");
    Ok(())
}
