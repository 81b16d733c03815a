//! The configuration with which the guest's podman pulls from the registry of a run.

/// Returns the commands that add a file to podman's configuration of registries (containers-registries.conf.d(5)). The
/// file is on the disk before the agent is installed. A podman that runs in a restored machine does not read it again.
/// Podman's service has a child, which outlives it while a request waits.
pub(super) fn trust(configuration: &str) -> String {
    let directory = "/etc/containers/registries.conf.d";
    format!(
        "mkdir -p {directory}\ncat > {directory}/90-iot-xtask.conf <<'END'\n{configuration}END\nsync\n\
         if uid=$(id -u iot-agent 2> /dev/null); then\n\
         \x20 runuser -u iot-agent -- env XDG_RUNTIME_DIR=/run/user/$uid systemctl --user stop iot-podman.service\n\
         \x20 pkill --signal KILL --uid $uid --exact podman\n\
         fi\n"
    )
}
