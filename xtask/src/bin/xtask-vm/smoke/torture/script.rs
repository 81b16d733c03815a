//! The script of wishes that the device fulfils while the writes of its disk are recorded. Each wish, and each
//! acknowledgement of the agent, is noted with its position in the log of the writes.

use std::path::PathBuf;
use std::time::Duration;

use agent_protocol::{Deployment, Document};
use anyhow::{Context, Result};
use xtask_core::bail_guest;
use xtask_core::build::Agent;
use xtask_core::cli::DurabilityFault;
use xtask_core::digest::Algorithm;
use xtask_core::machine::durability::PLANTED_BUNDLE;
use xtask_core::report::WorkloadEvidence;
use xtask_crash::completed_entries;
use xtask_judge::{Event, EventKind, Recording, Wish};

use super::super::deployed::ExpectedAnswer;
use super::super::proof::{Deployed, Proof};
use super::super::running::RunningVm;
use super::super::workload::{EPHEMERAL, PERSISTENT, PROBATION_SECONDS, RETIRED, document_with};
use super::of_host;
use crate::guest::workload::IMAGE;

/// The deployments of the script.
const DEPLOYMENTS: [Deployed; 3] = [PERSISTENT, EPHEMERAL, RETIRED];
/// The directory in the guest with the bundle that is installed over the running agent. It is in memory, so its files
/// are not recorded.
const BUNDLE: &str = "/run/torture";
/// The last line of the output of an installation that succeeded.
const INSTALLED: &str = "installed";
/// The command that lists the images of the agent's podman, also those without a name. The last line tells that the list
/// is complete.
const LIST_IMAGES: &str = "podman --url unix:///run/iot-agent/podman.sock images --all \
                           --format '{{.Repository}}:{{.Tag}}' 2>&1 && echo listed";

/// The executables that the script installs.
pub(super) struct Agents {
    pub(super) tested: Agent,
    /// The agent under test with a byte after its last section. The loader ignores the byte, and the digest differs.
    pub(super) upgrade: Agent,
}

impl Agents {
    pub(super) fn of(tested: &Agent) -> Self {
        let content = [tested.content.as_slice(), b"\n"].concat();
        let sha256 = Algorithm::Sha256.of(&content).hex().to_owned();
        Self { tested: tested.clone(), upgrade: Agent { content, sha256, ..tested.clone() } }
    }

    /// Returns the executable with this digest, or the one under test.
    pub(super) fn with_digest(&self, sha256: Option<&str>) -> &Agent {
        if sha256 == Some(&self.upgrade.sha256) { &self.upgrade } else { &self.tested }
    }
}

/// The last wish for a deployment.
#[derive(Debug, Clone)]
pub(super) struct LastWish {
    pub(super) deployed: Deployed,
    pub(super) generation: u64,
    pub(super) revision: u64,
    /// The reference of the image that the deployment runs; `None` if the deployment was deleted or purged.
    pub(super) image: Option<String>,
}

/// Returns the reference of the image in the document of a wish.
fn image_of(wish: &Wish) -> Option<String> {
    let Deployment::PodmanContainer(spec) = Document::parse(wish.document()?.as_bytes()).ok()?.deployment;
    Some(spec.image)
}

/// Returns the last wish for each deployment of a recording.
pub(super) fn last_wishes(recording: &Recording) -> Vec<LastWish> {
    let of = |deployed: Deployed| {
        let mut last = None;
        for event in &recording.events {
            let EventKind::Desired { name, revision, wish } = &event.kind else { continue };
            if name == deployed.name {
                let before = last.as_ref().map_or(0, |last: &LastWish| last.generation);
                // Each document has the next generation.
                let generation = before + u64::from(matches!(wish, Wish::Put(_)));
                last = Some(LastWish { deployed, generation, revision: *revision, image: image_of(wish) });
            }
        }
        last
    };
    DEPLOYMENTS.into_iter().filter_map(of).collect()
}

/// The values that a script needs besides the machine.
pub(super) struct Setting {
    /// The log of the writes.
    pub(super) log: PathBuf,
    /// The output of `uname -m` on the machine.
    pub(super) machine: String,
    pub(super) plant: Option<DurabilityFault>,
    /// The reference of the image that the registry has.
    pub(super) pulled: String,
}

/// The script while it runs, and the recording that it makes.
pub(super) struct Script<'a, 'p> {
    vm: &'a mut RunningVm,
    proof: &'a mut Proof<'p>,
    setting: Setting,
    recording: Recording,
}

impl<'a, 'p> Script<'a, 'p> {
    /// Begins with a device that has joined. Its agent under test was installed while the writes were recorded.
    pub(super) fn new(
        vm: &'a mut RunningVm,
        proof: &'a mut Proof<'p>,
        recording: Recording,
        setting: Setting,
    ) -> Result<Self> {
        let sha256 = proof.tested_digest().to_owned();
        let mut script = Self { vm, proof, setting, recording };
        let began = EventKind::InstallBegan { sha256: sha256.clone() };
        script.recording.events.push(Event { position: 0, kind: began });
        script.note(EventKind::Installed { sha256 })?;
        Ok(script)
    }

    /// Runs the whole script.
    pub(super) fn run(mut self, agents: &Agents) -> Result<Recording> {
        let pulled = self.setting.pulled.clone();
        for deployed in DEPLOYMENTS {
            self.put(deployed, IMAGE)?;
        }
        self.all_run()?;
        self.put(PERSISTENT, IMAGE)?;
        self.delete(RETIRED)?;
        self.all_run()?;
        self.restart_agent()?;
        self.purge(EPHEMERAL)?;
        self.put(RETIRED, IMAGE)?;
        self.install(&agents.upgrade)?;
        self.put(PERSISTENT, IMAGE)?;
        self.all_run()?;
        // The next deployment needs the image of the registry. The installation interrupts its download.
        self.delete(PERSISTENT)?;
        self.delete(RETIRED)?;
        self.has_deleted(IMAGE)?;
        self.put(EPHEMERAL, &pulled)?;
        self.install(&agents.tested)?;
        // The image of the archive was deleted, so it is loaded again.
        self.put(PERSISTENT, IMAGE)?;
        self.all_run()?;
        self.delete(EPHEMERAL)?;
        self.has_deleted(&pulled)?;
        self.put(EPHEMERAL, &pulled)?;
        self.all_run()?;
        Ok(self.recording)
    }

    /// Notes an event that has just been observed.
    fn note(&mut self, kind: EventKind) -> Result<()> {
        let position = self.position()?;
        self.recording.events.push(Event { position, kind });
        Ok(())
    }

    fn position(&self) -> Result<usize> {
        let entries = completed_entries(&self.setting.log)
            .map_err(|error| of_host(error, "read the recorded writes"))?;
        usize::try_from(entries).context("the log has too many entries")
    }

    /// Returns the number of documents that a deployment has had.
    fn generation(&self, deployed: Deployed) -> u64 {
        let wishes = last_wishes(&self.recording);
        wishes.iter().find(|last| last.deployed.name == deployed.name).map_or(0, |last| last.generation)
    }

    /// Puts the next generation of a deployment, which runs the image of this reference.
    fn put(&mut self, deployed: Deployed, image: &str) -> Result<()> {
        let document = document_with(image, self.generation(deployed) + 1, deployed.port, PROBATION_SECONDS);
        let text = String::from_utf8_lossy(&document.to_bytes()).into_owned();
        self.wish(deployed, Wish::Put(text), |vm| vm.broker.desire(deployed.name, &document))
    }

    fn delete(&mut self, deployed: Deployed) -> Result<()> {
        self.wish(deployed, Wish::Delete, |vm| vm.broker.desire_no_more(deployed.name))
    }

    fn purge(&mut self, deployed: Deployed) -> Result<()> {
        self.wish(deployed, Wish::Purge, |vm| vm.broker.purge(deployed.name))
    }

    /// Sends a wish, and waits until the agent acknowledges it.
    fn wish(
        &mut self,
        deployed: Deployed,
        wish: Wish,
        send: impl FnOnce(&RunningVm) -> Result<u64>,
    ) -> Result<()> {
        // The wish may reach the disk as soon as it is sent.
        let position = self.position()?;
        let revision = send(self.vm)?;
        let kind = EventKind::Desired { name: deployed.name.to_owned(), revision, wish };
        self.recording.events.push(Event { position, kind });
        self.proof.acknowledges(self.vm, revision)?;
        self.note(EventKind::Acknowledged { revision })
    }

    /// Waits until each deployment runs as it was desired last, and answers.
    fn all_run(&mut self) -> Result<()> {
        for wish in last_wishes(&self.recording) {
            let Some(reference) = wish.image else {
                self.proof.is_gone(self.vm, wish.deployed, wish.revision)?;
                continue;
            };
            self.proof.runs(self.vm, wish.deployed, wish.revision)?;
            let wanted =
                ExpectedAnswer { machine: &self.setting.machine, generation: wish.generation, before: None };
            let WorkloadEvidence { generation, starts, .. } =
                self.proof.answers(self.vm, wish.deployed, &wanted)?;
            let deployment = wish.deployed.name.to_owned();
            self.note(EventKind::Answered { deployment, generation, starts })?;
            self.note(EventKind::Loaded { reference })?;
        }
        Ok(())
    }

    /// Waits until the agent has deleted an image that no deployment needs any more.
    fn has_deleted(&mut self, reference: &str) -> Result<()> {
        let (deadline, limit) =
            (self.vm.deadline.within(self.vm.plan.limits.convergence()), self.vm.plan.limits.guest_command());
        self.vm.wait_until(deadline, &format!("the agent to delete the image {reference}"), |vm| {
            Ok(is_deleted(&vm.run_as_root(LIST_IMAGES, limit)?, reference).then_some(()))
        })
    }

    fn restart_agent(&mut self) -> Result<()> {
        let limit = self.vm.plan.limits.guest_command();
        self.as_root("systemctl restart iot-agent.service && echo restarted", "restarted", limit)
    }

    /// Installs a bundle with this executable over the running agent.
    fn install(&mut self, agent: &Agent) -> Result<()> {
        let sha256 = agent.sha256.clone();
        let from = match self.setting.plant {
            Some(DurabilityFault::InstallerInPlace) => PLANTED_BUNDLE,
            _ => "/run/iot-payload",
        };
        let upgrade = if agent.sha256 == self.proof.tested_digest() { "" } else { "echo >> iot-agent; " };
        let command = format!(
            "rm -rf {BUNDLE}; cp -r {from} {BUNDLE}; cd {BUNDLE}; {upgrade}\
             sh install.sh > log 2>&1 && echo {INSTALLED} || tail -n 3 log; rm -rf {BUNDLE}"
        );
        self.note(EventKind::InstallBegan { sha256: sha256.clone() })?;
        self.as_root(&command, INSTALLED, self.vm.plan.limits.provision())?;
        self.note(EventKind::Installed { sha256 })
    }

    /// Runs a command as root in the guest, whose output must be `wanted`.
    fn as_root(&mut self, command: &str, wanted: &str, limit: Duration) -> Result<()> {
        let output = self.vm.run_as_root(command, limit)?;
        if output.trim() != wanted {
            bail_guest!(
                "the command {command:?} of the script failed in the guest: {:?}", output.trim();
                "read journal.log and console.log for the reason"
            );
        }
        Ok(())
    }
}

/// Returns whether the output of [`LIST_IMAGES`] is complete and has neither the image nor one that has lost its name.
fn is_deleted(output: &str, reference: &str) -> bool {
    let (listed, images) =
        output.trim().rsplit_once('\n').map_or((output.trim(), ""), |(images, last)| (last, images));
    listed == "listed" && !images.lines().any(|image| image == reference || image.contains("<none>"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn an_image_is_deleted_once_the_whole_list_lacks_it() {
        let pulled = "10.0.2.2:5000/iot-workload:1";
        for (output, deleted) in [
            ("listed\n", true),
            ("localhost/iot-workload:1\nlisted\n", true),
            ("", false),
            ("localhost/iot-workload:1\n", false),
            ("Cannot connect to Podman\n", false),
            ("localhost/iot-workload:1\n10.0.2.2:5000/iot-workload:1\nlisted\n", false),
            ("<none>:<none>\nlisted\n", false),
        ] {
            assert_eq!(is_deleted(output, pulled), deleted, "{output:?}");
        }
    }

    #[test]
    fn the_last_wish_for_a_deployment_has_its_image_and_generation() {
        let put = |image, generation| {
            let document = document_with(image, generation, PERSISTENT.port, PROBATION_SECONDS);
            Wish::Put(String::from_utf8(document.to_bytes()).unwrap())
        };
        let wishes = [
            (PERSISTENT, put(IMAGE, 1)),
            (EPHEMERAL, put(IMAGE, 1)),
            (PERSISTENT, Wish::Delete),
            (EPHEMERAL, Wish::Purge),
            (PERSISTENT, put("r:5000/w:1", 2)),
        ];
        let event = |(revision, (deployed, wish)): (u64, (Deployed, Wish))| {
            let kind = EventKind::Desired { name: deployed.name.to_owned(), revision, wish };
            Event { position: 0, kind }
        };
        let recording = Recording {
            device_id: String::new(),
            executables: BTreeMap::new(),
            files: Vec::new(),
            images: BTreeMap::new(),
            events: (1..).zip(wishes).map(event).collect(),
        };
        let last: Vec<_> = last_wishes(&recording)
            .into_iter()
            .map(|wish| (wish.deployed.name, wish.generation, wish.revision, wish.image))
            .collect();
        let expected = [(PERSISTENT.name, 2, 5, Some("r:5000/w:1".to_owned())), (EPHEMERAL.name, 1, 4, None)];
        assert_eq!(last, expected);
    }
}
