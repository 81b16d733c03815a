//! `vm start` and `vm stop`: an instance that is off boots again, from its own disk, and can be entered when this ends; and one
//! that runs shuts down.

use std::io::Read as _;
use std::net::TcpStream;
use std::time::Instant;

use anyhow::{Context, Error, Result, ensure};
use xtask_core::cache::Cache;
use xtask_core::cli::{OneArgs, Verbosity};
use xtask_core::error::{Failure, host_fault};
use xtask_core::fs::make_private_dir;
use xtask_core::host::tools;
use xtask_core::limits;
use xtask_core::readback::ExpectedMachine;
use xtask_core::runs::instance::{self, Instance};

use crate::guest::console::Console;
use crate::libvirt::{Condition, Hypervisor, Machine, paused};
use xtask_images::snapshots;
use xtask_jobs::{Step, Ui, child};

/// Starts it and waits for its ssh.
pub(crate) fn start(args: &OneArgs, verbosity: Verbosity) -> Result<()> {
    let ui = Ui::install(verbosity)?;
    let cache = Cache::from_env()?;
    let mut instance = instance::find(&cache, args.machine.as_deref())?;
    let _lock = instance.lock()?;
    let name = instance.machine.name.clone();
    let step = Step { kind: &kind(&instance), what: "boot", title: "boot" };
    ui.step(&cache, step, || {
        boot(&cache, &mut instance, &ui).map_err(|error| {
            host_fault(error, format!("start {name}"), "see the causes; its disk is unchanged")
        })?;
        Ok(((), format!("{name} can be entered: cargo xtask vm ssh {name}")))
    })
}

/// Machines whose boots take about as long.
fn kind(instance: &Instance) -> String {
    format!("machine-{}-{}", instance.machine.arch, instance.machine.image)
}

/// Has the guest shut down, and waits until its QEMU has ended. libvirt is there meanwhile: its QEMUs stay when their guest is off,
/// until it ends them.
pub(crate) fn stop(args: &OneArgs, verbosity: Verbosity) -> Result<()> {
    let ui = Ui::install(verbosity)?;
    let cache = Cache::from_env()?;
    let instance = instance::find(&cache, args.machine.as_deref())?;
    let _lock = instance.lock()?;
    let name = instance.machine.name.clone();
    if !instance.is_running() {
        ui.note(&format!("{name} was already off"));
        return Ok(());
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
        // A guest that is off already has a QEMU until libvirt looks.
        ensure!(!instance.is_running(), "QEMU runs, but libvirt does not know it");
        return Ok(());
    };
    // The connection ends with the guest, which may be off already: an error says nothing, and is told where the guest goes on.
    let ssh = tools::require("ssh")?;
    let asked = instance.ssh().and_then(|mut arguments| {
        arguments.extend(["--", "sudo", "-n", "systemctl", "poweroff"].map(Into::into));
        child::read(&ssh, &arguments, limits::SHUTDOWN, ui)
    });
    let deadline = Instant::now() + limits::SHUTDOWN;
    let mut console = Console::new(&instance.machine.console);
    console.new_boot()?;
    while machine.condition() != Condition::Gone {
        ui.tick(console.last())?;
        if Instant::now() > deadline {
            let name = &instance.machine.name;
            let late = format!("{name} is not off after {} s", limits::SHUTDOWN.as_secs());
            let late = Failure::guest(late, format!("cut its power: cargo xtask vm power-cut {name}"));
            return Err(asked.err().map_or_else(|| late.clone().into(), |error| error.context(late.clone())));
        }
        console.read()?;
        std::thread::sleep(limits::POLL);
    }
    Ok(())
}

fn boot(cache: &Cache, instance: &mut Instance, ui: &Ui) -> Result<()> {
    let mut console = Console::new(&instance.machine.console);
    console.new_boot()?;
    let root = instance.work().join("v");
    if !instance.is_running() {
        // A QEMU that lost its power, or that went with this host, is still in libvirt's own books.
        xtask_core::fs::remove_tree(&root)?;
        make_private_dir(&root)?;
    }
    let hypervisor = Hypervisor::open(&root, cache)?;
    if let Some(mut machine) = hypervisor.running() {
        // Asked first: the answer comes once libvirt has seen how the QEMU is that it has found.
        let port = machine.ssh_port();
        if let (Ok(port), Condition::Running) = (port, machine.condition()) {
            ui.tick("it is already running")?;
            instance.machine.ssh_port = Some(port);
            instance.save()?;
            return wait_for_ssh(instance, &machine, &mut console, ui);
        }
        // Its guest shut itself down, or whoever started it died before it ran.
        machine.destroy()?;
    }
    instance.machine.ssh_port = None;
    instance.save()?;
    let (xml, expected) = asked_for(instance).map_err(|error| {
        let name = &instance.machine.name;
        let hint = format!(
            "another version of cargo xtask made it: cargo xtask vm rm {name} removes it, and cargo xtask vm up makes another"
        );
        host_fault(error, format!("start {name}"), hint)
    })?;
    let lost = |error: Error| {
        let (error, name) = (format!("{error:#}"), &instance.machine.name);
        let hint = format!(
            "its disk depends on it: remove it with cargo xtask vm rm {name} and make another with cargo xtask vm up"
        );
        Failure::host(error, hint)
    };
    if let Some(snapshot) = snapshots::under(&instance.work()).map_err(lost)? {
        ui.tick("hashing the snapshot")?;
        snapshot.check_what_boots().map_err(lost)?;
    }
    let mut machine = paused::start_sound(&hypervisor, &xml, &expected, &instance.work())?;
    instance.machine.ssh_port = Some(machine.ssh_port()?);
    instance.save()?;
    wait_for_ssh(instance, &machine, &mut console, ui)?;
    machine.let_go();
    Ok(())
}

/// Its domain, and what QEMU must make of it.
fn asked_for(instance: &Instance) -> Result<(String, ExpectedMachine)> {
    let read = |name: &str| {
        let path = instance.work().join(name);
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let expected = read(paused::EXPECTED)?;
    let expected = serde_json::from_str(&expected).with_context(|| format!("parse {}", paused::EXPECTED))?;
    Ok((read(paused::XML)?, expected))
}

fn wait_for_ssh(instance: &Instance, machine: &Machine, console: &mut Console, ui: &Ui) -> Result<()> {
    let deadline = Instant::now() + limits::BARE_BOOT;
    let port = instance.machine.ssh_port.context("a machine that was just started")?;
    let ssh = tools::require("ssh")?;
    let mut looked: Option<Instant> = None;
    loop {
        ui.tick(console.last())?;
        console.read()?;
        if let Some(fault) = console.fault() {
            return Err(Failure::guest(fault.what, fault.hint).into());
        }
        if machine.condition() != Condition::Running {
            let hint = format!("see its last output: cargo xtask vm console {}", instance.machine.name);
            return Err(Failure::host("QEMU ended while the machine booted", hint).into());
        }
        // Before the end of the boot sshd greets and lets nobody in (pam_nologin(8)).
        let looks = looked.is_none_or(|last| last.elapsed() >= limits::SSH_AGAIN);
        if looks && greets(port) {
            let mut arguments = instance.ssh()?;
            arguments.extend(["--", "true"].map(Into::into));
            if child::read(&ssh, &arguments, limits::SERVER_START, ui).is_ok() {
                return Ok(());
            }
        }
        if looks {
            looked = Some(Instant::now());
        }
        if Instant::now() > deadline {
            let hint = format!("see how far it got: cargo xtask vm console {}", instance.machine.name);
            return Err(Failure::guest("the machine's ssh server did not answer in time", hint).into());
        }
        std::thread::sleep(limits::POLL);
    }
}

/// Whether an sshd greets whoever connects, as it does first (RFC 4253, 4.2). QEMU takes connections before there is one.
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
