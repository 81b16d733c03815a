//! The faults that are planted in the guest. They change the agent's surroundings and never the agent: drop-ins of its
//! unit, other units, and a proxy in front of its podman. They are shell scripts, which
//! [`super::seed::provision_script`] runs before or after the installer.

use crate::cli::Sabotage;

/// Returns the script that runs before the installer, and the script that runs after it.
pub(super) fn scripts(fault: Option<Sabotage>) -> (&'static str, &'static str) {
    match fault {
        Some(Sabotage::UnitNotEnabled) => ("", "systemctl disable iot-agent.service; sync"),
        Some(Sabotage::StaleBootId) => (STALE_BOOT_ID, ""),
        Some(Sabotage::LosesState) => (LOSES_STATE, ""),
        Some(Sabotage::WaitsForBus) => (WAITS_FOR_BUS, ""),
        Some(Sabotage::IgnoresDeletes) => ("", IGNORES_DELETES),
        Some(Sabotage::CrashLoop) => (CRASH_LOOP, ""),
        Some(Sabotage::ForgetsDeletions) => (FORGETS_DELETIONS, ""),
        Some(Sabotage::PowersOff) => ("", POWERS_OFF),
        Some(Sabotage::LosesVolume) => ("", LOSES_VOLUME),
        _ => ("", ""),
    }
}

/// This script shows the agent's service a file with the id of the first boot in place of the kernel's boot id.
const STALE_BOOT_ID: &str = "\
mkdir -p /etc/systemd/system/iot-agent.service.d /var/lib/sabotage
cat /proc/sys/kernel/random/boot_id > /var/lib/sabotage/boot_id
printf '[Service]\\nProtectKernelTunables=no\\nBindReadOnlyPaths=/var/lib/sabotage/boot_id:/proc/sys/kernel/random/boot_id\\n' \
> /etc/systemd/system/iot-agent.service.d/sabotage.conf
sync";

const LOSES_STATE: &str = "\
mkdir -p /etc/systemd/system/iot-agent.service.d
cat > /etc/systemd/system/iot-agent.service.d/sabotage.conf <<'END'
[Service]
ExecStartPre=/bin/sh -c 'rm -f /var/lib/iot-agent/state*'
END
sync";

/// This script makes systemd end the service 8 s after each start, and then start it again.
const CRASH_LOOP: &str = "\
mkdir -p /etc/systemd/system/iot-agent.service.d
printf '[Service]\\nRuntimeMaxSec=8\\n' > /etc/systemd/system/iot-agent.service.d/sabotage.conf
sync";

/// This script keeps a copy of the agent's last state in which the deployment `retired` was desired. The copy replaces
/// the state before the next start of the agent.
const FORGETS_DELETIONS: &str = "\
mkdir -p /etc/systemd/system/iot-agent.service.d /var/lib/sabotage
cat > /var/lib/sabotage/keep.sh <<'END'
cd /var/lib/sabotage
while sleep 0.1; do
    if grep -q '\"retired\":{[^}]*\"put\"' /var/lib/iot-agent/state; then
        cp -p /var/lib/iot-agent/state state.new && sync state.new && mv state.new state && sync .
    fi
done
END
cat > /etc/systemd/system/iot-agent.service.d/sabotage.conf <<'END'
[Service]
ExecStartPre=+/bin/sh -c 'if [ -e /var/lib/sabotage/state ]; then cp -p /var/lib/sabotage/state /var/lib/iot-agent/state; fi'
END
systemd-run --quiet --unit sabotage sh /var/lib/sabotage/keep.sh
sync";

const POWERS_OFF: &str = "systemd-run --quiet --on-active=4 systemctl poweroff --force";

/// This script makes the agent's unit delete the start counter in the workload's volume before each start of the
/// agent. The first start finds no counter.
const LOSES_VOLUME: &str = "\
mkdir -p /etc/systemd/system/iot-agent.service.d
cat > /etc/systemd/system/iot-agent.service.d/sabotage.conf <<'END'
[Service]
ExecStartPre=+/bin/sh -c 'find /var/lib/iot-agent -path \"*/_data/starts\" -delete'
END
sync";

/// This script imitates an agent that connects to the bus before it reads its disk.
const WAITS_FOR_BUS: &str = "\
mkdir -p /etc/systemd/system/iot-agent.service.d
bus=$(sed -n 's|.*nats://\\([^:]*\\):\\([0-9]*\\)\".*|/dev/tcp/\\1/\\2|p' \"$here/config.toml\")
cat > /etc/systemd/system/iot-agent.service.d/sabotage.conf <<END
[Service]
TimeoutStartSec=infinity
ExecStartPre=/bin/bash -c 'until (exec 3<>$bus) 2>/dev/null; do sleep 1; done'
END
sync";

/// This script moves podman's own socket, and starts a proxy that listens in its place. The proxy does not start again
/// at the next boot.
const IGNORES_DELETES: &str = concat!(
    "\
mkdir -p /etc/systemd/user/iot-podman.socket.d /var/lib/sabotage
printf '[Socket]\\nListenStream=\\nListenStream=/run/iot-agent/real.sock\\n' > /etc/systemd/user/iot-podman.socket.d/sabotage.conf
cat > /var/lib/sabotage/ignore_deletes.py <<'END'
",
    include_str!("ignore_deletes.py"),
    "\
END
of_user=\"runuser -u iot-agent -- env XDG_RUNTIME_DIR=/run/user/$(id -u iot-agent) systemctl --user\"
$of_user daemon-reload; $of_user stop iot-podman.service iot-podman.socket; $of_user start iot-podman.socket
rm -f /run/iot-agent/podman.sock
systemd-run --unit sabotage --uid iot-agent --property UMask=0077 python3 /var/lib/sabotage/ignore_deletes.py"
);
