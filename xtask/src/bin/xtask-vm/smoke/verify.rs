//! Checks of a status or an answer, as pure functions.

use agent_protocol::Reply;
use xtask_core::bail_guest;
use xtask_core::build::Agent;
use xtask_core::error::Failure;
use xtask_core::image::Image;
use xtask_core::os_release::OsReleaseReport;
use xtask_core::report::StatusEvidence;

use xtask_fleet::{ReceivedHeartbeat, ReceivedStatus};

/// The expected content of a status of the agent under test.
#[derive(Debug)]
pub(crate) struct ExpectedStatus {
    machine: &'static str,
    exe_sha256: String,
    /// The expected distribution; `None` for a user's own image, whose distribution is not known.
    os_release: Option<OsReleaseReport>,
}

impl ExpectedStatus {
    pub(crate) fn new(agent: &Agent, image: &Image) -> Self {
        Self {
            machine: agent.arch.profile().machine,
            exe_sha256: agent.sha256.clone(),
            os_release: image.expected.as_ref().map(|expected| expected.os_release.clone()),
        }
    }

    /// Returns an error if the machine, the executable or the distribution is not the expected one.
    fn check(&self, seen: &ReceivedStatus) -> Result<(), Failure> {
        let (status, os) = (&seen.status, os_release(seen));
        if status.machine != self.machine {
            bail_guest!(
                "the agent runs on {}, expected {}", status.machine, self.machine;
                "check that the right image was booted and that the agent reports uname -m"
            );
        }
        if status.exe_sha256 != self.exe_sha256 {
            bail_guest!(
                "the agent in the guest has the digest {}, the one under test {}",
                status.exe_sha256, self.exe_sha256;
                "the guest runs another executable than the one that was built: check what the image or the \
                 installer installs"
            );
        }
        if let Some(expected) = self.os_release.as_ref().filter(|expected| **expected != os) {
            bail_guest!(
                "the guest runs {} {}, expected {} {}",
                os.id, os.version_id, expected.id, expected.version_id;
                "the image does not match its name: delete its directory in images/ in the cache, and run \
                 again"
            );
        }
        Ok(())
    }
}

/// Returns true if the first status is that of the agent under test, and an error otherwise.
pub(crate) fn join(seen: &ReceivedStatus, expected: &ExpectedStatus) -> Result<bool, Failure> {
    expected.check(seen).and(Ok(true))
}

/// Returns whether the same executable wrote a status after the power cut, in a new boot. `last` is the entry of the
/// bucket while the machine was off: a status with a higher revision was stored later. Returns an error if the status
/// proves the opposite.
pub(crate) fn rejoin(
    seen: &ReceivedStatus,
    expected: &ExpectedStatus,
    joined: &StatusEvidence,
    last: &ReceivedStatus,
) -> Result<bool, Failure> {
    if seen.revision <= last.revision {
        return Ok(false);
    }
    // This status was still on its way at the time of the power cut: the old process continues its sequence numbers,
    // and a new process begins at 1.
    if seen.status.boot_id == joined.boot_id && seen.status.sequence > last.status.sequence {
        return Ok(false);
    }
    expected.check(seen)?;
    if seen.status.boot_id == joined.boot_id {
        bail_guest!(
            "after the power cut the agent still reports the boot id {} from before (revision {} after {})",
            joined.boot_id, seen.revision, last.revision;
            "the agent must read /proc/sys/kernel/random/boot_id at every start and keep no copy of it"
        );
    }
    Ok(true)
}

/// Returns an error unless the answer is that of the agent that joined.
pub(crate) fn pong(reply: &Reply, device: &str, joined: &StatusEvidence) -> Result<(), Failure> {
    match reply {
        Reply::Pong { device_id, boot_id, .. } if device_id == device && *boot_id == joined.boot_id => Ok(()),
        other => {
            bail_guest!(
                "the ping was answered by something other than the agent that joined: {other:?}";
                "check who else is subscribed to the device's commands"
            )
        }
    }
}

/// Returns an error unless the answer is the current status of the agent that joined.
pub(crate) fn replied_status(reply: &Reply, device: &str, joined: &StatusEvidence) -> Result<(), Failure> {
    match reply {
        Reply::Status { status }
            if status.device_id == device
                && status.boot_id == joined.boot_id
                && status.exe_sha256 == joined.exe_sha256 =>
        {
            Ok(())
        }
        other => bail_guest!(
            "the command status was answered by something other than the agent that joined: {other:?}";
            "check who else is subscribed to the device's commands"
        ),
    }
}

/// Returns an error unless `later` continues the sequence of `earlier`. A process that starts again begins at 1, also
/// if systemd does not see its start.
pub(crate) fn continues(earlier: &ReceivedStatus, later: &ReceivedStatus) -> Result<(), Failure> {
    let (from, to) = (&earlier.status, &later.status);
    if from.boot_id == to.boot_id && later.revision > earlier.revision && to.sequence <= from.sequence {
        bail_guest!(
            "the agent has started again by itself: after the status number {} it wrote number {}",
            from.sequence, to.sequence;
            "read the agent's journal in the report's directory for why it started again"
        );
    }
    Ok(())
}

/// Returns whether the process that wrote `status` has stored the heartbeat after it. Returns an error if the heartbeat
/// contradicts the status.
pub(crate) fn beats(status: &ReceivedStatus, beat: &ReceivedHeartbeat) -> Result<bool, Failure> {
    if beat.revision <= status.revision {
        return Ok(false);
    }
    let (status, beat) = (&status.status, &beat.heartbeat);
    for (what, told, beaten) in [
        ("device id", &status.device_id, &beat.device_id),
        ("boot id", &status.boot_id, &beat.boot_id),
        ("digest", &status.exe_sha256, &beat.exe_sha256),
    ] {
        if told != beaten {
            bail_guest!(
                "the agent's heartbeat has the {what} {beaten}, but its last status has {told}";
                "the agent must build its heartbeats from the same facts as its statuses; check who else writes them"
            );
        }
    }
    for (what, told, beaten) in [
        ("number", status.sequence + 1, beat.sequence),
        ("desired revision", status.desired_revision, beat.desired_revision),
        ("uptime", status.uptime_seconds, beat.uptime_seconds),
    ] {
        if beaten < told {
            bail_guest!(
                "the agent's heartbeat has the {what} {beaten} after a status that needs at least {told}";
                "read the agent's journal in the report's directory for why it started again"
            );
        }
    }
    Ok(true)
}

/// Returns an error unless the answer has the line that the workload of the deployment prints when it starts as this
/// generation.
pub(crate) fn replied_logs(reply: &Reply, name: &str, generation: u64) -> Result<(), Failure> {
    let expected = format!("\"generation\":{generation},");
    match reply {
        Reply::Logs { deployment, lines, .. }
            if deployment == name && lines.iter().any(|line| line.contains(&expected)) =>
        {
            Ok(())
        }
        other => bail_guest!(
            "the command logs of the deployment {name} was answered without the output of its program: {other:?}";
            "the agent must return the last lines of the container of the deployment"
        ),
    }
}

/// Returns the distribution that a status names.
pub(crate) fn os_release(seen: &ReceivedStatus) -> OsReleaseReport {
    let agent_protocol::OsRelease { id, version_id, .. } = &seen.status.os_release;
    OsReleaseReport { id: id.clone(), version_id: version_id.clone() }
}

/// Returns the parts of a status that the report keeps.
pub(crate) fn evidence(seen: &ReceivedStatus) -> StatusEvidence {
    StatusEvidence {
        boot_id: seen.status.boot_id.clone(),
        kv_revision: seen.revision,
        exe_sha256: seen.status.exe_sha256.clone(),
        machine: seen.status.machine.clone(),
        agent_version: seen.status.agent_version.clone(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use agent_protocol::{DeviceStatus, Heartbeat, OsRelease};

    pub(crate) fn seen(revision: u64, boot_id: &str) -> ReceivedStatus {
        numbered(revision, boot_id, 1)
    }

    fn numbered(revision: u64, boot_id: &str, sequence: u64) -> ReceivedStatus {
        ReceivedStatus {
            revision,
            status: DeviceStatus {
                schema: 1,
                device_id: "dev".into(),
                agent_version: "0.1.0".into(),
                exe_sha256: "aa".into(),
                boot_id: boot_id.into(),
                machine: "aarch64".into(),
                os_release: OsRelease { id: "debian".into(), version_id: "12".into() },
                kernel: "6.1".into(),
                uptime_seconds: 9,
                sequence,
                desired_revision: 0,
                deployments: Vec::new(),
                following_error: None,
                foreign_containers: 0,
                disk_free_mib: None,
                deployments_omitted: 0,
                events: Vec::new(),
                footprint: None,
            },
        }
    }

    fn expected() -> ExpectedStatus {
        ExpectedStatus {
            machine: "aarch64",
            exe_sha256: "aa".into(),
            os_release: Some(OsReleaseReport { id: "debian".into(), version_id: "12".into() }),
        }
    }

    pub(crate) fn refuted<T: std::fmt::Debug>(judgement: Result<T, Failure>) -> String {
        judgement.unwrap_err().to_string()
    }

    #[test]
    fn a_join_needs_the_machine_the_digest_and_the_distribution() {
        assert!(join(&seen(1, "b1"), &expected()).unwrap());
        let mut wrong = seen(1, "b1");
        wrong.status.machine = "x86_64".into();
        assert!(refuted(join(&wrong, &expected())).contains("runs on x86_64"));
        let mut wrong = seen(1, "b1");
        wrong.status.exe_sha256 = "bb".into();
        assert!(refuted(join(&wrong, &expected())).contains("digest bb"));
        let mut wrong = seen(1, "b1");
        wrong.status.os_release.version_id = "13".into();
        assert!(refuted(join(&wrong, &expected())).contains("debian 13"));
    }

    #[test]
    fn a_rejoin_needs_a_higher_revision_and_a_new_boot() {
        let joined = evidence(&seen(3, "b1"));
        let last = numbered(7, "b1", 5);
        let check = |revision, boot, sequence| {
            rejoin(&numbered(revision, boot, sequence), &expected(), &joined, &last)
        };
        assert!(!check(7, "b1", 5).unwrap(), "stored before the cut");
        assert!(!check(7, "b2", 1).unwrap());
        assert!(!check(8, "b1", 6).unwrap(), "under way when the power went");
        assert!(refuted(check(8, "b1", 1)).contains("still reports the boot id b1"));
        assert!(check(8, "b2", 1).unwrap());
    }

    #[test]
    fn a_reply_is_of_the_agent_that_joined_and_of_the_deployment() {
        let (joined, status) = (evidence(&seen(3, "b1")), seen(4, "b1").status);
        let reply = |status: DeviceStatus| Reply::Status { status: Box::new(status) };
        assert!(replied_status(&reply(status.clone()), "dev", &joined).is_ok());
        for changed in [
            DeviceStatus { device_id: "other".into(), ..status.clone() },
            DeviceStatus { boot_id: "b0".into(), ..status.clone() },
            DeviceStatus { exe_sha256: "bb".into(), ..status },
        ] {
            assert!(refuted(replied_status(&reply(changed), "dev", &joined)).contains("command status"));
        }
        let logs = |deployment: &str, line: &str| Reply::Logs {
            deployment: deployment.into(),
            lines: vec![line.into()],
            truncated: false,
        };
        let line = "{\"machine\":\"aarch64\",\"boot_id\":\"b1\",\"generation\":2,\"starts\":3}";
        assert!(replied_logs(&logs("a", line), "a", 2).is_ok());
        assert!(refuted(replied_logs(&logs("b", line), "a", 2)).contains("command logs"));
        assert!(replied_logs(&logs("a", line), "a", 1).is_err(), "the output of an earlier container");
        assert!(replied_logs(&logs("a", "exec format error"), "a", 2).is_err());
    }

    #[test]
    fn a_process_continues_its_sequence() {
        let first = numbered(7, "b1", 5);
        for (later, continued) in [
            (numbered(8, "b1", 6), true),
            (numbered(7, "b1", 5), true),
            (numbered(8, "b1", 1), false),
            (numbered(8, "b2", 1), true),
        ] {
            assert_eq!(continues(&first, &later).is_ok(), continued, "{later:?}");
        }
    }

    #[test]
    fn a_heartbeat_continues_the_status_before_it() {
        let mut told = numbered(7, "b1", 5);
        told.status.desired_revision = 4;
        let beat = |revision, change: fn(&mut Heartbeat)| {
            let mut heartbeat = Heartbeat { sequence: 6, ..told.status.clone().into() };
            change(&mut heartbeat);
            beats(&told, &ReceivedHeartbeat { revision, heartbeat })
        };
        assert!(beat(8, |_| ()).unwrap());
        assert!(!beat(6, |beat| beat.boot_id = "b0".into()).unwrap(), "it is older than the status");
        for (change, words) in [
            ((|beat| beat.boot_id = "b0".into()) as fn(&mut Heartbeat), "the boot id b0"),
            (|beat| beat.exe_sha256 = "bb".into(), "the digest bb"),
            (|beat| beat.device_id = "other".into(), "the device id other"),
            (|beat| beat.sequence = 5, "the number 5"),
            (|beat| beat.desired_revision = 3, "the desired revision 3"),
            (|beat| beat.uptime_seconds = 8, "the uptime 8"),
        ] {
            let error = refuted(beat(8, change));
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_ping_needs_the_same_boot_of_the_same_device() {
        let joined = evidence(&seen(3, "b1"));
        let answer = |device: &str, boot: &str| Reply::Pong {
            device_id: device.into(),
            boot_id: boot.into(),
            agent_version: "0.1.0".into(),
        };
        assert!(pong(&answer("dev", "b1"), "dev", &joined).is_ok());
        assert!(pong(&answer("dev", "b0"), "dev", &joined).is_err());
        assert!(pong(&answer("other", "b1"), "dev", &joined).is_err());
        assert!(
            pong(&Reply::UnknownCommand { command: "ping".into(), known: vec![] }, "dev", &joined).is_err()
        );
    }
}
