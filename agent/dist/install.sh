#!/bin/sh
# Installs the agent from the directory of this script, which also holds: iot-agent, iot-agent.service,
# iot-agent.sysusers, config.toml. As root. Ends with the service enabled, running, and on disk: what a power cut
# may follow at once is synced.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

install -D -m 0755 "$here/iot-agent" /usr/local/bin/iot-agent
install -D -m 0644 "$here/iot-agent.service" /etc/systemd/system/iot-agent.service
install -D -m 0644 "$here/iot-agent.sysusers" /etc/sysusers.d/iot-agent.conf
install -d -m 0700 /etc/iot-agent
install -m 0600 "$here/config.toml" /etc/iot-agent/config.toml

/usr/local/bin/iot-agent check-config /etc/iot-agent/config.toml
systemd-sysusers /etc/sysusers.d/iot-agent.conf
systemctl daemon-reload
systemctl enable iot-agent.service
# restart: an upgrade must not leave the old executable running.
systemctl restart iot-agent.service
sync
