//! The cloud-init NoCloud seed and the script that provisions the guest. Pure text.
//!
//! JSON is YAML, so cloud-init's documents are written by a serialiser and nothing needs quoting by hand.

use serde_json::json;

use super::{GUEST_MAC, PAYLOAD_DEVICE, sabotage};
use crate::cli::Sabotage;

/// The seed's volume label (cloud-init, NoCloud).
pub const SEED_LABEL: &str = "CIDATA";
/// The payload's volume label.
pub const PAYLOAD_LABEL: &str = "IOTAGENT";

/// What the guest prints on its console, each on a line of its own, so that progress is seen without a network.
pub mod marker {
    /// Userspace is up and cloud-init's last stage runs.
    pub const STARTED: &str = "iot-xtask: provision started";
    /// The agent is installed.
    pub const DONE: &str = "iot-xtask: provision done";
    /// It is not; the reason follows.
    pub const FAILED: &str = "iot-xtask: provision failed:";
    /// A snapshot's machine has not got what the agent needs; the reason follows.
    pub const LACKS: &str = "iot-xtask: prerequisites failed:";
    /// A restored machine's clock is this host's; by how many seconds it was behind follows.
    pub const CLOCK: &str = "iot-xtask: clock was behind by";
    /// A restored machine has this run's keys.
    pub const KEYS: &str = "iot-xtask: keys taken";
    /// The first boot is over, and the machine waits for its payload.
    pub const IDLE: &str = "iot-xtask: first boot done";
    /// cloud-init's own last line begins so, behind a time stamp.
    pub const CLOUD_INIT_FINISHED: &str = " finished at ";
}

/// What a seed says about one run.
#[derive(Debug)]
pub struct Seed<'a> {
    /// cloud-init's instance id: a new one is a first boot.
    pub instance_id: &'a str,
    /// Whom ssh enters as: the image's own user, which cloud-init makes.
    pub login_user: &'a str,
    /// The public key that may enter.
    pub authorized_key: &'a str,
    /// The guest's host key, made for this run, so that ssh can check it.
    pub host_private_key: &'a str,
    /// Its public half.
    pub host_public_key: &'a str,
    /// A fault to plant.
    pub sabotage: Option<Sabotage>,
    /// When there is a payload to install.
    pub payload: PayloadTime,
}

/// When the guest has a payload to install.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PayloadTime {
    /// Never: a bare boot of a bench.
    Never,
    /// When cloud-init's last stage runs.
    AtFirstBoot,
    /// When its first boot is over and the disk's content has come: in a snapshot's machine.
    Awaited,
}

impl Seed<'_> {
    /// The seed's files: name and content.
    pub fn files(&self) -> [(&'static str, String); 3] {
        [
            ("user-data", format!("#cloud-config\n{:#}\n", self.user_data())),
            ("meta-data", format!("{:#}\n", json!({ "instance-id": self.instance_id }))),
            ("network-config", format!("{:#}\n", network_config())),
        ]
    }

    fn user_data(&self) -> serde_json::Value {
        let mut document = json!({
            "hostname": "iot-device",
            "ssh_pwauth": false,
            "disable_root": true,
            "users": [{
                "name": self.login_user,
                "shell": "/bin/bash",
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "lock_passwd": true,
                "ssh_authorized_keys": [self.authorized_key],
            }],
            "ssh_keys": {
                "ed25519_private": self.host_private_key,
                "ed25519_public": self.host_public_key,
            },
            // The host keys are known to whoever made them; printing them costs an emulated guest a second.
            "ssh": { "emit_keys_to_console": false },
            "no_ssh_fingerprints": true,
        });
        match self.payload {
            PayloadTime::Never => {}
            PayloadTime::AtFirstBoot => {
                let device = format!("LABEL={PAYLOAD_LABEL}");
                document["runcmd"] = json!([["sh", "-c", mount_and_provision(&device)]]);
            }
            // In memory alone: nothing of it outlives the power cut, and cloud-init does not wait for it.
            PayloadTime::Awaited => {
                let file = |(name, content): &(&str, &str)| json!({ "path": format!("{PREREQUISITES_DIRECTORY}/{name}"), "content": content });
                document["write_files"] = PREREQUISITES.iter().map(file).collect();
                document["runcmd"] =
                    json!([["systemd-run", "--quiet", "--unit=iot-payload", "sh", "-c", await_payload()]]);
            }
        }
        if self.sabotage == Some(Sabotage::KernelPanic) {
            document["bootcmd"] = json!([["sh", "-c", "echo c > /proc/sysrq-trigger"]]);
        }
        document
    }
}

/// DHCP on the one card. By address: cloud-init 22.4 renders a match by name for netplan alone.
fn network_config() -> serde_json::Value {
    json!({
        "version": 2,
        "ethernets": { "nic0": { "match": { "macaddress": GUEST_MAC }, "dhcp4": true } },
    })
}

/// What the agent's installer asks for first, with the files that it needs: done in a snapshot once, so that no restored machine fetches
/// packages with the clock of then, or waits for podman's first start.
const PREREQUISITES: [(&str, &str); 9] = [
    ("prerequisites.sh", include_str!("../../../../agent/dist/prerequisites.sh")),
    ("iot-agent.sysusers", include_str!("../../../../agent/dist/iot-agent.sysusers")),
    ("iot-agent.tmpfiles", include_str!("../../../../agent/dist/iot-agent.tmpfiles")),
    ("iot-podman.socket", include_str!("../../../../agent/dist/iot-podman.socket")),
    ("iot-podman.service", include_str!("../../../../agent/dist/iot-podman.service")),
    ("iot-user.conf", include_str!("../../../../agent/dist/iot-user.conf")),
    ("containers.conf", include_str!("../../../../agent/dist/containers.conf")),
    ("storage.conf", include_str!("../../../../agent/dist/storage.conf")),
    ("readahead.sh", include_str!("../../../../agent/dist/readahead.sh")),
];
/// Where they are, while the machine is up.
const PREREQUISITES_DIRECTORY: &str = "/run/iot-prerequisites";

/// The first boot to its end, and what the agent needs: podman answers, and is in memory. Then the disk is looked at again and again, which
/// costs nobody anything: the machine is saved in this loop, and restored with the content there. Who opens a disk that nobody has open reads
/// it anew. The first line of the disk that is there for now is empty, and that of a FAT volume is not.
fn await_payload() -> String {
    format!(
        "systemctl is-system-running --wait > /dev/null; cloud-init status --wait > /dev/null; \
         said=$({{ sh {directory}/prerequisites.sh && systemctl start user@$(id -u iot-agent).service \
         && podman --url unix:///run/iot-agent/podman.sock version && sh {directory}/readahead.sh; }} 2>&1) \
         || {{ echo \"{lacks} $(echo \"$said\" | tail -n 3 | tr '\\n' ' ')\" > /dev/console; exit 1; }}; \
         sync; echo '{idle}' > /dev/console; \
         until {{ read -r first < {PAYLOAD_DEVICE}; [ -n \"$first\" ]; }}; do sleep 0.1; done; {then}",
        directory = PREREQUISITES_DIRECTORY,
        idle = marker::IDLE,
        lacks = marker::LACKS,
        then = mount_and_provision(PAYLOAD_DEVICE),
    )
}

fn mount_and_provision(device: &str) -> String {
    format!(
        "echo '{started}' > /dev/console; mkdir -p /run/iot-payload; \
         mount -o ro {device} /run/iot-payload && sh /run/iot-payload/provision.sh \
         || echo '{failed} the payload disk does not mount' > /dev/console",
        started = marker::STARTED,
        failed = marker::FAILED,
    )
}

/// What runs in the guest, from the payload: the agent's own installer, its outcome said on the console.
/// Without an installation it has the run's own keys put in place, and no more.
pub fn provision_script(
    sabotage: Option<Sabotage>,
    restored: Option<Restored<'_>>,
    installs: bool,
) -> String {
    let (before, planted) = sabotage::scripts(sabotage);
    // A restored machine's own keys: where the installation fails somebody has to enter it, too.
    let keys = restored.map_or_else(|| "true".to_owned(), |restored| restored.keys());
    let began = if restored.is_some() { "\nread -r began _ < /proc/uptime" } else { "" };
    let clock = restored.map_or_else(|| "true".to_owned(), |restored| restored.clock());
    format!(
        "#!/bin/sh\n\
         # Runs in the guest, once: installs the agent and says on the console how that ended.\n\
         here=${{0%/*}}{began}\n\
         own_keys() {{\n{keys}\n}}\n\
         # Later boots are not first ones, and need not wait until cloud-init has seen that (cloud-init, \"how to disable\").\n\
         true > /etc/cloud/cloud-init.disabled\n\
         {before}\n\
         if output=$({install} 2>&1); then\n\
         \x20 # Nor until podman has looked for containers of root's to restart and to update: it has none. Asked for, it still starts.\n\
         \x20 wants=/etc/systemd/system/default.target.wants\n\
         \x20 rm -f $wants/podman.service $wants/podman-restart.service $wants/podman-auto-update.service\n\
         \x20 sync\n\
         \x20 {planted}\n\
         \x20 {clock}\n\
         \x20 echo '{done}' > /dev/console\n\
         \x20 own_keys\n\
         else\n\
         \x20 own_keys\n\
         \x20 echo \"{failed} $(echo \"$output\" | tail -n 3 | tr '\\n' ' ')\" > /dev/console\n\
         fi\n",
        install = if installs { "sh \"$here/install.sh\"" } else { "true" },
        done = marker::DONE,
        failed = marker::FAILED,
    )
}

/// A machine that was saved after its first boot: what this run gives it of its own.
#[derive(Debug, Clone, Copy)]
pub struct Restored<'a> {
    /// Whom ssh enters as.
    pub login_user: &'a str,
    /// Seconds since the epoch, as this host has them.
    pub now: u64,
}

impl Restored<'_> {
    /// The run's own keys in the place of those that the snapshot's machine was made with.
    fn keys(self) -> String {
        format!(
            "install -m 0600 \"$here/host_key\" /etc/ssh/ssh_host_ed25519_key\n\
             install -m 0644 \"$here/host_key.pub\" /etc/ssh/ssh_host_ed25519_key.pub\n\
             home=$(getent passwd {user} | cut -d: -f6)\n\
             install -o {user} -m 0600 \"$here/user_key.pub\" \"$home/.ssh/authorized_keys\"\n\
             sync\n\
             systemctl restart ssh.service\n\
             echo '{keys}' > /dev/console",
            user = self.login_user,
            keys = marker::KEYS,
        )
    }

    /// The guest goes on where it was saved: its clock jumps once its agent runs, as a device's without a battery does, to this host's but
    /// for the second or two that the restore took.
    fn clock(self) -> String {
        format!(
            "read -r uptime _ < /proc/uptime\n\
             \x20 now=$(({now} + ${{uptime%.*}} - ${{began%.*}})); behind=$((now - $(date +%s)))\n\
             \x20 date --utc --set=@$now > /dev/null && echo \"{clock} $behind s\" > /dev/console",
            now = self.now,
            clock = marker::CLOCK,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seed(sabotage: Option<Sabotage>) -> Seed<'static> {
        Seed {
            instance_id: "1122-101500-0a0b",
            login_user: "ubuntu",
            authorized_key: "ssh-ed25519 AAAA user",
            host_private_key: "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n-----END OPENSSH PRIVATE KEY-----\n",
            host_public_key: "ssh-ed25519 BBBB host",
            sabotage,
            payload: PayloadTime::AtFirstBoot,
        }
    }

    #[test]
    fn golden_seed() {
        for (name, content) in seed(None).files() {
            crate::golden::compare(&format!("seed-{name}"), content);
        }
        crate::golden::compare("seed-provision.sh", provision_script(None, None, true));
        let restored = Restored { login_user: "ubuntu", now: 1_800_000_000 };
        crate::golden::compare("seed-provision-restored.sh", provision_script(None, Some(restored), true));
        let awaited = Seed { payload: PayloadTime::Awaited, ..seed(None) };
        let [(_, user_data), ..] = awaited.files();
        crate::golden::compare("seed-user-data-awaited", user_data);
        assert!(!await_payload().contains("${"), "systemd-run would expand it");
    }

    #[test]
    fn a_fault_is_planted_only_where_asked() {
        let user_data = |sabotage| seed(sabotage).files()[0].1.clone();
        assert!(!user_data(None).contains("sysrq"));
        assert!(user_data(Some(Sabotage::KernelPanic)).contains("sysrq"));
        assert!(!provision_script(None, None, true).contains("systemctl disable"));
        assert!(provision_script(Some(Sabotage::UnitNotEnabled), None, true).contains("systemctl disable"));
        assert!(provision_script(Some(Sabotage::StaleBootId), None, true).contains("sabotage/boot_id"));
        let faults = [Sabotage::LosesState, Sabotage::WaitsForBus, Sabotage::IgnoresDeletes];
        for (fault, words) in
            faults.into_iter().zip(["rm -f /var/lib/iot-agent/state", "/dev/tcp/", "ignore_deletes.py"])
        {
            assert!(provision_script(Some(fault), None, true).contains(words), "{fault:?}");
        }
    }
}
