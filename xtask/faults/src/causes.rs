//! The times that the healing from a fault takes by itself, and where each of them comes from. A test compares those of
//! the agent with the agent's code.

use std::time::Duration;

/// A part of the healing from a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cause {
    /// The source of the time, as a noun phrase.
    pub text: &'static str,
    /// The longest time that this part takes.
    pub time: Duration,
}

const fn cause(seconds: u64, text: &'static str) -> Cause {
    Cause { text, time: Duration::from_secs(seconds) }
}

/// RFC 2131, section 4.1: a DHCP client sends its request again after 4 s, plus or minus 1 s.
pub(crate) const DHCP: Cause = cause(5, "the first retransmission of DHCP");

/// The greatest length of a fault that drops packets, in seconds. [`RETRANSMISSION`] depends on it. It is also shorter
/// than the time after which pings end the connection ([`PINGS`]).
pub(crate) const MAX_OUTAGE: u32 = 15;

/// RFC 6298, section 5.5: TCP doubles the pause after each retransmission. The pause that lasts at the end of an outage
/// is therefore at most as long as the outage.
pub(crate) const RETRANSMISSION: Cause =
    cause(MAX_OUTAGE as u64, "TCP's retransmission, whose pause is at most as long as the outage");

/// `PING_INTERVAL` of `agent/src/bus.rs` is 10 s. async-nats ends the connection instead of the third ping if two have
/// no answer (`MAX_PENDING_PINGS`).
pub(crate) const PINGS: Cause = cause(30, "the NATS client's third ping, 10 s after the second");

/// `MAX_PAUSE` of `agent/src/reconnect.rs`.
pub(crate) const RECONNECT: Cause = cause(2, "the agent's longest pause between two attempts to connect");

/// `CONNECT_TIMEOUT` of `agent/src/bus.rs`. A portal lets the client wait for the first message of NATS, which comes
/// before TLS.
pub(crate) const CONNECT: Cause = cause(10, "the agent's limit of an attempt to connect that is under way");

/// `refusal_pause` of `agent/src/reconnect.rs`: the pauses are 1, 2, 4 and 8 s, minus up to a quarter.
/// In a revocation of at most [`MAX_REVOCATION`] seconds, the longest one is 8 s.
pub(crate) const REFUSAL: Cause = cause(8, "the agent's pause after the fourth refused login");

/// The greatest length of a revocation of the login, in seconds. The fifth attempt comes after 11.25 s or later.
pub(crate) const MAX_REVOCATION: u32 = 8;

/// `RETRY_PAUSE` of `agent/src/follow.rs` is 3 s, plus a random part of up to 3 s. It begins if a request to JetStream has
/// failed, or if the heartbeats of the consumer are missing for 10 s.
pub(crate) const FOLLOW: Cause = cause(6, "the agent's pause before it reads the desired state again");

/// `RETRY_PAUSE` of `agent/src/report.rs`.
pub(crate) const STATUS: Cause = cause(5, "the agent's pause before it sends a status again");

/// `MAX_PODMAN_PAUSE` of `agent/src/reconcile/mod.rs`.
pub(crate) const PODMAN: Cause = cause(5, "the agent's longest pause between two passes that failed");

/// `REQUEST_TIMEOUT` of `agent/src/podman/mod.rs` and `HANG` of `agent/src/reconcile/damage.rs` are 30 s each, and the agent
/// makes a pause of at most 5 s between the two requests. A podman whose file system was read-only can wait for ever.
pub(crate) const HANG: Cause = cause(65, "two requests that podman lets wait, after which the agent ends it");

/// `pause` of `agent/src/backoff.rs`: the pauses are 1, 2, 4 and 8 s. The fifth attempt comes after 15 s or later, which is
/// after the end of a fault of the disk or of the memory ([`MAX_SHORTAGE`]).
pub(crate) const DEPLOYMENT: Cause = cause(8, "the agent's pause after a deployment's fourth failure");

/// The greatest length of a fault in which the steps of a deployment fail, in seconds.
pub(crate) const MAX_SHORTAGE: u32 = 14;

/// The first pause of `agent/src/backoff.rs`.
pub(crate) const CONTAINER: Cause = cause(1, "the agent's pause before it starts a container again");

/// `OF_NETWORK` of `agent/src/images/retry.rs`: the pauses are 5 s and 10 s, plus or minus a quarter. The third attempt comes
/// after 11.25 s or later, which is after the end of the fault ([`MAX_FULL_PULL`]).
pub(crate) const DOWNLOAD: Cause = cause(13, "the agent's pause after the second failed download");

/// The greatest length of a disk without space for a pull, in seconds.
pub(crate) const MAX_FULL_PULL: u32 = 11;

/// `RestartSec` of `agent/dist/iot-agent.service`.
pub(crate) const SERVICE: Cause = cause(2, "systemd's pause before it starts the agent again");

/// podman's service and one container on an emulated aarch64 core. After a boot, the workload starts some 10 s after the
/// login prompt (`OFFLINE_RECOVERY` of `xtask/core/src/limits.rs`).
pub(crate) const PODMAN_START: Cause =
    cause(10, "the start of podman and of a container on an emulated core");

/// resolv.conf(5): two attempts of 5 s each by default.
pub(crate) const RESOLVER: Cause = cause(10, "the resolver's two attempts of a look-up that is under way");

/// async-nats misses the heartbeats of an ordered consumer after twice its interval of 5 s
/// (`ORDERED_IDLE_HEARTBEAT`).
pub(crate) const CONSUMER: Cause = cause(10, "the NATS client's wait for two heartbeats of the consumer");

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// If this test fails, the agent has other pauses. Change the cause and the lengths that depend on it.
    #[test]
    fn the_times_of_the_agent_are_those_of_its_code() {
        let second = |cause: Cause| format!("Duration::from_secs({})", cause.time.as_secs());
        let table = [
            (
                "src/bus.rs",
                format!("PING_INTERVAL: Duration = Duration::from_secs({});", PINGS.time.as_secs() / 3),
            ),
            ("src/bus.rs", format!("CONNECT_TIMEOUT: Duration = {};", second(CONNECT))),
            ("src/reconnect.rs", format!("MAX_PAUSE: Duration = {};", second(RECONNECT))),
            ("src/reconnect.rs", "Duration::from_secs(1 << (refusals - 1).min(12))".to_owned()),
            ("src/reconnect.rs", "full - jitter(full / 4)".to_owned()),
            (
                "src/follow.rs",
                format!("RETRY_PAUSE: Duration = Duration::from_secs({});", FOLLOW.time.as_secs() / 2),
            ),
            ("src/follow.rs", "sleep(RETRY_PAUSE + jitter(RETRY_PAUSE))".to_owned()),
            ("src/report.rs", format!("RETRY_PAUSE: Duration = {};", second(STATUS))),
            ("src/reconcile/mod.rs", format!("MAX_PODMAN_PAUSE: Duration = {};", second(PODMAN))),
            ("src/podman/mod.rs", "REQUEST_TIMEOUT: Duration = Duration::from_secs(30);".to_owned()),
            ("src/reconcile/damage.rs", "HANG: Duration = Duration::from_secs(30);".to_owned()),
            ("src/backoff.rs", "Duration::from_secs(1 << failures.saturating_sub(1).min(6))".to_owned()),
            ("src/images/retry.rs", "OF_NETWORK: [Duration; 2] = [Duration::from_secs(5)".to_owned()),
            ("src/images/retry.rs", "pause.mul_f64(0.75) + jitter(pause / 2)".to_owned()),
            ("dist/iot-agent.service", format!("RestartSec={}\n", SERVICE.time.as_secs())),
        ];
        let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../agent");
        for (file, words) in table {
            let text = std::fs::read_to_string(agent.join(file)).unwrap();
            assert!(text.contains(&words), "agent/{file} has no longer {words:?}");
        }
    }

    /// Simulates the pauses of the agent: attempts fail from the beginning of a fault to its end.
    #[test]
    fn the_longest_faults_end_before_the_pauses_grow_further() {
        // The shortest possible pauses before the attempt whose pause would be longer than the cause.
        let refused: f64 = [1.0, 2.0, 4.0, 8.0].iter().map(|pause| pause * 0.75).sum();
        assert!(f64::from(MAX_REVOCATION) < refused);
        let failed: u32 = [1, 2, 4, 8].iter().sum();
        assert!(MAX_SHORTAGE < failed);
        let downloads: f64 = [5.0, 10.0].iter().map(|pause| pause * 0.75).sum();
        assert!(f64::from(MAX_FULL_PULL) < downloads);
        assert!(DOWNLOAD.time.as_secs_f64() >= 10.0 * 1.25);
        assert!(u64::from(MAX_OUTAGE) < PINGS.time.as_secs() * 2 / 3, "the pings would end the connection");
    }
}
