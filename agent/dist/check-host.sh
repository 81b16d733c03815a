#!/bin/sh
# Checks whether podman can run containers for the agent's user. prerequisites.sh runs it after podman is installed. The
# exit code is 1 if no container can run. The optional argument replaces the root directory in tests.
set -eu
root=${1-}
failed=0

# The agent uses version 4.0.0 of podman's API.
version=$(dpkg-query --show --showformat '${Version}' podman)
if [ "${version%%.*}" -lt 4 ]; then
    echo "podman $version is too old: the agent needs podman 4 or newer, as in Debian 12 and Ubuntu 24.04" >&2
    failed=1
fi

# Ubuntu 23.10 and newer allow user namespaces only to programs with a profile (apparmor.d(5), `userns`).
restriction=$root/proc/sys/kernel/apparmor_restrict_unprivileged_userns
if [ -e "$restriction" ] && [ "$(cat "$restriction")" = 1 ] &&
    ! grep -q '^podman ' "$root/sys/kernel/security/apparmor/profiles"; then
    echo "AppArmor allows podman no user namespace, because its profile is not loaded: install the package apparmor" \
        "with /etc/apparmor.d/podman, or set kernel.apparmor_restrict_unprivileged_userns=0 (sysctl.d(5))" >&2
    failed=1
fi

# The firmware of a Raspberry Pi passes cgroup_disable=memory to the kernel (raspberrypi/linux#6980).
if ! grep -qw memory "$root/sys/fs/cgroup/cgroup.controllers"; then
    echo "warning: this kernel has no memory controller, so deployments with limits.memory_mib are refused (or run" \
        "without the limit, see without_memory_limits in the agent's README.md): append cgroup_enable=memory to the" \
        "kernel's command line (/boot/firmware/cmdline.txt) and reboot" >&2
fi
exit "$failed"
