#!/bin/sh
# What the agent needs of the distribution's packages, where it is not there: podman and, for a user's own, newuidmap. Ubuntu's cloud
# image has neither. As root; install.sh runs it, and whoever prepares a device without the agent may.
set -eu
if ! command -v podman || ! command -v newuidmap; then
    export DEBIAN_FRONTEND=noninteractive
    # The distribution's own updater may have apt's locks soon after a boot; only dpkg's can be waited for by an option.
    tries=24
    until apt-get update; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ]
        sleep 5
    done
    apt-get -o DPkg::Lock::Timeout=120 install --yes podman uidmap dbus-user-session
fi
