//! Every duration of the workspace has a name here. One rule scales the limits of a guest: the accelerator, not the
//! architecture, makes a guest slow. Emulation therefore multiplies the limits by three (300 s become 900 s), and
//! `--timeout-scale` multiplies them once more.

use std::time::Duration;

use crate::arch::Accelerator;

/// The time after which KVM is tried again for a machine for which it has failed.
pub const KVM_AGAIN: Duration = Duration::from_secs(86_400);
/// The pause between two queries of the registers of a guest's processors.
pub const REGISTERS: Duration = Duration::from_millis(200);
/// The shortest time for which the disk's writes are held.
pub const HELD_WRITES: Duration = Duration::from_millis(500);
/// The limit of one request for the revision that the agent acknowledges. The request is repeated.
pub const ACKNOWLEDGEMENT: Duration = Duration::from_millis(500);
/// The time for which `--disturb qemu-stopped` stops QEMU.
pub const STOPPED: Duration = Duration::from_secs(20);
/// The length of the fault `qemu-stopped` of `torture --faults`.
pub const QEMU_STANDS_STILL: Duration = Duration::from_secs(30);
/// The time that a device gets to heal from a fault of `torture --faults`, in addition to the time of the fault's causes.
pub const HEALING: Duration = Duration::from_secs(10);
/// The time in which an emulated device follows the fleet's changes of an episode of `torture --faults`: podman replaces
/// one container and removes another one. On a quiet host, this takes 6 to 10 s.
pub const CHANGES: Duration = Duration::from_secs(15);
/// The time after the boot in which `--disturb` disturbs the device, if no moment is given.
pub const DISTURBED: Duration = Duration::from_secs(60);
/// The pause between two polls of a wait.
pub const POLL: Duration = Duration::from_millis(100);
/// The pause between two updates of the guest's output while a user types at the console.
pub const CONSOLE_ECHO_POLL: Duration = Duration::from_millis(30);
/// The time after which a phase whose output is not a terminal prints its first progress line.
pub const FIRST_HEARTBEAT: Duration = Duration::from_secs(2);
/// The pause between two progress lines of a wait whose output is not a terminal.
pub const HEARTBEAT: Duration = Duration::from_secs(15);
/// The pause between two queries about the agent's state. Each query slows an emulated guest down for seconds.
pub const GUEST_QUESTION: Duration = Duration::from_secs(12);
/// The pause between the time at which a guest is up again and the first query about its workload. In an emulated guest
/// the workload starts some 10 s after the login prompt.
pub const OFFLINE_RECOVERY: Duration = Duration::from_secs(20);
/// The limit of `bench torture`: 1,000 crash states and ten boots, the recording included.
pub const TORTURE: Duration = Duration::from_secs(900);
/// The limit of `bench torture`: an episode for each fault, and pairs.
pub const ALL_FAULTS: Duration = Duration::from_secs(1500);
/// The limit of the median of the episodes without a boot; `bench torture` measures it.
pub const EPISODE: Duration = Duration::from_secs(20);
/// The limit of the median of the episodes with a boot; `bench torture` measures it.
pub const EPISODE_WITH_BOOT: Duration = Duration::from_secs(60);
/// The duration below which a phase counts as a cache hit and is not recorded.
pub const CACHE_HIT: Duration = Duration::from_secs(2);
/// The shortest silence that can count as a sign of a hang, whatever the usual silences are.
pub const SILENCE: Duration = Duration::from_secs(30);
/// The silence after which a firmware that could not load a boot entry counts as stuck. An emulated firmware tries the
/// next entry within a second.
pub const FIRMWARE_SILENCE: Duration = Duration::from_secs(45);
/// The limit for a local server to listen.
pub const SERVER_START: Duration = Duration::from_secs(20);
/// The time that a child gets to end after SIGTERM, before SIGKILL.
pub const CHILD_STOP: Duration = Duration::from_secs(10);
/// The limit for QEMU to end after it was asked to end.
pub const QEMU_STOP: Duration = Duration::from_secs(20);
/// The limit of one request to the broker.
pub const BROKER_REQUEST: Duration = Duration::from_secs(5);
/// The limit of the broker for a device's TLS handshake, and for its login after that. nats-server's own limit of 2 s is
/// too short for a device behind a delayed line: a handshake takes four times the delay of one direction.
pub const BROKER_LOGIN: Duration = Duration::from_secs(30);
/// The time for which a warm smoke watches the device at the end, without any change: two heartbeats of the agent.
pub const OBSERVED: Duration = Duration::from_secs(6);
/// The time for which a cold smoke watches the device at the end, without any change.
pub const OBSERVED_COLD: Duration = Duration::from_secs(40);
/// The pause after a fault. In this time, the broker stores the messages that it has received from the guest, and the
/// console receives the rest of the guest's output.
pub const BROKER_SETTLE: Duration = Duration::from_millis(300);
/// The limit for the workload to answer a connection: it only writes a line. The guest's network accepts the connection
/// even if the workload does not run.
pub const WORKLOAD_ANSWER: Duration = Duration::from_secs(2);
/// The limit of ssh for a connection. The network of an emulated guest accepts the connection even if no server
/// listens.
pub const SSH_CONNECT: Duration = Duration::from_secs(60);
/// The time for which a command that enters an instance tries again, from its start to its last attempt. An emulated
/// guest on a loaded host needs three minutes for a reboot.
pub const SSH_ENTRY: Duration = Duration::from_secs(300);
/// The time after which ssh asks a silent guest whether it still answers.
pub const SSH_ALIVE: Duration = Duration::from_secs(5);
/// The number of such questions without an answer after which ssh ends. A connection that no longer exists must be
/// noticed before a wait for the agent ends.
pub const SSH_ALIVES_MISSED: u32 = 4;

/// The pause between two ssh attempts on a booting machine. Each attempt makes sshd start a process, at a time when the
/// machine is busiest.
pub const SSH_AGAIN: Duration = Duration::from_secs(1);
/// The pause between two attempts at something that another process may still hold or prepare.
pub const RETRY: Duration = Duration::from_millis(50);
/// The pause between two frames of a terminal's spinner.
pub const SPINNER: Duration = Duration::from_millis(120);
/// The pause between two checks whether a running command has ended.
pub const CHILD_POLL: Duration = Duration::from_millis(50);
/// The pause between two checks for an ended QEMU while libvirt waits for its end. libvirt itself checks every 200 ms.
pub const REAP: Duration = Duration::from_millis(10);
/// The pause between two checks of the size of a machine's console log, when nothing else watches the machine.
pub const LOG_CHECK: Duration = Duration::from_secs(2);
/// Debounce interval for SIGINT and SIGTERM: signals closer together count as one.
pub const INTERRUPT_DEBOUNCE: Duration = Duration::from_secs(1);
/// The limit for a smoke to notice that a soak has killed its QEMU, and to tear down.
pub const AFTER_KILL: Duration = Duration::from_secs(30);
/// The limit for a smoke to reach its verdict if a soak killed its QEMU just before the power cut.
pub const AFTER_KILL_TO_VERDICT: Duration = Duration::from_secs(300);
/// The time after the start of a smoke in which a soak kills it: from preflight to well into the power cut.
pub const KILL_WINDOW: Duration = Duration::from_secs(100);
/// [`KILL_WINDOW`] for a smoke whose machine is restored from a snapshot.
pub const WARM_KILL_WINDOW: Duration = Duration::from_secs(45);
/// [`KILL_WINDOW`] for a kill while a snapshot is saved. It begins when the snapshot's memory begins to be written, and
/// lasts until the snapshot is hashed, named and restored.
pub const SAVE_WINDOW: Duration = Duration::from_secs(6);
/// The time for which `--fix` waits until another process has released a lock of the package manager.
pub const PACKAGE_LOCK: Duration = Duration::from_secs(300);
/// The limit for a short command, such as a query of a program's version.
pub const PROBE: Duration = Duration::from_secs(10);
/// The limit of `preflight` for both architectures if it has been called before; `bench preflight` measures it.
pub const PREFLIGHT: Duration = Duration::from_millis(500);
/// The limit of `inspect` for the agent, from its start to its end; `bench inspect` measures it.
pub const INSPECTION: Duration = Duration::from_millis(50);
/// The limit of `inspect` for an executable of 100 MB in which the calls between functions must be followed.
pub const INSPECTION_OF_100_MB: Duration = Duration::from_millis(1500);
/// The limit from `try` to the first output of its program if the kernel is in the cache; `bench try` measures it.
pub const FIRST_OUTPUT: Duration = Duration::from_secs(8);
/// The limit from the start of QEMU until the program of `try` starts. This takes seconds on a quiet host, and minutes
/// beside other emulated machines. The wait ends early if the machine ends.
pub const TRY_BOOT: Duration = Duration::from_secs(900);
/// The time for which `inspect --try` runs a program.
pub const TRIED: Duration = Duration::from_secs(10);
/// The limit of a warm smoke until join, from the command to its verdict; `bench` measures it.
pub const WARM_UNTIL_JOIN: Duration = Duration::from_secs(15);
/// The limit of `preflight --rehearse` for one architecture; `bench preflight` measures it.
pub const REHEARSAL: Duration = Duration::from_secs(2);
/// The limit for a guest to shut down, from the request to the end of its QEMU.
pub const SHUTDOWN: Duration = Duration::from_secs(180);
/// The limit of a wait for another run's snapshot that `image prune` is to delete.
pub const SNAPSHOT_WAIT: Duration = Duration::from_secs(3600);
/// The limit of one boot that is not part of a smoke.
pub const BARE_BOOT: Duration = Duration::from_secs(900);
/// The limit for a bench's QEMU to answer or to send an event. Linux takes 5 s to release a PCI Express device.
pub const QMP_ANSWER: Duration = Duration::from_secs(30);
/// The limit for the QEMU of an instance to report its state. QEMU serves one connection at a time, so it does not
/// answer while libvirt is connected to it.
pub const QEMU_STATE: Duration = Duration::from_secs(1);
/// The pause between two queries of the state of a guest whose console is attached.
pub const QEMU_STATE_AGAIN: Duration = Duration::from_secs(1);
/// The limit for a guest of a bench to receive an agent.
pub const DELIVERY: Duration = Duration::from_secs(120);
/// The time that another way of delivery must save to replace the disk. A network needs a server that other users of
/// the host can reach, and a secret that protects the payload, because the payload contains the run's keys and logins.
/// A disk needs none of these.
pub const WORTH_ANOTHER_DELIVERY: Duration = Duration::from_millis(200);

/// The limit for a publisher's host to accept a connection.
pub const PUBLISHER_CONNECT: Duration = Duration::from_secs(20);
/// The limit of one small response of a publisher's host (a listing, a file of digests), from the request to the last
/// byte.
pub const PUBLISHER_ANSWER: Duration = Duration::from_secs(60);
/// The limit of one response of the libvirt that `--connect` names. A daemon that is started by the request
/// first probes the capabilities of every emulator of its host, which takes about 1 s each.
pub const CONNECTION: Duration = Duration::from_secs(20);
/// The time after the use of the fallback image in which a run tries the host of the default image once instead of
/// twice.
pub const FALLBACK_MEMORY: Duration = Duration::from_secs(3600);
/// The limit for the verification of one signature.
pub const SIGNATURE: Duration = Duration::from_secs(20);

/// The time after which libvirt asks a daemon that is silent whether it still answers.
pub const KEEPALIVE: Duration = Duration::from_secs(5);
/// The number of such questions without an answer after which libvirt gives a connection up.
pub const KEEPALIVES_MISSED: u32 = 5;
/// The limit for QEMU to write the memory of a machine to a file, or to read it.
pub const MEMORY: Duration = Duration::from_secs(120);
/// The silence after which a run no longer waits for another run that uploads the same image to a daemon.
pub const UPLOAD_SILENCE: Duration = Duration::from_secs(120);

/// The limit for unpacking a disk, whose libraries or file system are then read. The check of the file system has the
/// same limit.
pub const INVENTORY: Duration = Duration::from_secs(300);

/// The limits of a run's waits for its guest.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    slowness: f64,
    scale: f64,
}

impl Limits {
    /// Returns the limits for an accelerator. `scale` is `--timeout-scale`, 1.0 by default.
    pub fn new(accelerator: Accelerator, scale: f64) -> Self {
        let slowness = match accelerator {
            Accelerator::Kvm => 1.0,
            Accelerator::Tcg => 3.0,
        };
        Self { slowness, scale }
    }

    /// Returns the limits of the same run under emulation.
    pub fn under_tcg(self) -> Self {
        Self::new(Accelerator::Tcg, self.scale)
    }

    fn scaled(self, seconds: u64) -> Duration {
        Duration::from_secs(seconds).mul_f64(self.slowness * self.scale)
    }

    /// Returns `--timeout-scale`.
    pub fn scale(self) -> f64 {
        self.scale
    }

    /// Returns the limit from the power-on of a device that has booted before until the agent's unit is up. On a quiet
    /// host, an emulated guest needs 25 to 40 s.
    pub fn boot_of_device(self) -> Duration {
        Duration::from_secs(30).mul_f64(self.slowness)
    }

    /// Returns the limit until the guest's userspace runs cloud-init's last stage.
    pub fn boot(self) -> Duration {
        self.scaled(300)
    }

    /// Returns the limit from the login prompt of a first boot until the console shows a sign of cloud-init.
    /// cloud-init's first stage prints a line long before the prompt.
    pub fn cloud_init_sign(self) -> Duration {
        self.scaled(20)
    }

    /// Returns the limit until the guest has installed the agent.
    pub fn provision(self) -> Duration {
        self.scaled(100)
    }

    /// Returns the additional limit for a first boot in which apt installs podman and its dependencies, some sixty
    /// packages.
    pub fn packages(self) -> Duration {
        self.scaled(300)
    }

    /// Returns the limit until the first status of the agent under test.
    pub fn join(self) -> Duration {
        self.scaled(100)
    }

    /// Returns the limit of one request to the agent, and of two heartbeats.
    pub fn ping(self) -> Duration {
        self.scaled(10)
    }

    /// Returns the limit of the phase *workload*: the broker is restarted, the image is loaded, containers are created
    /// and started, and one of them is removed.
    pub fn workload(self) -> Duration {
        self.scaled(100)
    }

    /// Returns the limit from a change of the desired state until the agent reports that the deployment runs.
    pub fn convergence(self) -> Duration {
        self.scaled(60)
    }

    /// Returns the limit until a deleted deployment has been removed, until the guest's state agrees with the agent's
    /// reports, and until the agent has found a restarted broker. The program of the smoke's deployment ends at once.
    pub fn removal(self) -> Duration {
        self.scaled(20)
    }

    /// Returns the limit of the phase *power cut*: the check of the guest as root, the hold of the disk's writes, and
    /// two acknowledged changes. With `--fsck`, the limit of the check of the disk is added.
    pub fn power_cut(self) -> Duration {
        self.scaled(100)
    }

    /// Returns the time for which the disk completes no writes while the desired state changes. An agent that does not
    /// wait for its disk reports the change within this time.
    pub fn held_writes(self) -> Duration {
        (self.scaled(1) / 2).max(HELD_WRITES)
    }

    /// Returns the limit from the power-on until the guest's login prompt, if the console shows one.
    pub fn login_prompt(self) -> Duration {
        self.scaled(50)
    }

    /// Returns the limit from the guest's first answer to a command until the agent's unit is up. The service that
    /// answers starts at about the same time as the unit.
    pub fn agent_after_boot(self) -> Duration {
        self.scaled(25)
    }

    /// Returns the limit of the phase *rejoin*: the boot, the workload without a broker, the first status, and the
    /// changed workload. The time for which the smoke then watches the device is added to it.
    pub fn rejoin(self) -> Duration {
        self.scaled(300)
    }

    /// Returns the limit until the DHCP server of a network of libvirt has given the guest an address, from the start
    /// of the guest's userspace.
    pub fn lease(self) -> Duration {
        self.scaled(60)
    }

    /// Returns the limit of one command in the guest.
    pub fn guest_command(self) -> Duration {
        self.scaled(10)
    }

    /// Returns the limit for reading the guest's journal after a failure: thousands of lines, from a guest
    /// that may be busy.
    pub fn journal(self) -> Duration {
        self.scaled(20)
    }

    /// Returns the limit from the agent's installation in a restored guest until the guest has installed the run's own
    /// keys.
    pub fn keys(self) -> Duration {
        self.scaled(30)
    }

    /// Returns the limit until a kernel under KVM prints its first line. If KVM cannot run a stock kernel, there is no
    /// such line. Firmware under KVM takes 2 to 5 s.
    pub fn first_kernel_line(self) -> Duration {
        self.scaled(25)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emulation_triples_and_the_flag_multiplies() {
        let table = [
            (Accelerator::Kvm, 1.0, 300),
            (Accelerator::Tcg, 1.0, 900),
            (Accelerator::Tcg, 0.5, 450),
            (Accelerator::Kvm, 2.0, 600),
        ];
        for (accelerator, scale, seconds) in table {
            assert_eq!(Limits::new(accelerator, scale).boot(), Duration::from_secs(seconds));
        }
    }
}
