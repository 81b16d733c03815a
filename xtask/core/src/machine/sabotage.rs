//! Faults that are planted in the guest around the agent and never in it: drop-ins of its unit, and a proxy in front of
//! its podman. They are shell scripts, which [`super::seed::provision_script`] runs before or after the installer.

use crate::cli::Sabotage;

/// Returns the script that runs before the installer, and the script that runs after it.
pub(super) fn scripts(fault: Option<Sabotage>) -> (&'static str, &'static str) {
    match fault {
        Some(Sabotage::UnitNotEnabled) => ("", "systemctl disable iot-agent.service; sync"),
        Some(Sabotage::StaleBootId) => (STALE_BOOT_ID, ""),
        Some(Sabotage::LosesState) => (LOSES_STATE, ""),
        Some(Sabotage::WaitsForBus) => (WAITS_FOR_BUS, ""),
        Some(Sabotage::IgnoresDeletes) => ("", IGNORES_DELETES),
        _ => ("", ""),
    }
}

/// The agent's service sees a file with the id of the first boot in place of the kernel's boot id.
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

/// This imitates an agent that connects to the bus before it reads its disk.
const WAITS_FOR_BUS: &str = "\
mkdir -p /etc/systemd/system/iot-agent.service.d
bus=$(sed -n 's|.*nats://\\([^:]*\\):\\([0-9]*\\)\".*|/dev/tcp/\\1/\\2|p' \"$here/config.toml\")
cat > /etc/systemd/system/iot-agent.service.d/sabotage.conf <<END
[Service]
TimeoutStartSec=infinity
ExecStartPre=/bin/bash -c 'until (exec 3<>$bus) 2>/dev/null; do sleep 1; done'
END
sync";

/// Podman's own socket moves aside, and a proxy listens in its place. The proxy does not start again at the next boot.
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
