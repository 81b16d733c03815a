//! Every duration in the tree, named, and scaled by one rule: the accelerator, not the architecture, makes a guest
//! slow, so emulation multiplies the guest's limits by three (300 s become 900 s) and `--timeout-scale`
//! multiplies once more.

use std::time::Duration;

use crate::arch::Accelerator;

/// How often a wait looks again.
pub const POLL: Duration = Duration::from_millis(100);
/// How often what a guest has said is shown to somebody who types.
pub const CONSOLE_ECHO_POLL: Duration = Duration::from_millis(30);
/// How often a wait that is not on a terminal says that it is alive.
pub const HEARTBEAT: Duration = Duration::from_secs(15);
/// How often a wait asks the guest over ssh how its agent is; each question costs an emulated guest seconds.
pub const GUEST_QUESTION: Duration = Duration::from_secs(12);
/// Before a guest that is up again is asked where its workload is; emulated, it comes some 10 s after the login prompt.
pub const OFFLINE_RECOVERY: Duration = Duration::from_secs(20);
/// Phases shorter than this hit the cache and are not recorded.
pub const CACHE_HIT: Duration = Duration::from_secs(2);
/// A shorter silence is no sign of anything, whatever is usual.
pub const SILENCE: Duration = Duration::from_secs(30);
/// How long a local server may take to listen.
pub const SERVER_START: Duration = Duration::from_secs(20);
/// How long a child may take to end after SIGTERM before SIGKILL.
pub const CHILD_STOP: Duration = Duration::from_secs(10);
/// How long QEMU may take to be gone after it was told to.
pub const QEMU_STOP: Duration = Duration::from_secs(20);
/// One request to the broker.
pub const BROKER_REQUEST: Duration = Duration::from_secs(5);
/// What the broker still has in hand from a guest that lost its power must have been stored by then.
pub const BROKER_SETTLE: Duration = Duration::from_millis(300);
/// How long the workload may take to answer whoever has connected: it only writes a line. The guest's network answers for it
/// while it is not there.
pub const WORKLOAD_ANSWER: Duration = Duration::from_secs(2);
/// Until ssh has entered a guest; the network of an emulated one answers for it while nothing listens.
pub const SSH_CONNECT: Duration = Duration::from_secs(60);
/// Between two looks whether a machine that boots can be entered: each has its sshd start a process, when there is most to do.
pub const SSH_AGAIN: Duration = Duration::from_secs(1);
/// The pause between two attempts to register with something that is not there yet.
pub const RETRY: Duration = Duration::from_millis(50);
/// How often a terminal's spinner turns.
pub const SPINNER: Duration = Duration::from_millis(120);
/// How often a command that runs on is asked whether it has ended.
pub const CHILD_POLL: Duration = Duration::from_millis(50);
/// How often a QEMU that has ended is looked for while libvirt waits for its end; libvirt itself looks every 200 ms.
pub const REAP: Duration = Duration::from_millis(10);
/// Debounce interval for SIGINT and SIGTERM: signals closer together count as one.
pub const INTERRUPT_DEBOUNCE: Duration = Duration::from_secs(1);
/// For so long a smoke may go on whose QEMU a soak has killed, to see it and to tear down.
pub const AFTER_KILL: Duration = Duration::from_secs(30);
/// For so long where the kill came as the power was to be cut anyway, and the smoke goes on to its verdict.
pub const AFTER_KILL_TO_VERDICT: Duration = Duration::from_secs(300);
/// A soak kills within this time after a smoke's start: from preflight to well into the power cut.
pub const KILL_WINDOW: Duration = Duration::from_secs(100);
/// The same where the machine comes out of a snapshot.
pub const WARM_KILL_WINDOW: Duration = Duration::from_secs(45);
/// The same from the moment on at which a snapshot's memory begins to be written: until it is hashed, named and restored.
pub const SAVE_WINDOW: Duration = Duration::from_secs(6);
/// How long a program may take to say what it is.
pub const PROBE: Duration = Duration::from_secs(10);
/// What `preflight` may take for both architectures, where it has been called before; `bench preflight` measures it.
pub const PREFLIGHT: Duration = Duration::from_millis(500);
/// What `inspect` may take for the agent, from its start to its end; `bench inspect` measures it.
pub const INSPECTION: Duration = Duration::from_millis(50);
/// The same for an executable of 100 MB.
pub const INSPECTION_OF_100_MB: Duration = Duration::from_secs(1);
/// What a warm smoke until join may take, from the command to its verdict; `bench` measures it.
pub const WARM_UNTIL_JOIN: Duration = Duration::from_secs(15);
/// What `preflight --rehearse` may take for one architecture, likewise.
pub const REHEARSAL: Duration = Duration::from_secs(2);
/// From asking a guest to shut down until its QEMU has ended.
pub const SHUTDOWN: Duration = Duration::from_secs(180);
/// For so long another run may make a snapshot that somebody waits to delete.
pub const SNAPSHOT_WAIT: Duration = Duration::from_secs(3600);
/// One bare boot of a bench.
pub const BARE_BOOT: Duration = Duration::from_secs(900);
/// Until a bench's QEMU has answered, or said that something happened. Linux takes 5 s to let a PCI Express device go.
pub const QMP_ANSWER: Duration = Duration::from_secs(30);
/// Until a guest of a bench has got an agent.
pub const DELIVERY: Duration = Duration::from_secs(120);
/// What another way to deliver it must save. A disk needs no network, no server that other users of the host reach, and no secret
/// against them, although a payload has the run's keys and logins in it; a network would need all of that.
pub const WORTH_ANOTHER_DELIVERY: Duration = Duration::from_millis(200);

/// Until a publisher's host has taken a connection.
pub const PUBLISHER_CONNECT: Duration = Duration::from_secs(20);
/// One small answer of a publisher's host (a listing, a file of digests), from the question to its last byte.
pub const PUBLISHER_ANSWER: Duration = Duration::from_secs(60);
/// One answer of the libvirt that `preflight --connect` names. A daemon that starts for the question asks every emulator of
/// its host for its capabilities first, about 1 s each.
pub const CONNECTION: Duration = Duration::from_secs(20);
/// For this long after the fallback image was used, the host of the default image is asked once and not twice.
pub const FALLBACK_MEMORY: Duration = Duration::from_secs(3600);
/// The judgement of one signature.
pub const SIGNATURE: Duration = Duration::from_secs(20);

/// Until a disk is unpacked, to read its libraries or to check it; and until that is done.
pub const INVENTORY: Duration = Duration::from_secs(300);

/// The limits of one run's waits for its guest.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    slowness: f64,
    scale: f64,
}

impl Limits {
    /// `scale` is `--timeout-scale`, 1.0 by default.
    pub fn new(accelerator: Accelerator, scale: f64) -> Self {
        let slowness = match accelerator {
            Accelerator::Kvm => 1.0,
            Accelerator::Tcg => 3.0,
        };
        Self { slowness, scale }
    }

    /// The limits of the same run, emulated.
    pub fn under_tcg(self) -> Self {
        Self::new(Accelerator::Tcg, self.scale)
    }

    fn scaled(self, seconds: u64) -> Duration {
        Duration::from_secs(seconds).mul_f64(self.slowness * self.scale)
    }

    /// Until the guest's userspace runs cloud-init's last stage.
    pub fn boot(self) -> Duration {
        self.scaled(300)
    }

    /// Until the guest has installed the agent.
    pub fn provision(self) -> Duration {
        self.scaled(100)
    }

    /// Until the first status of the agent under test.
    pub fn join(self) -> Duration {
        self.scaled(100)
    }

    /// One request to the agent.
    pub fn ping(self) -> Duration {
        self.scaled(10)
    }

    /// Until what the fleet desires runs: an image loaded, containers made and started.
    pub fn workload(self) -> Duration {
        self.scaled(60)
    }

    /// Until what the fleet desires no more is gone. Its program ends at once.
    pub fn removal(self) -> Duration {
        self.scaled(20)
    }

    /// From the guest's login prompt until its agent's unit is up, which starts at about the same time.
    pub fn agent_after_boot(self) -> Duration {
        self.scaled(25)
    }

    /// Until the first status after the power cut.
    pub fn rejoin(self) -> Duration {
        self.scaled(300)
    }

    /// One command in the guest over ssh; nothing else is watched meanwhile but Ctrl-C.
    pub fn guest_command(self) -> Duration {
        self.scaled(5)
    }

    /// The guest's journal over ssh, after a failure: thousands of lines, out of a guest that may have much else to do.
    pub fn journal(self) -> Duration {
        self.scaled(20)
    }

    /// From the agent's installation in a restored guest until it has the run's own keys.
    pub fn keys(self) -> Duration {
        self.scaled(30)
    }

    /// Until a kernel under KVM has said its first word; a KVM that does not run a stock kernel never does.
    /// Firmware under KVM takes 2 to 5 s.
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
