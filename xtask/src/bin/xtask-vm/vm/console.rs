//! `vm console`: prints the output of an instance's serial console so far, and then attaches this terminal to the
//! console.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, QueueSelector, Termios, tcflush, tcgetattr, tcsetattr};
use xtask_core::cache::Cache;
use xtask_core::cli::Verbosity;
use xtask_core::error::host_fault;
use xtask_core::fs::try_lock;
use xtask_core::machine::CONSOLE_SOCKET;
use xtask_core::message;
use xtask_core::output::write_message;
use xtask_core::runs::instance::{self, ConsoleLog, Instance};
use xtask_core::{bail_host, limits};
use xtask_jobs::Ui;

use crate::guest::monitor::{State, state};
use crate::libvirt::daemon::run_domain::RunDomain;
use crate::vm::{log, on_daemon};

/// The key that detaches the terminal: Ctrl-], as in telnet(1) and virsh(1).
const DETACH: u8 = 0x1d;

/// Shows the console until the machine is off or the user presses Ctrl-]. If stdin is no terminal, Ctrl-C ends the
/// command.
pub(crate) fn console(machine: Option<&str>, verbosity: Verbosity) -> Result<()> {
    let ui = Ui::install(verbosity)?;
    let instance = instance::find(&Cache::open()?, machine)?;
    let name = &instance.machine.name;
    let is_on_daemon = instance.machine.daemon.is_some();
    let mut run_domain = is_on_daemon.then(|| on_daemon::run_domain(&instance, &ui)).transpose()?;
    if is_on_daemon {
        log::shorten(&instance.machine.console)?;
    }
    let mut log = ConsoleLog::open(&instance.machine.console)?;
    let is_off = |run_domain: &Option<RunDomain>| match run_domain {
        None => Ok(state(&instance) == State::Off),
        Some(run_domain) => run_domain.state().map(|state| state == State::Off),
    };
    let say_off = || message!("{name} is off; boot it with cargo xtask vm start {name}");
    if is_off(&run_domain)? {
        log.show()?;
        say_off();
        return Ok(());
    }
    // QEMU accepts one connection at a time, and lets others wait without a message.
    let Some(_lock) = try_lock(&instance.work().join("console.lock"))? else {
        bail_host!(
            "attach to the console of {name}: another terminal is attached";
            "detach that terminal with Ctrl-], or use --no-follow to see the output so far"
        );
    };
    // Change the terminal first: a process that may not control it is stopped here, before it is connected to the
    // guest.
    let terminal = RawTerminal::enter()?;
    let stream = connect(&instance, run_domain.as_mut()).map_err(|error| {
        let hint = match is_on_daemon {
            true => {
                "detach other clients of its libvirt (virsh console); --no-follow shows the output so far"
            }
            false => "use --no-follow to see the output so far; vm stop and vm start restore the console",
        };
        host_fault(error, format!("attach to the console of {name}"), hint)
    })?;
    if terminal.is_some() {
        write_message(&format!("(attached to {name}; Ctrl-] detaches)\r\n"));
    }
    let attached = attach(&instance, &stream, &mut log, terminal.is_some(), &ui);
    drop(terminal);
    message!("");
    attached?;
    if is_off(&run_domain)? {
        say_off();
    }
    Ok(())
}

/// Returns a socket of the console.
fn connect(instance: &Instance, run_domain: Option<&mut RunDomain>) -> Result<UnixStream> {
    if let Some(run_domain) = run_domain {
        return run_domain.attach_console(&instance.machine.console);
    }
    let path = instance.work().join(CONSOLE_SOCKET);
    UnixStream::connect(&path).with_context(|| format!("connect to {}", path.display()))
}

/// Copies the console's log to stdout, and stdin to the guest.
fn attach(instance: &Instance, stream: &UnixStream, log: &mut ConsoleLog, keys: bool, ui: &Ui) -> Result<()> {
    let over = Arc::new(AtomicBool::new(false));
    let share = || stream.try_clone().context("duplicate the console's socket");
    let (to_guest, mut from_guest) = (share()?, share()?);
    let (left, ended) = (Arc::clone(&over), Arc::clone(&over));
    // The threads may still run when this process ends. The first thread discards the guest's output,
    // because a guest blocks if its output is not read, for example while Ctrl-S stops the terminal. The output is
    // shown from the log instead.
    std::thread::spawn(move || {
        // Both an end and an error mean that QEMU has ended.
        let _ = std::io::copy(&mut from_guest, &mut std::io::sink());
        ended.store(true, Ordering::Relaxed);
    });
    // QEMU does not close the console when its guest has shut down. libvirt does.
    let (off, instance) = (Arc::clone(&over), instance.clone());
    std::thread::spawn(move || {
        while state(&instance) != State::Off {
            std::thread::sleep(limits::QEMU_STATE_AGAIN);
        }
        off.store(true, Ordering::Relaxed);
    });
    log.show()?;
    if keys {
        // The log may contain queries to a terminal. Discard this terminal's answers to them.
        tcflush(std::io::stdin(), QueueSelector::IFlush).context("discard earlier input")?;
    }
    std::thread::spawn(move || type_in(to_guest, keys, &left));
    loop {
        let was_over = over.load(Ordering::Relaxed);
        if !log.show()? || was_over {
            return Ok(());
        }
        ui.check()?;
        std::thread::sleep(limits::CONSOLE_ECHO_POLL);
    }
}

/// Copies stdin to the guest, until the key that detaches is typed, stdin ends or the guest is gone.
fn type_in(mut stream: UnixStream, keys: bool, over: &AtomicBool) {
    let mut buffer = [0; 256];
    while let Ok(count @ 1..) = std::io::stdin().read(&mut buffer) {
        let typed = &buffer[..count];
        let end = typed.iter().position(|byte| keys && *byte == DETACH);
        if stream.write_all(&typed[..end.unwrap_or(count)]).is_err() {
            return;
        }
        if end.is_some() {
            return over.store(true, Ordering::Relaxed);
        }
    }
}

/// A terminal in raw mode, which sends each key to the guest, also Ctrl-C. Dropping this value restores the terminal.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin).context("read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).context("set the terminal to raw mode")?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0) {
            message!("warning: cannot restore the terminal; run reset(1): {error}");
        }
    }
}
