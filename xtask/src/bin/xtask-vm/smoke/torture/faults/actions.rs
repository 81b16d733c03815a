//! The beginning and the end of each fault of a device. No fault needs a privilege on this host: they use QEMU's monitor,
//! the line before the broker, signals to processes of the run, and commands as root in the guest.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use xtask_core::cli::DeviceFault;
use xtask_core::error::host_fault;
use xtask_core::format::name_of;
use xtask_core::report::EventKind;
use xtask_fleet::{Line, Passage};

use super::super::super::running::RunningVm;
use super::frozen::set_clock;
use super::in_guest::{self, Fill};

/// The delay of each byte between the device and the broker, in each direction.
const DELAY: Duration = Duration::from_secs(2);
/// The rate of a slow connection to the broker, in bytes per second.
const RATE: u64 = 2000;
/// The MTU of a network with small packets, in bytes: the least that each host must accept (RFC 791).
const SMALL_MTU: u32 = 576;
/// The limits of a disk that is as slow as a worn SD card: bytes and requests per second.
const SLOW_DISK: (u64, u64) = (1_000_000, 60);

/// Begins a fault. A fault that is a moment has happened when this function returns.
pub(super) fn begin(vm: &mut RunningVm, fault: DeviceFault) -> Result<()> {
    vm.record(EventKind::Fault, format!("fault {}", name_of(&fault)));
    attributed(begun(vm, fault), "begin", fault)
}

/// Ends a fault. What heals is up to the device.
pub(super) fn end(vm: &mut RunningVm, fault: DeviceFault) -> Result<()> {
    attributed(ended(vm, fault), "end", fault)?;
    vm.record(EventKind::End, format!("fault {} ended", name_of(&fault)));
    Ok(())
}

/// Attributes an error to the host, unless it has an attribution: nothing is known about the agent then.
fn attributed(done: Result<()>, what: &str, fault: DeviceFault) -> Result<()> {
    done.map_err(|error| {
        let hint = "see the causes, and run again; nothing is known about the agent";
        host_fault(error, format!("{what} the fault {}", name_of(&fault)), hint)
    })
}

fn line(vm: &RunningVm) -> Result<&Line> {
    vm.broker.line().context("there is no line before the broker; this is a bug of cargo xtask")
}

/// Cuts the connections to the broker, so that the device must connect again.
fn cut(vm: &RunningVm) -> Result<()> {
    line(vm)?.cut();
    Ok(())
}

/// Sets the guest's clock, and has the device connect again: TLS compares the certificate with the clock.
fn clock(vm: &mut RunningVm, time: &str) -> Result<()> {
    in_guest::set_clock_to(vm, time)?;
    cut(vm)
}

/// Sends a signal to QEMU. A pause over QMP would stop the guest's clock, too, and the guest would not notice it.
fn signal_qemu(vm: &RunningVm, signal: Signal) -> Result<()> {
    let sent = vm.target.emulator().context("find the run's QEMU")?.signal(signal)?;
    ensure!(sent, "the run's QEMU has ended");
    Ok(())
}

fn begun(vm: &mut RunningVm, fault: DeviceFault) -> Result<()> {
    use DeviceFault as F;
    match fault {
        F::PowerCut => vm.cut_power(),
        F::LinkDown | F::LinkFlapping => vm.target.set_link(false),
        F::Blackhole => line(vm)?.set(Passage::Silent),
        F::HighDelay => line(vm)?.set(Passage::Delayed(DELAY)),
        F::LowRate => line(vm)?.set(Passage::Limited(RATE)),
        F::CaptivePortal => {
            vm.broker.open_portal()?;
            line(vm)?.set(Passage::Portal)
        }
        F::PacketLoss => in_guest::lose_packets(vm),
        F::SmallMtu => in_guest::set_mtu(vm, Some(SMALL_MTU)),
        F::NoNameService => {
            in_guest::hide_name(vm)?;
            cut(vm)
        }
        F::BrokerRestarted => vm.stop_broker(),
        F::BrokerSlow => vm.broker.pause(),
        F::BrokerRefuses => line(vm)?.set(Passage::Refused),
        F::BucketEmptied => {
            vm.emptied = Some(vm.broker.empty_bucket()?);
            Ok(())
        }
        F::LoginRevoked => vm.broker.revoke_login(),
        // The kernel refuses a time that is less than the time since the boot (settimeofday(2), EINVAL).
        F::Clock1970 => clock(vm, "1970-01-02 00:00:00"),
        F::ClockYearBack => clock(vm, "-1 year"),
        F::ClockTenYearsAhead => clock(vm, "+10 years"),
        F::ClockJumps => in_guest::set_clock_to(vm, "+2 hours"),
        F::DiskFullState => in_guest::fill_disk(vm, Fill::Whole),
        F::DiskFullPull => in_guest::fill_disk(vm, Fill::AllButSome),
        F::DiskSlow => vm.target.limit_writes(SLOW_DISK.0, SLOW_DISK.1),
        F::DiskError => {
            vm.target.fail_next_write()?;
            in_guest::write(vm)
        }
        F::DiskReadOnly => in_guest::remount_read_only(vm),
        F::MemoryPressure => in_guest::take_memory(vm),
        F::OomAgent => in_guest::out_of_memory(vm, in_guest::AGENT),
        F::OomPodman => in_guest::out_of_memory(vm, in_guest::PODMAN),
        F::OomContainer => in_guest::out_of_memory(vm, in_guest::CONTAINER),
        F::KillAgent => in_guest::kill(vm, in_guest::AGENT),
        F::KillPodman => in_guest::kill(vm, in_guest::PODMAN),
        F::KillContainer => in_guest::kill(vm, in_guest::CONTAINER),
        F::QemuStopped => signal_qemu(vm, Signal::STOP),
    }
}

fn ended(vm: &mut RunningVm, fault: DeviceFault) -> Result<()> {
    use DeviceFault as F;
    match fault {
        F::PowerCut => vm.switch_on(),
        F::LinkDown | F::LinkFlapping => vm.target.set_link(true),
        F::Blackhole | F::HighDelay | F::LowRate | F::BrokerRefuses | F::CaptivePortal => {
            line(vm)?.set(Passage::Open)
        }
        F::PacketLoss => in_guest::lose_no_packets(vm),
        F::SmallMtu => in_guest::set_mtu(vm, None),
        F::NoNameService => in_guest::show_name(vm),
        F::BrokerRestarted => vm.start_broker(),
        F::BrokerSlow => vm.broker.go_on(),
        F::BucketEmptied => {
            let contents = vm.emptied.take().context("the bucket was not emptied")?;
            vm.broker.refill_bucket(&contents).map(drop)
        }
        F::LoginRevoked => vm.broker.allow_login(),
        F::Clock1970 | F::ClockYearBack | F::ClockTenYearsAhead | F::ClockJumps => set_clock(vm),
        F::DiskFullState | F::DiskFullPull => in_guest::empty_disk(vm),
        F::DiskSlow => vm.limit_disk(),
        // A file system that has met an error stays read-only until the next boot.
        F::DiskError => {
            vm.cut_power()?;
            vm.switch_on()
        }
        F::DiskReadOnly => in_guest::remount_writable(vm),
        F::MemoryPressure => in_guest::give_memory_back(vm),
        F::OomAgent | F::OomPodman | F::OomContainer => in_guest::accept_kernel_messages(vm),
        F::KillAgent | F::KillPodman | F::KillContainer => Ok(()),
        F::QemuStopped => signal_qemu(vm, Signal::CONT),
    }
}
