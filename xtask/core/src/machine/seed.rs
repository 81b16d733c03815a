//! The cloud-init NoCloud seed and the script that provisions the guest, as text.
//!
//! JSON is valid YAML. cloud-init's documents are therefore written by a JSON serialiser, and no value needs manual
//! quoting.

use serde_json::json;

use super::proxies::Proxies;
use super::{PAYLOAD_DEVICE, durability, registry, sabotage};
use crate::cli::{AgentFault, DurabilityFault, Sabotage};

/// The volume label of the seed (cloud-init, NoCloud).
pub const SEED_LABEL: &str = "CIDATA";
/// The volume label of the payload.
pub const PAYLOAD_LABEL: &str = "IOTAGENT";

/// The file in the guest with the faults that it had before the agent was installed, one per line: the names of failed
/// units, the kernel's messages without their times, and the paths of core dumps.
pub const BASELINE: &str = "/var/lib/iot-xtask.baseline";

/// The command that lists the kernel's messages about an oops, a process killed for lack of memory, a process that has
/// crashed, and a failure of a file system or a disk. It omits lockups, because a host that stops an emulated guest for
/// 20 s causes one.
pub const LIST_KERNEL_FAULTS: &str = "dmesg --notime | grep -E '^(Internal error: )?Oops|^BUG: [^w]|Out of memory|oom-kill|\
                                      segfault at|EXT4-fs error|Remounting filesystem|I/O error'";

/// The command that lists the core dumps of the guest: those of systemd-coredump, and those of Ubuntu's apport.
pub const LIST_CORE_DUMPS: &str =
    "find /var/lib/systemd/coredump /var/crash -type f \\( -name 'core*' -o -name '*.crash' \\) 2> /dev/null";

/// The files of the service that runs the commands of the smoke as root: its unit and its script. Unlike ssh, the
/// service needs neither the network nor a login, and it works while the root file system is read-only.
const ROOT_SERVICE: [(&str, &str); 2] = [
    ("/etc/systemd/system/iot-xtask-root.service", include_str!("iot-xtask-root.service")),
    ("/usr/local/sbin/iot-xtask-root", include_str!("iot-xtask-root.sh")),
];

/// The lines that the guest prints on [`MARKER_PORT`] and on its console. They show its progress without a network.
pub mod marker {
    /// Userspace is up, and cloud-init's last stage runs.
    pub const STARTED: &str = "iot-xtask: provision started";
    /// The agent is installed.
    pub const DONE: &str = "iot-xtask: provision done";
    /// The installation of the agent failed; the reason follows.
    pub const FAILED: &str = "iot-xtask: provision failed:";
    /// A machine that is to become a snapshot lacks a prerequisite of the agent; the reason follows.
    pub const LACKS: &str = "iot-xtask: prerequisites failed:";
    /// The clock of a restored machine was set to this host's time; the number of seconds by which it was behind
    /// follows.
    pub const CLOCK: &str = "iot-xtask: clock was behind by";
    /// A restored machine has installed the keys of this run.
    pub const KEYS: &str = "iot-xtask: keys taken";
    /// The first boot is over, and the machine waits for its payload.
    pub const IDLE: &str = "iot-xtask: first boot done";
    /// A part of the last line that cloud-init itself prints.
    pub const CLOUD_INIT_FINISHED: &str = " finished at ";
}

/// The values of one run in the seed.
#[derive(Debug)]
pub struct Seed<'a> {
    /// The instance id of cloud-init. cloud-init treats a boot with a new id as a first boot.
    pub instance_id: &'a str,
    /// The login user of ssh. It is the image's own user, which cloud-init creates.
    pub login_user: &'a str,
    /// The public key that is accepted for that user.
    pub authorized_key: &'a str,
    /// The private host key of the guest. It is made for this run, so that ssh can verify the guest.
    pub host_private_key: &'a str,
    pub host_public_key: &'a str,
    /// The fault to plant.
    pub sabotage: Option<Sabotage>,
    pub payload: PayloadTime,
    /// The proxies of this host.
    pub proxies: &'a Proxies,
    /// The MAC address of the network card.
    pub mac: &'a str,
}

/// The time at which the guest gets a payload to install.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PayloadTime {
    /// There is no payload, as in a bare boot of a benchmark.
    Never,
    /// The payload is present when cloud-init's last stage runs.
    AtFirstBoot,
    /// The payload comes after the first boot, as the new content of its disk. A machine that becomes a snapshot waits
    /// for it.
    Awaited,
}

impl Seed<'_> {
    /// Returns the name and the content of each file of the seed.
    pub fn files(&self) -> [(&'static str, String); 3] {
        [
            ("user-data", format!("#cloud-config\n{:#}\n", self.user_data())),
            ("meta-data", format!("{:#}\n", json!({ "instance-id": self.instance_id }))),
            ("network-config", format!("{:#}\n", network_config(self.mac))),
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
            // This host knows the host keys because it made them. Their output would cost an emulated guest one
            // second.
            "ssh": { "emit_keys_to_console": false },
            "no_ssh_fingerprints": true,
        });
        let file = |(path, content): (&str, &str)| json!({ "path": path, "content": content });
        let mut files: Vec<_> = ROOT_SERVICE.map(file).into();
        let root_service = json!(["systemctl", "enable", "--now", "--quiet", "iot-xtask-root.service"]);
        match self.payload {
            PayloadTime::Never => files.clear(),
            PayloadTime::AtFirstBoot => {
                let device = format!("LABEL={PAYLOAD_LABEL}");
                document["runcmd"] = json!([root_service, ["sh", "-c", mount_and_provision(&device)]]);
            }
            // The unit is transient, so it does not survive the power cut, and cloud-init does not wait for it.
            PayloadTime::Awaited => {
                let in_directory = |(name, content): (&str, _)| {
                    file((&format!("{PREREQUISITES_DIRECTORY}/{name}"), content))
                };
                files.extend(PREREQUISITES.map(in_directory));
                document["runcmd"] = json!([
                    root_service,
                    ["systemd-run", "--quiet", "--unit=iot-payload", "sh", "-c", await_payload()]
                ]);
            }
        }
        let proxies = self.proxies.files();
        files.extend(
            proxies.iter().map(
                |(path, content, appends)| json!({ "path": path, "content": content, "append": appends }),
            ),
        );
        if !files.is_empty() {
            document["write_files"] = json!(files);
        }
        if self.sabotage == Some(Sabotage::KernelPanic) {
            document["bootcmd"] = json!([["sh", "-c", "echo c > /proc/sysrq-trigger"]]);
        }
        document
    }
}

/// Returns the network configuration: DHCP on the only network card. The card is matched by its address, because
/// cloud-init 22.4 supports a match by name only with netplan.
fn network_config(mac: &str) -> serde_json::Value {
    json!({
        "version": 2,
        "ethernets": { "nic0": { "match": { "macaddress": mac }, "dhcp4": true } },
    })
}

/// The script that checks and installs the prerequisites of the agent, and the files that the script needs. It runs
/// once before the snapshot is saved. A restored machine therefore does not fetch packages with a wrong clock, and
/// does not wait for podman's first start.
const PREREQUISITES: [(&str, &str); 10] = [
    ("prerequisites.sh", include_str!("../../../../agent/dist/prerequisites.sh")),
    ("check-host.sh", include_str!("../../../../agent/dist/check-host.sh")),
    ("iot-agent.sysusers", include_str!("../../../../agent/dist/iot-agent.sysusers")),
    ("iot-agent.tmpfiles", include_str!("../../../../agent/dist/iot-agent.tmpfiles")),
    ("iot-podman.socket", include_str!("../../../../agent/dist/iot-podman.socket")),
    ("iot-podman.service", include_str!("../../../../agent/dist/iot-podman.service")),
    ("iot-user.conf", include_str!("../../../../agent/dist/iot-user.conf")),
    ("containers.conf", include_str!("../../../../agent/dist/containers.conf")),
    ("storage.conf", include_str!("../../../../agent/dist/storage.conf")),
    ("readahead.sh", include_str!("../../../../agent/dist/readahead.sh")),
];
/// The directory of these files in the guest. It is in memory, so a power cut deletes it.
const PREREQUISITES_DIRECTORY: &str = "/run/iot-prerequisites";

/// Returns the script that finishes the first boot, installs the agent's prerequisites and then waits for the payload.
/// The script checks that podman answers, and reads podman's files into memory.
///
/// The machine is saved while the script polls the payload's disk. It is later restored with the payload on that disk.
/// Each poll reads the disk again: opening a block device drops its page cache if no other process has it open. The
/// first line of the empty disk is empty, and the first line of a FAT volume is not.
fn await_payload() -> String {
    format!(
        "{SAY}; systemctl is-system-running --wait > /dev/null; cloud-init status --wait > /dev/null; \
         said=$({{ sh {directory}/prerequisites.sh && systemctl start user@$(id -u iot-agent).service \
         && podman --url unix:///run/iot-agent/podman.sock version && sh {directory}/readahead.sh; }} 2>&1) \
         || {{ say \"{lacks} $(echo \"$said\" | tail -n 3 | tr '\\n' ' ')\"; exit 1; }}; \
         sync; say '{idle}'; \
         until {{ read -r first < {PAYLOAD_DEVICE}; [ -n \"$first\" ]; }}; do sleep 0.1; done; {then}",
        directory = PREREQUISITES_DIRECTORY,
        idle = marker::IDLE,
        lacks = marker::LACKS,
        then = mount_and_provision(PAYLOAD_DEVICE),
    )
}

/// Defines the shell function that prints a marker. The function also prints it on the serial console, for a kernel
/// without virtio-serial. The function contains no `${`, which systemd-run would expand.
const SAY: &str = "say() { if [ -c /dev/virtio-ports/iot-xtask.markers ]; then echo \"$1\" > /dev/virtio-ports/iot-xtask.markers; fi; \
                   echo \"$1\" > /dev/console; }";

fn mount_and_provision(device: &str) -> String {
    format!(
        "{SAY}; say '{started}'; mkdir -p /run/iot-payload; \
         mount -o ro {device} /run/iot-payload && sh /run/iot-payload/provision.sh \
         || say '{failed} the payload disk does not mount'",
        started = marker::STARTED,
        failed = marker::FAILED,
    )
}

/// A fault that is planted in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlantedFault {
    /// A fault that a smoke must find.
    Smoke(Sabotage),
    /// A fault that crash states must show.
    Durability(DurabilityFault),
    /// A fault that episodes must show.
    Agent(AgentFault),
}

/// Returns the script on the payload. The script runs the agent's own installer in the guest and prints the outcome on
/// the console. For a machine without the agent, the script instead adds the lines `apt_sources` to apt's sources. The
/// script installs the keys of the run in both cases. `registries` is podman's configuration for a registry of the run.
pub fn provision_script(
    fault: Option<PlantedFault>,
    registries: Option<&str>,
    restored: Option<Restored<'_>>,
    apt_sources: Option<&[String]>,
) -> String {
    let (before, planted) = match fault {
        None => (String::new(), String::new()),
        Some(PlantedFault::Smoke(fault)) => sabotage::scripts(fault),
        Some(PlantedFault::Durability(fault)) => (durability::script(fault), String::new()),
        Some(PlantedFault::Agent(fault)) => (sabotage::of_agent(fault), String::new()),
    };
    let before = registries.map(registry::trust).unwrap_or_default() + &before;
    // A restored machine gets the keys of this run even if the installation fails, so that a user can still log in.
    let keys = restored.map_or_else(|| "true".to_owned(), |restored| restored.keys());
    let began = if restored.is_some() { "\nread -r began _ < /proc/uptime" } else { "" };
    let clock = restored.map_or_else(|| "true".to_owned(), |restored| restored.clock());
    format!(
        "#!/bin/sh\n\
         # Runs once in the guest: installs the agent and prints the outcome on the console.\n\
         {SAY}\n\
         here=${{0%/*}}{began}\n\
         own_keys() {{\n{keys}\n}}\n\
         # A later boot is no first boot, so it need not wait for cloud-init (cloud-init, \"how to disable\").\n\
         true > /etc/cloud/cloud-init.disabled\n\
         {{ systemctl list-units --state=failed --plain --no-legend --no-pager | cut -d ' ' -f 1\n\
         {LIST_KERNEL_FAULTS}\n\
         {LIST_CORE_DUMPS}; }} > {BASELINE}\n\
         {before}\n\
         if output=$({install} 2>&1); then\n\
         \x20 # Root has no containers to restart or update, so a boot need not wait for these units. They still start on request.\n\
         \x20 wants=/etc/systemd/system/default.target.wants\n\
         \x20 rm -f $wants/podman.service $wants/podman-restart.service $wants/podman-auto-update.service\n\
         \x20 sync\n\
         \x20 {planted}\n\
         \x20 {clock}\n\
         \x20 say '{done}'\n\
         \x20 own_keys\n\
         else\n\
         \x20 own_keys\n\
         \x20 say \"{failed} $(echo \"$output\" | tail -n 3 | tr '\\n' ' ')\"\n\
         fi\n",
        install = apt_sources.map_or("sh \"$here/install.sh\"".to_owned(), add_sources),
        done = marker::DONE,
        failed = marker::FAILED,
    )
}

/// Returns the command that adds lines to apt's sources. An image that was built from packages has no sources.
fn add_sources(lines: &[String]) -> String {
    if lines.is_empty() {
        return "true".to_owned();
    }
    let lines: Vec<_> = lines.iter().map(|line| format!("'{}'", line.replace('\'', r"'\''"))).collect();
    format!("printf '%s\\n' {} > /etc/apt/sources.list.d/iot-xtask.list", lines.join(" "))
}

/// The values that a run sets in a machine that was saved after its first boot.
#[derive(Debug, Clone, Copy)]
pub struct Restored<'a> {
    /// The login user of ssh.
    pub login_user: &'a str,
    /// The time by this host's clock, in seconds since the epoch.
    pub now: u64,
}

impl Restored<'_> {
    /// Returns the script that installs the keys of this run in place of those of the run that made the snapshot.
    fn keys(self) -> String {
        format!(
            "install -m 0600 \"$here/host_key\" /etc/ssh/ssh_host_ed25519_key\n\
             install -m 0644 \"$here/host_key.pub\" /etc/ssh/ssh_host_ed25519_key.pub\n\
             home=$(getent passwd {user} | cut -d: -f6)\n\
             install -o {user} -m 0600 \"$here/user_key.pub\" \"$home/.ssh/authorized_keys\"\n\
             sync\n\
             systemctl restart ssh.service\n\
             say '{keys}'",
            user = self.login_user,
            keys = marker::KEYS,
        )
    }

    /// Returns the script that sets the clock. After a restore, the guest's clock shows the time at which the machine
    /// was saved. Once the agent runs, the script sets the clock to this host's time. The clock of a device without a
    /// battery jumps in the same way. The clock is then wrong by the duration of the restore, one or two seconds.
    fn clock(self) -> String {
        format!(
            "read -r uptime _ < /proc/uptime\n\
             \x20 now=$(({now} + ${{uptime%.*}} - ${{began%.*}})); behind=$((now - $(date +%s)))\n\
             \x20 date --utc --set=@$now > /dev/null && say \"{clock} $behind s\"",
            now = self.now,
            clock = marker::CLOCK,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{MARKER_PORT, ROOT_PORT};

    fn seed(sabotage: Option<Sabotage>) -> Seed<'static> {
        Seed {
            instance_id: "1122-101500-0a0b",
            login_user: "ubuntu",
            authorized_key: "ssh-ed25519 AAAA user",
            host_private_key: "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n-----END OPENSSH PRIVATE KEY-----\n",
            host_public_key: "ssh-ed25519 BBBB host",
            sabotage,
            payload: PayloadTime::AtFirstBoot,
            proxies: Box::leak(Box::default()),
            mac: crate::machine::GUEST_MAC,
        }
    }

    #[test]
    fn golden_seed() {
        for (name, content) in seed(None).files() {
            crate::golden::compare(&format!("seed-{name}"), content);
        }
        let script = |restored, sources| provision_script(None, None, restored, sources);
        crate::golden::compare("seed-provision.sh", script(None, None));
        let restored = Restored { login_user: "ubuntu", now: 1_800_000_000 };
        crate::golden::compare("seed-provision-restored.sh", script(Some(restored), None));
        let awaited = Seed { payload: PayloadTime::Awaited, ..seed(None) };
        let [(_, user_data), ..] = awaited.files();
        crate::golden::compare("seed-user-data-awaited", user_data);
        let proxies = Proxies::of(|name| (name == "http_proxy").then(|| "http://127.0.0.1:3128".to_owned()));
        let [(_, user_data), ..] = Seed { proxies: &proxies, ..seed(None) }.files();
        crate::golden::compare("seed-user-data-proxies", user_data);
        let sources = ["deb http://mirror/debian it's main".to_owned()];
        crate::golden::compare("seed-provision-bare.sh", script(None, Some(&sources)));
        assert!(!await_payload().contains("${"), "systemd-run would expand it");
        assert!(SAY.contains(MARKER_PORT) && ROOT_SERVICE[1].1.contains(ROOT_PORT));
    }

    #[test]
    fn a_fault_is_planted_only_where_asked() {
        let user_data = |sabotage| seed(sabotage).files()[0].1.clone();
        let smoke = |fault| Some(PlantedFault::Smoke(fault));
        assert!(!user_data(None).contains("sysrq"));
        assert!(user_data(Some(Sabotage::KernelPanic)).contains("sysrq"));
        let script = |fault| provision_script(fault, None, None, None);
        assert!(!script(None).contains("systemctl disable"));
        assert!(script(smoke(Sabotage::UnitNotEnabled)).contains("systemctl disable"));
        assert!(script(smoke(Sabotage::StaleBootId)).contains("sabotage/boot_id"));
        let faults = [Sabotage::LosesState, Sabotage::WaitsForBus, Sabotage::IgnoresDeletes];
        for (fault, words) in
            faults.into_iter().zip(["rm -f /var/lib/iot-agent/state", "/dev/tcp/", "ignore_deletes.py"])
        {
            assert!(script(smoke(fault)).contains(words), "{fault:?}");
        }
    }

    #[test]
    fn podman_trusts_a_registry_of_the_run_before_the_agent_is_installed() {
        let fault = Some(PlantedFault::Durability(DurabilityFault::PullWithoutSync));
        let registries = "[[registry]]\nlocation = \"10.0.2.2:5000\"\n";
        let script = provision_script(fault, Some(registries), None, None);
        assert!(script.contains("systemctl --user stop iot-podman.service"));
        let place = |words: &str| script.find(words).unwrap_or_else(|| panic!("{words}: {script}"));
        let file = place(&format!("registries.conf.d/90-iot-xtask.conf <<'END'\n{registries}END\nsync\n"));
        assert!(file < place("plant.conf") && place("plant.conf") < place("install.sh"));
        assert!(!provision_script(fault, None, None, None).contains("registries"));
    }
}
