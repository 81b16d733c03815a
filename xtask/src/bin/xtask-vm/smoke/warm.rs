//! Warm machines: a booted guest is restored from a snapshot, which is made first if there is none. The provisioning
//! script in `xtask_core::machine::seed` is the guest's part.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Error, Result};
use xtask_core::bail_host;
use xtask_core::digest::Algorithm;
use xtask_core::error::{self, Kind};
use xtask_core::format::{human_bytes, human_seconds, now_rfc3339};
use xtask_core::machine::seed::{Restored, marker};
use xtask_core::plan::Plan;
use xtask_core::report::EventKind;
use xtask_core::snapshot::{FILES, FILES_ON_DAEMON, Ingredients, Platform, SnapshotManifest, neutral_seed};
use xtask_images::ReadyImage;
use xtask_images::snapshots::{self, Snapshot};

use super::on_daemon::Begun;
use super::prepare::{Access, Prepared, apt_sources, not_started};
use super::run::Run;
use super::running::RunningVm;
use super::target::Driver;
pub(super) use super::used::UsedSnapshot;
use crate::guest::console::Console;
use crate::guest::media::{self, Delivered};
use crate::guest::ssh::Keys;

/// The snapshot that a run wants.
struct Wanted {
    ingredients: Ingredients,
    /// The snapshot, if it exists.
    found: Option<Snapshot>,
    /// The lock of the snapshot's key.
    lock: File,
}

/// The inputs for the machine of a warm run.
pub(super) struct Warm<'a> {
    pub(super) run: &'a Run<'a>,
    pub(super) plan: &'a Plan,
    pub(super) image: &'a ReadyImage,
    pub(super) subject: Delivered<'a>,
}

/// The parts of a machine that exist before its domain starts, in one of the two places of a guest.
pub(super) enum Ground {
    Here(Box<Prepared>),
    Daemon(Box<Begun>),
}

impl Ground {
    pub(super) fn begin(run: &Run<'_>, plan: &Plan) -> Result<Self> {
        Ok(match &plan.place.connect {
            None => Self::Here(Box::new(Prepared::make(run, plan)?)),
            Some(uri) => Self::Daemon(Box::new(Begun::new(uri, run, plan)?)),
        })
    }

    /// Returns the libvirt and the firmware that make and restore a snapshot, or the reason why it is not possible.
    pub(super) fn platform(&mut self, plan: &Plan) -> Result<Platform, String> {
        match self {
            Self::Here(prepared) => Ok(Platform {
                libvirt: prepared.libvirt_version.clone(),
                firmware: plan.own_firmware().map_err(|error| format!("{error:#}"))?.clone(),
                daemon: None,
            }),
            Self::Daemon(begun) => begun.platform(plan),
        }
    }

    /// Removes what the machine has on a daemon. Returns the error because of which the machine is given up.
    fn given_up(self, error: Error) -> Error {
        match self {
            Self::Here(_) => error,
            Self::Daemon(begun) => begun.given_up(error),
        }
    }
}

impl Warm<'_> {
    /// Restores the machine from its snapshot, which is made first if there is none. Returns when the guest sees its
    /// payload.
    pub(super) fn restore<'slot>(
        &self,
        ground: Ground,
        platform: &Platform,
        slot: &'slot mut Option<RunningVm>,
    ) -> Result<(&'slot mut RunningVm, String)> {
        self.restore_or_make(ground, platform, slot).map_err(|error| {
            let hint =
                "see the causes; nothing is known about the agent yet. Use --cold to run without a snapshot";
            error::host_fault(error, "restore the machine from its snapshot", hint)
        })
    }

    fn restore_or_make<'slot>(
        &self,
        ground: Ground,
        platform: &Platform,
        slot: &'slot mut Option<RunningVm>,
    ) -> Result<(&'slot mut RunningVm, String)> {
        let Self { run, plan, .. } = *self;
        let wanted = match self.wanted(platform) {
            Ok(wanted) => wanted,
            Err(error) => return Err(ground.given_up(error)),
        };
        let Wanted { ingredients, found, lock } = wanted;
        let started = Instant::now();
        let (vm, snapshot) = match found {
            Some(snapshot) => (slot.insert(self.restored(ground, &snapshot)?), snapshot),
            None => {
                run.ui.expect(run.times.usual_of_making());
                let made = run.dir.work().join("snapshot");
                let booted = self.first_boot(ground, ingredients.payload_bytes, &made);
                let vm = slot.insert(booted.map_err(not_started)?);
                match self.save_and_restore(vm, &made, ingredients) {
                    Ok(snapshot) => (vm, snapshot),
                    Err(error) => return vm.verify_snapshot(run).and(Err(error)),
                }
            }
        };
        // The lock is held until the run has recorded that it uses the snapshot.
        drop(lock);
        vm.deadline = run.times.deadline();
        let deadline = vm.deadline.within(plan.limits.provision());
        let reached = vm.wait_until(deadline, "the restored guest to see its payload", |vm| {
            Ok(vm.console.line_with(marker::STARTED).map(drop))
        });
        if let Err(error) = reached {
            // If QEMU ended or the guest printed nothing, the snapshot does not restore. The end of the broker is
            // another failure.
            let error = if Kind::Guest.is(&error) { snapshot.does_not_restore(error) } else { error };
            return vm.verify_snapshot(run).and(Err(error));
        }
        let how = if snapshot.manifest.made_by == run.dir.id() {
            format!("made a snapshot of {}, and restored it", human_bytes(snapshot.manifest.bytes()))
        } else {
            let seconds = human_seconds(started.elapsed().as_secs_f64());
            format!("restored in {seconds}{}", vm.snapshot.as_ref().map_or(String::new(), UsedSnapshot::days))
        };
        let detail = format!("{}, {how}", plan.cpu.describe());
        Ok((vm, detail))
    }

    /// Locks the snapshot of this plan's machine, and looks for it.
    fn wanted(&self, platform: &Platform) -> Result<Wanted> {
        let Self { run, plan, image, subject } = *self;
        let content = subject.map_or(0, |(agent, workload)| agent.content.len() + workload.len());
        let store = run.images();
        let digest_of = |path: &Path| store.remembered_digest(path, Algorithm::Sha256);
        let image = (&image.digest, image.disk.as_path());
        let ingredients = Ingredients::of(plan, image, platform, content as u64, digest_of)?;
        let key = ingredients.key(&plan.image.name, plan.spec.architecture);
        // The limit is long enough for another run that makes the snapshot and restores it under the same lock.
        let limit = plan.limits.boot() + plan.provision_limit(true) + plan.limits.provision();
        let asked = Instant::now();
        let lock = snapshots::lock(&run.cache, &key, limit, &run.ui)?;
        run.times.note_wait(asked.elapsed());
        let found = snapshots::find(&run.cache, &key, &ingredients, &run.ui)?;
        Ok(Wanted { ingredients, found, lock })
    }

    /// Restores the machine from an existing snapshot.
    fn restored(&self, ground: Ground, snapshot: &Snapshot) -> Result<RunningVm> {
        let run = self.run;
        let mut used = match UsedSnapshot::begin(run, snapshot, self.subject.is_some()) {
            Ok(used) => used,
            Err(error) => return Err(ground.given_up(error)),
        };
        let restored = match ground {
            Ground::Here(prepared) => self.restored_here(*prepared, snapshot),
            Ground::Daemon(begun) => self.restored_on_daemon(*begun, snapshot),
        };
        match restored {
            Ok(mut vm) => {
                vm.record(EventKind::Boot, "the machine was restored from its snapshot");
                Ok(RunningVm { snapshot: Some(used), ..vm })
            }
            Err(error) => used.finish_verification(run).and(Err(error)),
        }
    }

    /// Starts the machine for a snapshot, with an empty payload disk.
    fn first_boot(&self, ground: Ground, payload_bytes: u64, made: &Path) -> Result<RunningVm> {
        self.run.ui.note("no snapshot of this machine yet: it boots once and is saved after its first boot");
        match ground {
            Ground::Here(prepared) => self.first_boot_here(*prepared, payload_bytes, made),
            Ground::Daemon(begun) => self.first_boot_on_daemon(*begun, payload_bytes, made),
        }
    }

    /// Makes the seed and the empty payload of a machine that becomes a snapshot.
    pub(super) fn make_neutral(&self, keys: &Keys, files: [&Path; 2], payload_bytes: u64) -> Result<()> {
        let Self { run, plan, .. } = *self;
        let [seed, payload] = files;
        media::make_blank(payload, payload_bytes)?;
        // Each later run installs its own keys in the machine.
        let neutral = keys.seed(run.dir.id(), &neutral_seed(plan));
        media::make_seed(seed, &neutral, &run.dir.work(), &run.ui)
    }

    /// Makes the payload of a restored machine. The agent reaches the broker at `address`.
    pub(super) fn make_payload(
        &self,
        payload: &Path,
        access: Access<'_>,
        address: &str,
        snapshot: &Snapshot,
    ) -> Result<()> {
        let Self { run, plan, subject, .. } = *self;
        let (config, ca) = (access.broker.agent_config(address), access.broker.ca());
        let registries = access.registries();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("this host's clock is before 1970")?
            .as_secs();
        let restored = Restored { login_user: &plan.image.login_user, now };
        let restored = Some((snapshot.manifest.ingredients.payload_bytes, restored, access.keys));
        let apt_sources = apt_sources(plan, subject, &run.ui)?;
        let (config, apt_sources, sabotage) = (config.as_str(), apt_sources.as_slice(), run.options.sabotage);
        let plant = run.plant(plan)?;
        let (plant, registries) = (plant.as_ref(), registries.as_deref());
        let disk =
            media::PayloadDisk { subject, apt_sources, config, ca, sabotage, plant, registries, restored };
        media::make_payload(payload, run.workspace, &disk, &run.dir.work(), &run.ui)
    }

    /// Waits until the first boot ends, saves the machine as a snapshot in the cache, and restores the machine from it
    /// as a later run does.
    fn save_and_restore(
        &self,
        vm: &mut RunningVm,
        made: &Path,
        ingredients: Ingredients,
    ) -> Result<Snapshot> {
        let Self { run, plan, .. } = *self;
        let limit = plan.limits.boot() + plan.provision_limit(true);
        // The limit of the restore that follows comes on top.
        run.times.set_limit(limit + plan.limits.provision());
        vm.deadline = run.times.deadline();
        let deadline = vm.deadline.within(limit);
        vm.wait_for_first_boot(deadline, "the end of the guest's first boot", |vm| {
            let ended = [marker::IDLE, marker::LACKS].iter().any(|sign| vm.console.line_with(sign).is_some());
            Ok(ended.then_some(()))
        })?;
        lacks_nothing(&vm.console)?;
        run.ui.tick("saving it")?;
        let snapshot = self.save(vm, made, ingredients).map_err(|error| {
            error::host_fault(
                error,
                "save the machine as a snapshot",
                "see the causes; --cold makes no snapshot",
            )
        })?;
        vm.snapshot = Some(UsedSnapshot::begin(run, &snapshot, self.subject.is_some())?);
        vm.console.new_boot()?;
        let access = Access { keys: &vm.keys, broker: &vm.broker, registry: vm.registry.as_ref() };
        let (domain, machine) = match vm.target.driver() {
            Driver::Embedded { hypervisor, .. } => {
                let files = self.own_files(&snapshot)?;
                let (domain, machine) = self.machine_here(hypervisor, access, &files, &snapshot)?;
                vm.files = files;
                (Some(domain), machine)
            }
            Driver::Daemon(on_daemon) => {
                (None, self.restore_on(on_daemon, access, &mut vm.files, &snapshot)?)
            }
        };
        vm.target.replace(domain, machine);
        vm.root.connect();
        Ok(snapshot)
    }

    /// Writes the machine's memory to a file, ends the machine, and keeps its files in the cache.
    fn save(&self, vm: &mut RunningVm, made: &Path, ingredients: Ingredients) -> Result<Snapshot> {
        let Self { run, plan, .. } = *self;
        vm.target.save(made)?;
        let names = if plan.place.connect.is_none() { &FILES[..] } else { &FILES_ON_DAEMON };
        let key = ingredients.key(&plan.image.name, plan.spec.architecture);
        let manifest = SnapshotManifest {
            ingredients,
            image: plan.image.name.clone(),
            arch: plan.spec.architecture,
            uuid: vm.files.uuid.clone(),
            made_at: now_rfc3339(),
            made_by: run.dir.id().to_owned(),
            files: BTreeMap::new(),
        };
        snapshots::keep(&run.cache, &key, (made, names), manifest)
    }
}

/// Returns an error if the guest could not install the agent's prerequisites, which are part of a snapshot.
fn lacks_nothing(console: &Console) -> Result<()> {
    let Some(reason) = console.after(marker::LACKS) else { return Ok(()) };
    bail_host!(
        "the guest could not install the agent's prerequisites:{reason}";
        "agent/dist/prerequisites.sh failed in the guest: run again if the distribution's mirror did not answer, or use \
         --cold to see the installer fail"
    )
}

/// Returns the number of seconds by which the clock of a restored and provisioned guest jumped to this host's time.
pub(super) fn clock_step(console: &Console) -> Result<i64> {
    let step = console.after(marker::CLOCK).and_then(|step| step.split_whitespace().next()?.parse().ok());
    let Some(step) = step else {
        bail_host!(
            "the restored guest did not set its clock, which still shows when the snapshot was saved";
            "nothing is known about the agent yet: run again, or use --cold"
        )
    };
    Ok(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(text: &str) -> Console {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        std::fs::write(&path, text).unwrap();
        let mut console = Console::new(&path);
        console.read().unwrap();
        console
    }

    #[test]
    fn packages_that_do_not_come_are_named() {
        lacks_nothing(&console("iot-xtask: first boot done\r\n")).unwrap();
        let error = lacks_nothing(&console("iot-xtask: prerequisites failed: E: no mirror\r\n")).unwrap_err();
        assert!(
            Kind::Host.is(&error) && error.to_string().ends_with("prerequisites: E: no mirror"),
            "{error:#}"
        );
    }

    #[test]
    fn a_clock_that_was_not_set_is_noticed() {
        let output = |text: &str| clock_step(&console(text));
        assert_eq!(
            output("iot-xtask: clock was behind by 86400 s\r\niot-xtask: provision done\r\n").unwrap(),
            86400
        );
        assert_eq!(output("iot-xtask: clock was behind by -1 s\r\n").unwrap(), -1);
        for silent in ["iot-xtask: provision done\r\n", "iot-xtask: clock was behind by  s\r\n"] {
            assert!(Kind::Host.is(&output(silent).unwrap_err()));
        }
    }
}
