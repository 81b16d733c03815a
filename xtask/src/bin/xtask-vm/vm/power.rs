//! `vm start` boots an instance from its own disk, and returns when it can be entered. `vm stop` shuts an instance
//! down.

use std::io::Read as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, ensure};
use xtask_core::cache::Cache;
use xtask_core::cli::{OneArgs, Verbosity};
use xtask_core::error::{Failure, host_fault};
use xtask_core::fs::{make_private_dir, remove_tree};
use xtask_core::host::tools;
use xtask_core::machine::SSH_PORT;
use xtask_core::machine::proxies::Proxies;
use xtask_core::processes::emulator;
use xtask_core::readback::ExpectedMachine;
use xtask_core::runs::instance::{self, Instance};
use xtask_core::{bail_host, limits};
use xtask_images::snapshots;
use xtask_jobs::{Step, Ui, child};

use crate::guest::console::Console;
use crate::guest::monitor::{State, check_running, state};
use crate::guest::watch::{Deadline, Watch};
use crate::libvirt::{Condition, Hypervisor, Machine, Reach, isolation, paused};
use crate::vm::{log, on_daemon};

/// Starts an instance and waits for its ssh server.
pub(crate) fn start(args: &OneArgs, verbosity: Verbosity) -> Result<()> {
    let ui = Ui::install(verbosity)?;
    let cache = Cache::open()?;
    let mut instance = instance::find(&cache, args.machine.as_deref())?;
    let _lock = instance.lock()?;
    let name = instance.machine.name.clone();
    let step = Step { kind: &kind(&instance), what: "boot", title: "boot" };
    ui.step(&cache, step, || {
        let boot = if instance.machine.daemon.is_some() { on_daemon::power::boot } else { boot };
        boot(&cache, &mut instance, &ui).map_err(|error| {
            host_fault(error, format!("start {name}"), "see the causes; its disk is unchanged")
        })?;
        Ok(((), format!("{name} can be entered: cargo xtask vm ssh {name}")))
    })
}

/// Returns the name under which times are recorded. Instances with the same name take about the same time.
pub(super) fn kind(instance: &Instance) -> String {
    format!("machine-{}-{}", instance.machine.arch, instance.machine.image)
}

/// Shuts the guest down, and waits until its QEMU has ended. libvirt stays open during the wait: when the guest is
/// off, QEMU runs until libvirt ends it.
pub(crate) fn stop(args: &OneArgs, verbosity: Verbosity) -> Result<()> {
    let ui = Ui::install(verbosity)?;
    let cache = Cache::open()?;
    let mut instance = instance::find(&cache, args.machine.as_deref())?;
    let _lock = instance.lock()?;
    if instance.machine.daemon.is_some() {
        return on_daemon::power::stop(&cache, &mut instance, &ui);
    }
    let name = instance.machine.name.clone();
    if !instance.has_processes() {
        ui.note(&format!("{name} was already off"));
        return Ok(());
    }
    if state(&instance) != State::Off {
        check_running(&instance, &format!("stop {name}"))?;
    }
    let step = Step { kind: &kind(&instance), what: "shutdown", title: "shutdown" };
    ui.step(&cache, step, || {
        shut_down(&cache, &instance, &ui).map_err(|error| {
            let hint = format!("cut its power: cargo xtask vm power-cut {name}");
            host_fault(error, format!("stop {name}"), hint)
        })?;
        Ok(((), format!("{name} is off")))
    })
}

fn shut_down(cache: &Cache, instance: &Instance, ui: &Ui) -> Result<()> {
    let hypervisor = Hypervisor::open(&instance.work().join("v"), cache)?;
    let Some(machine) = hypervisor.running() else {
        // If the guest was already off, opening libvirt has just ended its QEMU.
        ensure!(!instance.has_processes(), "QEMU runs, but libvirt does not know it");
        return Ok(());
    };
    // ssh's connection ends with the guest, which may already be off. So an error is reported only if the guest
    // continues to run.
    let asked = run_in_guest(instance, &["sudo", "-n", "systemctl", "poweroff"], limits::SHUTDOWN, ui);
    let name = &instance.machine.name;
    let hint = format!("cut its power: cargo xtask vm power-cut {name}");
    let what = format!("{name} to be off");
    let watch = Watch { ui, what: &what, deadline: Deadline::after(limits::SHUTDOWN), hint: &hint };
    watch.until(&mut console_of_new_boot(instance)?, |_| match (machine.condition(), &asked) {
        (Condition::Gone, _) => Ok(Some(())),
        (_, Ok(_)) => Ok(None),
        (_, Err(error)) => Err(anyhow!("{error:#}")),
    })
}

/// Returns the console of an instance. Only output from now on is read from it.
pub(super) fn console_of_new_boot(instance: &Instance) -> Result<Console> {
    log::shorten(&instance.machine.console)?;
    let mut console = Console::new(&instance.machine.console);
    console.new_boot()?;
    Ok(console)
}

pub(super) fn run_in_guest(
    instance: &Instance,
    command: &[&str],
    limit: Duration,
    ui: &Ui,
) -> Result<String> {
    let mut arguments = instance.ssh()?;
    arguments.extend(["--"].iter().chain(command).map(Into::into));
    child::read(&tools::require("ssh")?, &arguments, limit, ui)
}

fn boot(cache: &Cache, instance: &mut Instance, ui: &Ui) -> Result<()> {
    let mut console = console_of_new_boot(instance)?;
    let root = instance.work().join("v");
    if !instance.has_processes() {
        // libvirt's files still name a QEMU that was killed or that ended when this host went down.
        remove_tree(&root)?;
        make_private_dir(&root)?;
    }
    let hypervisor = Hypervisor::open(&root, cache)?;
    if let Some(mut machine) = hypervisor.running() {
        // Ask for the port first: the answer arrives after libvirt has learned the state of the QEMU that it has found.
        let port = machine.port_to(SSH_PORT);
        if let (Ok(port), Condition::Running) = (port, machine.condition()) {
            ui.tick("it is already running")?;
            instance.machine.ssh_port = Some(port);
            instance.save()?;
            return wait_for_ssh(instance, &machine, &mut console, ui);
        }
        // The guest has shut itself down, or the process that started it died before the guest ran.
        machine.destroy()?;
    }
    instance.machine.ssh_port = None;
    instance.save()?;
    let name = instance.machine.name.clone();
    let (xml, expected) = asked_for(instance).map_err(|error| {
        let hint = format!(
            "another version of cargo xtask made it: cargo xtask vm rm {name} removes it, \
             and cargo xtask vm up makes another"
        );
        host_fault(error, format!("start {name}"), hint)
    })?;
    let lost = |error: Error| {
        let hint = format!(
            "the disk of {name} depends on this snapshot: remove the machine with cargo xtask vm rm {name} \
             and make another with cargo xtask vm up"
        );
        Failure::host(format!("{error:#}"), hint)
    };
    if let Some(snapshot) = snapshots::under(&instance.work()).map_err(lost)? {
        ui.tick("hashing the snapshot")?;
        snapshot.check_what_boots().map_err(lost)?;
    }
    if let Some(sentence) = isolation::services_in_reach() {
        ui.note(&sentence);
    }
    let (own, proxies) = Proxies::from_env().ports();
    let stopped = hypervisor.start_paused(&xml, &Reach::Internet { own, proxies })?;
    let mut machine = paused::resume_verified(stopped, &expected, &instance.work())?;
    if let Some(qemu) = emulator(&instance.work()) {
        log::keep_small(qemu.pid, &instance.machine.console)?;
    }
    instance.machine.ssh_port = Some(machine.port_to(SSH_PORT)?);
    instance.save()?;
    wait_for_ssh(instance, &machine, &mut console, ui)?;
    machine.let_go();
    Ok(())
}

/// Returns the XML of the instance's domain, and the machine that QEMU must make of it.
pub(super) fn asked_for(instance: &Instance) -> Result<(String, ExpectedMachine)> {
    let read = |name: &str| fs_err::read_to_string(instance.work().join(name));
    let expected = serde_json::from_str(&read(paused::EXPECTED)?);
    Ok((read(paused::XML)?, expected.with_context(|| format!("parse {}", paused::EXPECTED))?))
}

fn wait_for_ssh(instance: &Instance, machine: &Machine, console: &mut Console, ui: &Ui) -> Result<()> {
    let port = instance.machine.ssh_port.context("the started machine has no port for ssh")?;
    let name = &instance.machine.name;
    let hint = format!("see how far it got: cargo xtask vm console {name}");
    let mut looked: Option<Instant> = None;
    let watch = Watch {
        ui,
        what: "the machine's ssh server",
        deadline: Deadline::after(limits::BARE_BOOT),
        hint: &hint,
    };
    watch.until(console, |_| {
        if machine.condition() != Condition::Running {
            bail_host!(
                "QEMU ended while the machine booted";
                "see its last output: cargo xtask vm console {name}"
            );
        }
        if looked.is_some_and(|last| last.elapsed() < limits::SSH_AGAIN) {
            return Ok(None);
        }
        looked = Some(Instant::now());
        // Before the boot has ended, sshd greets clients but accepts no login (pam_nologin(8)).
        let enters = greets(port) && run_in_guest(instance, &["true"], limits::SERVER_START, ui).is_ok();
        Ok(enters.then_some(()))
    })
}

/// Returns whether an sshd behind this port sends its greeting, with which each connection begins (RFC 4253, 4.2).
/// QEMU accepts connections even before an sshd runs.
pub(crate) fn greets(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), limits::WORKLOAD_ANSWER)
    else {
        return false;
    };
    let mut greeting = [0; 4];
    stream.set_read_timeout(Some(limits::WORKLOAD_ANSWER)).is_ok()
        && stream.read_exact(&mut greeting).is_ok()
        && greeting == *b"SSH-"
}
