//! Warm machines: a booted guest is restored from a snapshot, which is made first if there is none. The provisioning
//! script in `xtask_core::machine::seed` is the guest's part.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use xtask_core::cli::Sabotage;
use xtask_core::digest::Algorithm;
use xtask_core::error::{self, Kind};
use xtask_core::format::{human_bytes, human_seconds, now_rfc3339, seconds_since};
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::image::Format;
use xtask_core::machine::seed::{Restored, marker};
use xtask_core::machine::{CONSOLE_SOCKET, ROOT_SOCKET, RunFiles, xml};
use xtask_core::plan::Plan;
use xtask_core::report::{EventKind, SnapshotReport};
use xtask_core::snapshot::{DISK, Ingredients, NVRAM, RAM, SEED, SnapshotManifest, neutral_seed};
use xtask_core::{bail_host, limits};
use xtask_fleet::Broker;
use xtask_images::snapshots::{self, Snapshot, Verification};
use xtask_images::{Base, ReadyImage};
use xtask_jobs::Step;

use super::prepare::{Prepared, apt_sources, make_overlay, make_writable_files, not_started, reach};
use super::run::Run;
use super::running::RunningVm;
use super::target::Domain;
use crate::guest::console::Console;
use crate::guest::media::{self, Delivered};
use crate::guest::ssh::Keys;
use crate::libvirt::{Hypervisor, Machine};

/// The snapshot from which a run's machine is restored. Its files are hashed while the run continues.
pub(super) struct UsedSnapshot {
    /// The entry for report.json.
    pub(super) report: SnapshotReport,
    verification: Option<Verification>,
    /// True unless a file was found to be changed.
    pub(super) unchanged: bool,
}

impl UsedSnapshot {
    /// Records that the run uses the snapshot, and starts to hash its files.
    fn begin(run: &Run<'_>, snapshot: &Snapshot, installs: bool) -> Result<Self> {
        run.dir.uses_snapshot(&snapshot.directory)?;
        let manifest = &snapshot.manifest;
        let made = manifest.made_by == run.dir.id();
        run.times.switch_to_warm(made, installs)?;
        if !made {
            run.ui.expect(run.times.usual());
        }
        let report = SnapshotReport {
            key: snapshot.name(),
            made_at: manifest.made_at.clone(),
            age_seconds: seconds_since(&manifest.made_at, SystemTime::now()),
            made_by: manifest.made_by.clone(),
            reused: manifest.files.keys().cloned().collect(),
            clock_step_seconds: None,
        };
        Ok(Self { report, verification: Some(snapshot.verify()), unchanged: true })
    }

    /// Returns a text with the age of a snapshot that is older than a day, because the image's mirror may have changed
    /// since. The text is empty for a newer snapshot.
    fn days(&self) -> String {
        match self.report.age_seconds.map_or(0, |seconds| seconds / 86_400) {
            0 => String::new(),
            days => format!(", {days} day(s) old"),
        }
    }

    /// Waits until the files are hashed, and returns an error if one was changed.
    pub(super) fn finish_verification(&mut self, run: &Run<'_>) -> Result<()> {
        let Some(verification) = self.verification.take() else { return Ok(()) };
        let verified = if verification.is_finished() {
            verification.conclude()
        } else {
            let step = Step { kind: "snapshot", what: "hash", title: "snapshot" };
            run.ui.step(&run.cache, step, || {
                while !verification.is_finished() {
                    run.ui.tick("hashing the snapshot and its image")?;
                    std::thread::sleep(limits::POLL);
                }
                verification.conclude().map(|()| ((), "is unchanged".to_owned()))
            })
        };
        self.unchanged = verified.is_ok();
        verified
    }
}

/// The inputs for the machine of a warm run.
pub(super) struct Warm<'a> {
    pub(super) run: &'a Run<'a>,
    pub(super) plan: &'a Plan,
    pub(super) image: &'a ReadyImage,
    pub(super) subject: Delivered<'a>,
}

/// The parts of a run that the restore of a machine uses.
struct Access<'a> {
    hypervisor: &'a Hypervisor,
    keys: &'a Keys,
    broker: &'a Broker,
}

impl Warm<'_> {
    /// Restores the machine from its snapshot, which is made first if there is none. Returns when the guest sees its
    /// payload.
    pub(super) fn restore<'slot>(
        &self,
        slot: &'slot mut Option<RunningVm>,
    ) -> Result<(&'slot mut RunningVm, String)> {
        self.restore_or_make(slot).map_err(|error| {
            let hint =
                "see the causes; nothing is known about the agent yet. Use --cold to run without a snapshot";
            error::host_fault(error, "restore the machine from its snapshot", hint)
        })
    }

    fn restore_or_make<'slot>(
        &self,
        slot: &'slot mut Option<RunningVm>,
    ) -> Result<(&'slot mut RunningVm, String)> {
        let Self { run, plan, .. } = *self;
        let prepared = Prepared::make(run, plan).map_err(not_started)?;
        let ingredients = self.ingredients(prepared.libvirt_version.clone())?;
        let key = ingredients.key(&plan.image.name, plan.spec.architecture);
        // The limit is long enough for another run that makes the snapshot and restores it under the same lock.
        let limit = plan.limits.boot() + plan.provision_limit(true) + plan.limits.provision();
        let asked = Instant::now();
        // The lock is held until the run has recorded that it uses the snapshot.
        let lock = snapshots::lock(&run.cache, &key, limit, &run.ui)?;
        run.times.note_wait(asked.elapsed());
        let found = snapshots::find(&run.cache, &key, &ingredients, &run.ui)?;
        let started = Instant::now();
        let (vm, snapshot) = match found {
            Some(snapshot) => (slot.insert(self.restored(prepared, &snapshot)?), snapshot),
            None => {
                run.ui.expect(run.times.usual_of_making());
                let made = run.dir.work().join("snapshot");
                let booted = self.first_boot(prepared, ingredients.payload_bytes, &made);
                let vm = slot.insert(booted.map_err(not_started)?);
                match self.save_and_restore(vm, &made, ingredients) {
                    Ok(snapshot) => (vm, snapshot),
                    Err(error) => return vm.verify_snapshot(run).and(Err(error)),
                }
            }
        };
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

    /// Returns the ingredients of a snapshot for this plan.
    fn ingredients(&self, libvirt: String) -> Result<Ingredients> {
        let Self { run, plan, image, subject } = *self;
        let content = subject.map_or(0, |(agent, workload)| agent.content.len() + workload.len());
        let store = run.images();
        let digest_of = |path: &Path| store.remembered_digest(path, Algorithm::Sha256);
        Ingredients::of(plan, (&image.digest, &image.disk), libvirt, content as u64, digest_of)
    }

    /// Restores the machine from an existing snapshot.
    fn restored(&self, prepared: Prepared, snapshot: &Snapshot) -> Result<RunningVm> {
        let run = self.run;
        let mut used = UsedSnapshot::begin(run, snapshot, self.subject.is_some())?;
        let files = self.own_files(snapshot)?;
        let access =
            Access { hypervisor: &prepared.hypervisor, keys: &prepared.keys, broker: &prepared.broker };
        match self.machine(&access, &files, snapshot) {
            Ok((domain, machine)) => {
                let mut vm = prepared.with(self.plan.clone(), files, domain, machine);
                vm.record(EventKind::Boot, "the machine was restored from its snapshot");
                Ok(RunningVm { snapshot: Some(used), ..vm })
            }
            Err(error) => used.finish_verification(run).and(Err(error)),
        }
    }

    /// Returns the files of a run that uses this snapshot.
    fn own_files(&self, snapshot: &Snapshot) -> Result<RunFiles> {
        let dir = &self.run.dir;
        let mut files = RunFiles::of_run(&dir.work(), dir.path().join("console.log"))?;
        files.backing = vec![snapshot.file(DISK), self.image.disk.clone()];
        // Later boots read the seed too. It has the same instance id, so cloud-init does not treat them as first
        // boots.
        files.seed = snapshot.file(SEED);
        files.uuid.clone_from(&snapshot.manifest.uuid);
        Ok(files)
    }

    /// Makes the disks of a machine, and restores it. QEMU's machine is compared with the domain before the guest
    /// runs.
    fn machine(
        &self,
        access: &Access<'_>,
        files: &RunFiles,
        snapshot: &Snapshot,
    ) -> Result<(Domain, Machine)> {
        let Self { run, plan, image, subject } = *self;
        let (work, sabotage) = (run.dir.work(), run.options.sabotage);
        let (config, ca) = (access.broker.agent_config(), access.broker.ca());
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("this host's clock is before 1970")?
            .as_secs();
        let restored = Restored { login_user: &plan.image.login_user, now };
        let restored = Some((snapshot.manifest.ingredients.payload_bytes, restored, access.keys));
        let apt_sources = apt_sources(plan, subject, &run.ui)?;
        let disk = media::PayloadDisk {
            subject,
            apt_sources: &apt_sources,
            config: &config,
            ca,
            sabotage,
            restored,
        };
        media::make_payload(&files.payload, run.workspace, &disk, &work, &run.ui)?;
        let virtual_bytes = image.virtual_bytes;
        let base = Base { disk: snapshot.file(DISK), format: Format::Qcow2, virtual_bytes };
        make_overlay(files, &base, &run.ui)?;
        write_private(&files.nvram, fs_err::read(snapshot.file(NVRAM))?)?;
        let domain = Domain::write(plan, files, &work, reach(run, plan, access.broker))?;
        let mut xml = domain.xml.clone();
        if sabotage == Some(Sabotage::StaleChain) {
            xml = xml::with_stale_chain(&xml, &files.overlay, &image.disk);
        }
        let restored = access.hypervisor.restore_paused(&snapshot.file(RAM), &xml, &domain.reach);
        let machine = domain.resume(restored.map_err(|error| snapshot.does_not_restore(error))?)?;
        Ok((domain, machine))
    }

    /// Starts the machine for a snapshot, with an empty payload disk.
    fn first_boot(&self, prepared: Prepared, payload_bytes: u64, made: &Path) -> Result<RunningVm> {
        let Self { run, plan, image, .. } = *self;
        run.ui.note("no snapshot of this machine yet: it boots once and is saved after its first boot");
        make_private_dir(made)?;
        let mut files = RunFiles::of_run(made, run.dir.path().join("console.log"))?;
        files.backing = vec![image.disk.clone()];
        files.console_socket = run.dir.work().join(CONSOLE_SOCKET);
        files.root_socket = run.dir.work().join(ROOT_SOCKET);
        media::make_blank(&files.payload, payload_bytes)?;
        make_writable_files(plan, &files, &image.base(), &run.ui)?;
        // Each later run installs its own keys in the machine.
        let seed = prepared.keys.seed(run.dir.id(), &neutral_seed(plan));
        media::make_seed(&files.seed, &seed, made, &run.ui)?;
        let reach = prepared.reach_of_first_boot(run, plan);
        let domain = Domain::write(plan, &files, &run.dir.work(), reach)?;
        let machine = domain.start(&prepared.hypervisor)?;
        Ok(prepared.with(plan.clone(), files, domain, machine))
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
        let files = self.own_files(&snapshot)?;
        let access = Access { hypervisor: &vm.target.hypervisor, keys: &vm.keys, broker: &vm.broker };
        let (domain, machine) = self.machine(&access, &files, &snapshot)?;
        vm.files = files;
        vm.target.replace(domain, machine);
        vm.root.connect();
        Ok(snapshot)
    }

    /// Writes the machine's memory to a file, ends the machine, and keeps its files in the cache.
    fn save(&self, vm: &mut RunningVm, made: &Path, ingredients: Ingredients) -> Result<Snapshot> {
        let Self { run, plan, .. } = *self;
        vm.target.save(&made.join(RAM))?;
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
        snapshots::keep(&run.cache, &key, made, manifest)
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
