#!/bin/sh
# Runs in the guest, once: installs the agent and says on the console how that ended.
here=${0%/*}
own_keys() {
true
}
# Later boots are not first ones, and need not wait until cloud-init has seen that (cloud-init, "how to disable").
true > /etc/cloud/cloud-init.disabled

if output=$(sh "$here/install.sh" 2>&1); then
  # Nor until podman has looked for containers of root's to restart and to update: it has none. Asked for, it still starts.
  wants=/etc/systemd/system/default.target.wants
  rm -f $wants/podman.service $wants/podman-restart.service $wants/podman-auto-update.service
  sync
  
  true
  echo 'iot-xtask: provision done' > /dev/console
  own_keys
else
  own_keys
  echo "iot-xtask: provision failed: $(echo "$output" | tail -n 3 | tr '\n' ' ')" > /dev/console
fi
