//! The faults that are planted in the guest. They change the agent's surroundings and never the agent: drop-ins of its
//! unit, other units, and a proxy in front of its podman. They are shell scripts, which
//! [`super::seed::provision_script`] runs before or after the installer.

use crate::cli::{AgentFault, Sabotage};
use crate::format::name_of;

/// Returns the script that runs before the installer, and the script that runs after it.
pub(super) fn scripts(fault: Sabotage) -> (String, String) {
    let before = |script: &str| (script.to_owned(), String::new());
    let after = |script: &str| (String::new(), script.to_owned());
    match fault {
        Sabotage::UnitNotEnabled => after("systemctl disable iot-agent.service; sync"),
        Sabotage::StaleBootId => before(STALE_BOOT_ID),
        Sabotage::LosesState => before(LOSES_STATE),
        Sabotage::WaitsForBus => before(WAITS_FOR_BUS),
        Sabotage::IgnoresDeletes => after(IGNORES_DELETES),
        Sabotage::CrashLoop => before(CRASH_LOOP),
        Sabotage::ForgetsDeletions => before(FORGETS_DELETIONS),
        Sabotage::NoFsync => before(NO_FSYNC),
        Sabotage::PowersOff => after(POWERS_OFF),
        Sabotage::LosesVolume => before(LOSES_VOLUME),
        Sabotage::LosesBus
        | Sabotage::WatchesOnlyNew
        | Sabotage::DeafAfterRejoin
        | Sabotage::StaleHeartbeat => before(&behind_proxy(&name_of(&fault))),
        Sabotage::ForgedStatus => after(FORGED_STATUS),
        Sabotage::Recreates => after(&at_later_boots(RECREATES)),
        Sabotage::RebootsItself => after(&at_later_boots(REBOOTS_ITSELF)),
        Sabotage::NoMemoryCgroup => after(NO_MEMORY_CGROUP),
        Sabotage::ReadOnlyRoot => after(&at_later_boots(READ_ONLY_ROOT)),
        // These faults are planted on the host.
        Sabotage::OtherDigest
        | Sabotage::KernelPanic
        | Sabotage::KillQemu
        | Sabotage::BrokerRefuses
        | Sabotage::ForeignImage
        | Sabotage::SmallPages
        | Sabotage::OpenNetwork
        | Sabotage::StaleChain
        | Sabotage::ColdPanics => (String::new(), String::new()),
    }
}

/// Returns the script that runs before the installer.
pub(super) fn of_agent(fault: AgentFault) -> String {
    match fault {
        AgentFault::StopsWithoutBus => at_each_boot(STOPS_WITHOUT_BUS),
        _ => behind_proxy(&name_of(&fault)),
    }
}

/// Returns a script that makes a service of `commands`, and starts it.
fn at_each_boot(commands: &str) -> String {
    format!("{}\nsystemctl start --no-block sabotage.service", at_later_boots(commands))
}

/// Returns a script that makes a service of `commands`. The service starts at each later boot, and not in this one.
fn at_later_boots(commands: &str) -> String {
    format!(
        "mkdir -p /var/lib/sabotage\ncat > /var/lib/sabotage/run.sh <<'END'\n{commands}\nEND\n\
         cat > /etc/systemd/system/sabotage.service <<'END'\n\
         [Service]\nExecStart=/bin/bash /var/lib/sabotage/run.sh\n[Install]\nWantedBy=multi-user.target\nEND\n\
         systemctl enable --quiet sabotage.service\nsync"
    )
}

/// Returns a script that puts a proxy with the planted fault `fault` between the agent and the broker. The installer
/// gets a configuration with the address of the proxy, which speaks TLS with the broker alone.
fn behind_proxy(fault: &str) -> String {
    let proxy = include_str!("bus_proxy.py");
    format!(
        "mkdir -p /var/lib/sabotage\ncp -r \"$here\" /run/sabotaged\nhere=/run/sabotaged\n\
         cp \"$here/secrets/ca.pem\" /var/lib/sabotage/\n\
         bus=$(sed -n 's|.*tls://\\([^:]*\\):\\([0-9]*\\)\".*|\\1 \\2|p' \"$here/config.toml\")\n\
         sed -i 's|tls://[^\"]*|nats://127.0.0.1:4333|; /^ca_file/d' \"$here/config.toml\"\n\
         cat > /var/lib/sabotage/bus_proxy.py <<'END'\n{proxy}END\n\
         cat > /etc/systemd/system/sabotage.service <<END\n\
         [Service]\nExecStart=/usr/bin/python3 /var/lib/sabotage/bus_proxy.py $bus {fault}\n\
         [Install]\nWantedBy=multi-user.target\nEND\n\
         systemctl enable --quiet --now sabotage.service\nsync"
    )
}

/// These commands first wait until the agent is connected to the bus, and then run `$commands`.
macro_rules! once_connected {
    ($commands:literal) => {
        concat!(
            "until grep -q '\"connected\": true' /run/iot-agent/status.json; do sleep 0.1; done\n",
            $commands
        )
    };
}

/// These commands delete the agent's containers every half minute. The agent makes them again.
const RECREATES: &str = "\
while sleep 30; do
    podman --url unix:///run/iot-agent/podman.sock rm --all --force --time 0
done";

/// These commands stop the agent's containers whenever the agent has lost the bus. The agent starts them again.
const STOPS_WITHOUT_BUS: &str = once_connected!(
    "\
while sleep 0.5; do
    if grep -q '\"connected\": false' /run/iot-agent/status.json; then
        podman --url unix:///run/iot-agent/podman.sock stop --all --time 0
        until grep -q '\"connected\": true' /run/iot-agent/status.json; do sleep 0.1; done
    fi
done"
);

/// These commands reboot the guest once after it has joined again.
const REBOOTS_ITSELF: &str = once_connected!(
    "\
if [ ! -e /var/lib/sabotage/rebooted ]; then
    touch /var/lib/sabotage/rebooted
    sync
    echo b > /proc/sysrq-trigger
fi"
);

/// These commands make all file systems read-only, as the kernel does after an error (proc(5), sysrq-trigger).
const READ_ONLY_ROOT: &str = once_connected!("echo u > /proc/sysrq-trigger");

/// With this script, those of the agent's system calls that wait for the disk return at once. Podman's calls still
/// wait. The drop-in replaces the list of allowed system calls, because an exception to such a list cannot return
/// success.
const NO_FSYNC: &str = "\
mkdir -p /etc/systemd/system/iot-agent.service.d
printf '[Service]\\nSystemCallFilter=\\nSystemCallFilter=~fsync:0 fdatasync:0 syncfs:0 sync:0 sync_file_range:0\\n' \
> /etc/systemd/system/iot-agent.service.d/sabotage.conf
sync";

/// This script stops the agent for good and starts a program that writes the device's status in its place.
const FORGED_STATUS: &str = concat!(
    "\
mkdir -p /var/lib/sabotage
systemctl disable --now --quiet iot-agent.service
cat > /var/lib/sabotage/forge_status.py <<'END'
",
    include_str!("forge_status.py"),
    "\
END
systemd-run --quiet --unit sabotage python3 /var/lib/sabotage/forge_status.py /etc/iot-agent/config.toml"
);

/// This script replaces the kernel's boot id, as the agent's service sees it, with the id of the first boot.
const STALE_BOOT_ID: &str = "\
mkdir -p /etc/systemd/system/iot-agent.service.d /var/lib/sabotage
cat /proc/sys/kernel/random/boot_id > /var/lib/sabotage/boot_id
printf '[Service]\\nProtectKernelTunables=no\\nBindReadOnlyPaths=/var/lib/sabotage/boot_id:/proc/sys/kernel/random/boot_id\\n' \
> /etc/systemd/system/iot-agent.service.d/sabotage.conf
sync";

/// With this script, the slice of the agent's user passes no memory controller on. For podman's containers, this is as
/// if the kernel had none, and it needs no boot.
const NO_MEMORY_CGROUP: &str = "\
uid=$(id -u iot-agent)
mkdir -p /etc/systemd/system/user-$uid.slice.d
printf '[Slice]\\nDisableControllers=memory\\n' > /etc/systemd/system/user-$uid.slice.d/sabotage.conf
systemctl daemon-reload
systemctl stop user@$uid.service user-$uid.slice
systemctl start user@$uid.service
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

/// This script powers the guest off as soon as the agent has removed a deployment, shortly before the power cut.
const POWERS_OFF: &str = "\
systemd-run --quiet --unit sabotage bash -c \
'until grep -q removed /run/iot-agent/status.json; do sleep 0.1; done; systemctl poweroff --force'";

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
bus=$(sed -n 's|.*tls://\\([^:]*\\):\\([0-9]*\\)\".*|/dev/tcp/\\1/\\2|p' \"$here/config.toml\")
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
