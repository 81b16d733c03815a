//! The faults that root makes in the guest. Commands go over virtio-serial, so they need no network.

use anyhow::Result;
use xtask_core::bail_host;
use xtask_core::machine::HOST_FROM_GUEST;
use xtask_core::machine::seed::{BASELINE, LIST_KERNEL_FAULTS};
use xtask_fleet::FLEET_NAME;

use super::super::super::running::RunningVm;

/// The last line of the output of a command that succeeded.
const DONE: &str = "done";

/// The command that prints the process id of the agent.
pub(super) const AGENT: &str = "systemctl show --property MainPID --value iot-agent.service";
/// The command that prints the process id of the agent's podman. A request makes sure that podman runs.
pub(super) const PODMAN: &str = "podman --url unix:///run/iot-agent/podman.sock version > /dev/null; \
     pgrep --uid iot-agent --full '^/usr/bin/podman.* system service' | head -n 1";
/// The command that prints the process id of the container of the deployment that no episode changes.
pub(super) const CONTAINER: &str = "name=$(podman --url unix:///run/iot-agent/podman.sock ps --format '{{.Names}}' | \
     grep '\\.persistent$'); podman --url unix:///run/iot-agent/podman.sock inspect --format '{{.State.Pid}}' $name";

/// The command that prints the name of the network interface to the broker.
const INTERFACE: &str = "$(ip -o route get 10.0.2.2 | sed 's/.* dev \\([^ ]*\\).*/\\1/')";
/// The directory of the files that fill the disk.
const FILLED: &str = "/var/lib/iot-xtask-full";
/// The directory, in memory, of the file that takes the memory.
const TAKEN: &str = "/run/iot-xtask-memory";
/// The memory, in KiB, that a guest under memory pressure has left.
const LEFT: u32 = 40 << 10;
/// The percentage of lost packets.
const LOSS: &str = "33%";

/// The part of the disk that is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fill {
    /// All of it: the agent cannot write its state.
    Whole,
    /// All but some MiB: the agent can write its state, but not an image.
    AllButSome,
}

/// Runs a command as root. A guest that boots answers late.
///
/// # Errors
/// Returns a failure of the host if the command fails.
fn run(vm: &mut RunningVm, command: &str) -> Result<()> {
    let limit = vm.plan.limits.login_prompt();
    let output = vm.run_as_root(&format!("{{ {command}; }} 2>&1 && echo {DONE}"), limit)?;
    if output.lines().next_back() != Some(DONE) {
        bail_host!(
            "the command {command:?} failed in the guest: {:?}", output.trim();
            "the image lacks a program or a module of the kernel; use another image, or leave this fault out with \
             --faults"
        );
    }
    Ok(())
}

pub(super) fn lose_packets(vm: &mut RunningVm) -> Result<()> {
    run(vm, &format!("modprobe sch_netem && tc qdisc replace dev {INTERFACE} root netem loss {LOSS}"))
}

pub(super) fn lose_no_packets(vm: &mut RunningVm) -> Result<()> {
    // A boot has ended the loss, too.
    run(
        vm,
        &format!(
            "if tc qdisc show dev {INTERFACE} | grep -q netem; then tc qdisc del dev {INTERFACE} root; fi"
        ),
    )
}

/// Sets the MTU of the guest's network interface, or the usual one.
pub(super) fn set_mtu(vm: &mut RunningVm, mtu: Option<u32>) -> Result<()> {
    run(vm, &format!("ip link set dev {INTERFACE} mtu {}", mtu.unwrap_or(1500)))
}

/// Gives the broker a name, in the file of hosts and in the agent's configuration, and restarts the agent. The proxy of a
/// planted fault has an address of the guest's loopback, which stays.
pub(super) fn name_broker(vm: &mut RunningVm) -> Result<()> {
    run(
        vm,
        &format!(
            "echo '{HOST_FROM_GUEST} {FLEET_NAME}' >> /etc/hosts && \
             sed -i 's|tls://{HOST_FROM_GUEST}:|tls://{FLEET_NAME}:|' /etc/iot-agent/config.toml && \
             if grep -q {FLEET_NAME} /etc/iot-agent/config.toml; then systemctl restart iot-agent.service; fi"
        ),
    )
}

/// Removes the broker's name from the file of hosts.
pub(super) fn hide_name(vm: &mut RunningVm) -> Result<()> {
    run(vm, &format!("sed -i 's/ {FLEET_NAME}$/ hidden.{FLEET_NAME}/' /etc/hosts"))
}

pub(super) fn show_name(vm: &mut RunningVm) -> Result<()> {
    run(vm, &format!("sed -i 's/ hidden.{FLEET_NAME}$/ {FLEET_NAME}/' /etc/hosts"))
}

/// Sets the guest's clock to a time in the form of date(1).
pub(super) fn set_clock_to(vm: &mut RunningVm, time: &str) -> Result<()> {
    run(vm, &format!("date --utc --set='{time}' > /dev/null"))
}

/// Fills the file system with the agent's state, also the part that is reserved for root.
pub(super) fn fill_disk(vm: &mut RunningVm, fill: Fill) -> Result<()> {
    let spare = match fill {
        Fill::Whole => "",
        Fill::AllButSome => "rm -f f.1M.1 f.1M.2 f.1M.3 f.1M.4; ",
    };
    run(
        vm,
        &format!(
            "mkdir -p {FILLED}; cd {FILLED}; fallocate -l $(( $(stat -f -c '%f * %S' .) * 98 / 100 )) first; \
             for size in 16M 1M 64K 4K; do n=1; while fallocate -l $size f.$size.$n 2> /dev/null; do n=$((n+1)); done; done; \
             rm -f f.$size.$n; {spare}cd /"
        ),
    )
}

pub(super) fn empty_disk(vm: &mut RunningVm) -> Result<()> {
    run(vm, &format!("rm -rf {FILLED}"))
}

/// Writes to the disk, and does not mind if that fails.
pub(super) fn write(vm: &mut RunningVm) -> Result<()> {
    run(vm, "date > /var/lib/iot-xtask-written; sync; true")
}

/// Makes all file systems read-only, as the kernel does after an error (proc(5), sysrq-trigger).
pub(super) fn remount_read_only(vm: &mut RunningVm) -> Result<()> {
    run(vm, "echo u > /proc/sysrq-trigger; until grep -q ' / [^ ]* ro' /proc/mounts; do sleep 0.1; done")
}

pub(super) fn remount_writable(vm: &mut RunningVm) -> Result<()> {
    run(
        vm,
        "mount -o remount,rw / && : > /var/lib/iot-agent/.iot-xtask-probe && rm /var/lib/iot-agent/.iot-xtask-probe",
    )?;
    accept_kernel_messages(vm)
}

/// Takes nearly all of the memory that is available.
pub(super) fn take_memory(vm: &mut RunningVm) -> Result<()> {
    run(
        vm,
        &format!(
            "mkdir -p {TAKEN} && mount -t tmpfs -o size=100% tmpfs {TAKEN} && \
             available=$(sed -n 's/^MemAvailable: *\\([0-9]*\\).*/\\1/p' /proc/meminfo) && \
             head -c $(( (available - {LEFT}) / 1024 ))M /dev/zero > {TAKEN}/file"
        ),
    )
}

pub(super) fn give_memory_back(vm: &mut RunningVm) -> Result<()> {
    run(vm, &format!("if mountpoint --quiet {TAKEN}; then umount {TAKEN}; fi"))?;
    accept_kernel_messages(vm)
}

/// Lets the kernel's out-of-memory killer choose the process whose id the command `who` prints (proc(5), oom_score_adj and
/// sysrq-trigger).
pub(super) fn out_of_memory(vm: &mut RunningVm, who: &str) -> Result<()> {
    run(
        vm,
        &format!(
            "pid=$({who}) && [ \"$pid\" -gt 1 ] && echo 1000 > /proc/$pid/oom_score_adj && echo f > /proc/sysrq-trigger && \
             while [ -e /proc/$pid ]; do sleep 0.1; done"
        ),
    )
}

/// Sends SIGKILL to the process whose id the command `who` prints.
pub(super) fn kill(vm: &mut RunningVm, who: &str) -> Result<()> {
    run(vm, &format!("pid=$({who}) && [ \"$pid\" -gt 1 ] && kill -KILL $pid"))
}

/// Takes the messages of the kernel so far as expected. Otherwise, the next view would report the fault that was made.
pub(super) fn accept_kernel_messages(vm: &mut RunningVm) -> Result<()> {
    run(vm, &format!("{{ {LIST_KERNEL_FAULTS}; }} >> {BASELINE}; true"))
}
