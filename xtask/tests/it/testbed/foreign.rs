//! Things of others on a host, and a comparable description of everything there that is not ours.

use std::collections::BTreeMap;

use super::namespaces::done;
use super::virsh::Virsh;
use crate::scratch::command;

/// The word in the XML of each of our domains.
const OUR_WORD: &str = "iot-xtask";
/// The beginning of the name of each of our volumes.
const OUR_VOLUMES: &str = "iot-xtask-";

/// What a host has that is not ours: a line for each property, by the kind and the name of the thing.
pub(crate) type Fingerprint = BTreeMap<String, String>;

/// A machine that executes nothing: its processor is never started.
const RUNNING: &str = "<domain type='qemu'><name>foreign-on</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
    <os><type arch='x86_64' machine='pc'>hvm</type></os><devices><serial type='pty'/></devices></domain>";

const NETWORK: &str = "<network><name>foreign-net</name><bridge name='virbr8'/>\
    <ip address='192.168.128.1' netmask='255.255.255.0'/></network>";

impl Virsh<'_> {
    /// Defines something by its XML, which is written to the test's directory.
    #[track_caller]
    pub(crate) fn define(&self, verb: &str, xml: &str) {
        let path = self.testbed.path().join("defined.xml");
        std::fs::write(&path, xml).unwrap();
        self.run(&[&format!("{verb} {}", path.display())]);
    }

    /// Gives the user's session the pool `default`, below the home directory, unless it has one. A new session has no
    /// pool.
    pub(crate) fn add_session_pool(&self) {
        if self.names("pool-list --all --name").iter().all(|name| name != "default") {
            let define =
                format!("pool-define-as default dir --target {}/images", self.testbed.home().display());
            self.run(&[&define, "pool-build default", "pool-start default"]);
        }
    }

    /// Adds things of others: a domain that is shut off, with its disk, a paused domain, and a volume with content in
    /// the pool `default`. The system's libvirtd also gets a network. A session has no networks of its own. It gets
    /// the pool, too.
    pub(crate) fn add_foreign(&self) {
        if self.is_session {
            self.add_session_pool();
        } else {
            self.define("net-define", NETWORK);
            self.run(&["net-start foreign-net"]);
        }
        let content = self.testbed.path().join("content");
        std::fs::write(&content, "the content of a foreign volume\n".repeat(1000)).unwrap();
        for name in ["foreign.img", "foreign-off.img"] {
            self.run(&[
                &format!("vol-create-as default {name} 1M --allocation 0"),
                &format!("vol-upload {name} {} --pool default", content.display()),
            ]);
        }
        let off = RUNNING.replace("foreign-on", "foreign-off").replace(
            "<devices>",
            "<devices><disk type='volume'><driver name='qemu' type='raw'/>\
             <source pool='default' volume='foreign-off.img'/><target dev='vda' bus='virtio'/></disk>",
        );
        self.define("define", &off);
        self.define("define", RUNNING);
        self.run(&["start foreign-on --paused"]);
    }

    /// Returns a description of all domains, pools, volumes and networks that are not ours, with the digests of the
    /// volumes.
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        let (_, domains) = self.domains();
        let mut questions = Vec::new();
        for name in &domains {
            for words in ["dumpxml", "dumpxml --inactive", "domstate --reason", "snapshot-list"] {
                questions.push((format!("domain {name}: {words}"), format!("{words} {name}")));
            }
        }
        // A session's libvirtd may not start networks.
        let networks = if self.is_session { Vec::new() } else { self.names("net-list --all --name") };
        for name in networks {
            for words in ["net-dumpxml", "net-dumpxml --inactive", "net-info"] {
                questions.push((format!("network {name}: {words}"), format!("{words} {name}")));
            }
        }
        for name in self.names("pool-list --all --name") {
            questions.push((format!("pool {name}"), format!("pool-info {name}")));
        }
        let mut found = self.answers(&questions);
        for text in found.iter_mut().filter(|(name, _)| name.starts_with("pool ")).map(|(_, text)| text) {
            // A volume of ours changes the pool's allocation.
            let is_size =
                |line: &&str| ["Capacity:", "Allocation:", "Available:"].contains(&first_word(line));
            *text = text.lines().filter(|line| !is_size(line)).collect::<Vec<_>>().join("\n");
        }
        let starts = self.names("list --all --autostart --name");
        for name in domains {
            found.insert(format!("domain {name}: autostart"), starts.contains(&name).to_string());
        }
        found.extend(self.digests());
        found
    }

    /// Returns the names of our domains and of the others.
    fn domains(&self) -> (Vec<String>, Vec<String>) {
        let names = self.names("list --all --name");
        let questions: Vec<_> = names.iter().map(|name| (name.clone(), format!("dumpxml {name}"))).collect();
        let xml = self.answers(&questions);
        names.into_iter().partition(|name| xml[name].contains(OUR_WORD))
    }

    /// Returns the digest of each volume that is not ours.
    fn digests(&self) -> Fingerprint {
        let volumes: Vec<_> =
            self.volumes().into_iter().filter(|(_, name, _)| !name.starts_with(OUR_VOLUMES)).collect();
        if volumes.is_empty() {
            return Fingerprint::new();
        }
        let sums = done(
            &mut self.testbed.here(command("sha256sum", &[]).args(volumes.iter().map(|(.., path)| path))),
        );
        let labels = volumes.iter().map(|(pool, name, _)| format!("volume {pool}/{name}: sha256"));
        labels.zip(sums.lines().map(|line| first_word(line).to_owned())).collect()
    }

    /// Returns all domains and volumes of ours, sorted: `domain NAME` and `volume POOL/NAME`.
    pub(crate) fn ours(&self) -> Vec<String> {
        let mut ours: Vec<_> = self.domains().0.into_iter().map(|name| format!("domain {name}")).collect();
        let volumes = self.volumes().into_iter().filter(|(_, name, _)| name.starts_with(OUR_VOLUMES));
        ours.extend(volumes.map(|(pool, name, _)| format!("volume {pool}/{name}")));
        ours.sort();
        ours
    }
}

fn first_word(line: &str) -> &str {
    line.split_whitespace().next().unwrap_or_default()
}
