//! A machine that need not boot: restored from a snapshot, which is made first where there is none. From the payload's
//! installation on, what is done to it and asked of it is what a cold run does and asks.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use xtask_core::arch::Accelerator;
use xtask_core::cli::{Sabotage, SmokeArgs};
use xtask_core::digest::Algorithm;
use xtask_core::error::{self, Failure, Kind};
use xtask_core::format::{human_bytes, human_seconds, now_rfc3339};
use xtask_core::fs::{make_private_dir, write_private};
use xtask_core::image::Format;
use xtask_core::machine::seed::{Restored, Seed, marker};
use xtask_core::machine::{CONSOLE_SOCKET, RunFiles, xml};
use xtask_core::plan::Plan;
use xtask_core::snapshot as snapshots;
use xtask_core::snapshot::{Ingredients, SnapshotManifest};

use super::boot::{Domain, Payload, Prepared, make_overlay, make_writable_files};
use super::{RunningVm, Session};
use crate::guest::console::Console;
use crate::guest::media;
use crate::guest::ssh::Keys;
use crate::libvirt::paused;
use crate::libvirt::{Hypervisor, Machine};
use xtask_fleet::Broker;
use xtask_images::snapshots::Snapshot;
use xtask_images::{Base, ReadyImage, Store};

/// Whether this run may come from a snapshot. KVM boots in seconds; and two faults are planted in the first boot itself.
pub(super) fn may_be(args: &SmokeArgs, plan: &Plan) -> bool {
    let of_first_boot = matches!(args.sabotage, Some(Sabotage::KernelPanic | Sabotage::KillQemu));
    !args.cold && !of_first_boot && plan.accelerator() == Accelerator::Tcg
}

/// What is asked of a warm run cannot be had of a cold one.
pub(super) fn check_flags(args: &SmokeArgs, plan: &Plan) -> Result<(), Failure> {
    let warm = may_be(args, plan);
    let cannot = match args.sabotage {
        Some(Sabotage::StaleChain) if !warm => {
            "--sabotage stale-chain: needs a warm run, under emulation and without --cold"
        }
        Some(Sabotage::ColdPanics) => {
            "--sabotage cold-panics: needs --verify-cold, for it is planted in the cold one of the two runs"
        }
        _ if args.warm && !warm => {
            "--warm: not possible under KVM or with a fault of the first boot, where every run is cold"
        }
        _ => return Ok(()),
    };
    Err(Failure::usage(cannot.to_owned()))
}

/// A machine to be, out of a snapshot, with the run's own disks.
struct Restore<'a> {
    plan: &'a Plan,
    hypervisor: &'a Hypervisor,
    keys: &'a Keys,
    broker: &'a Broker,
    files: &'a RunFiles,
    kept: &'a Snapshot,
    image: &'a ReadyImage,
    subject: &'a Payload<'a>,
}

impl Restore<'_> {
    /// Its disks, and the machine itself, read before it runs.
    fn machine(&self, session: &Session<'_>) -> Result<(Domain, Machine)> {
        let (work, files, kept) = (session.run.work(), self.files, self.kept);
        let config = self.broker.agent_config();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("this host's clock")?.as_secs();
        let restored = Restored { login_user: &self.plan.image.login_user, now };
        let restored = Some((kept.manifest.ingredients.payload_bytes, restored, self.keys));
        let subject = self.subject.as_pair();
        let payload =
            media::PayloadDisk { subject, config: &config, sabotage: session.args.sabotage, restored };
        media::make_payload(&files.payload, session.workspace, &payload, &work, &session.ui)?;
        let virtual_bytes = self.image.virtual_bytes;
        let base = Base { disk: kept.file(snapshots::DISK), format: Format::Qcow2, virtual_bytes };
        make_overlay(files, &base, &session.ui)?;
        let nvram = kept.file(snapshots::NVRAM);
        let variables = std::fs::read(&nvram).with_context(|| format!("read {}", nvram.display()))?;
        write_private(&files.nvram, variables)?;
        let domain = Domain::write(self.plan, files, &work)?;
        let mut xml = domain.xml.clone();
        if session.args.sabotage == Some(Sabotage::StaleChain) {
            xml = xml::with_stale_chain(&xml, &files.overlay, &self.image.disk);
        }
        let restored = self.hypervisor.restore_paused(&kept.file(snapshots::RAM), &xml);
        let stopped = restored.map_err(|error| kept.does_not_restore(error))?;
        let machine = paused::sound(stopped, &domain.expected, &work)?;
        Ok((domain, machine))
    }
}

impl RunningVm {
    /// From a snapshot, which is made where there is none, to a guest that installs its payload.
    pub(super) fn restore(
        session: &mut Session<'_>,
        plan: Plan,
        image: &ReadyImage,
        subject: &Payload<'_>,
    ) -> Result<(Self, String)> {
        Self::restore_or_fail(session, plan, image, subject).map_err(|error| {
            let hint =
                "see the causes; nothing is known about the agent yet. Use --cold to run without a snapshot";
            error::host_fault(error, "restore the machine from its snapshot", hint)
        })
    }

    fn restore_or_fail(
        session: &mut Session<'_>,
        plan: Plan,
        image: &ReadyImage,
        subject: &Payload<'_>,
    ) -> Result<(Self, String)> {
        let prepared = Prepared::make(session, &plan)?;
        let content = subject.as_pair().map_or(0, |(agent, workload)| agent.content.len() + workload.len());
        let ingredients = ingredients(session, &plan, image, content as u64)?;
        let key = ingredients.key(&plan.image.name, plan.spec.architecture);
        // Until this run is said to use it.
        let (cache, limits) = (&session.cache, plan.limits);
        // Its making, and the machine that is restored out of it under the same lock.
        let limit = limits.boot() + 2 * limits.provision();
        let asked = Instant::now();
        let lock = xtask_images::snapshots::lock(cache, &key, limit, &session.ui)?;
        session.times.waited(asked.elapsed());
        let found = xtask_images::snapshots::find(&session.cache, &key, &ingredients, &session.ui)?;
        let started = Instant::now();
        let (mut vm, kept) = match found {
            Some(kept) => {
                session.run.uses_snapshot(&kept.directory)?;
                session.use_snapshot(&kept, subject.as_pair().is_some());
                let files = own_files(session, &kept, image)?;
                let (domain, machine) = Restore {
                    plan: &plan,
                    hypervisor: &prepared.hypervisor,
                    keys: &prepared.keys,
                    broker: &prepared.broker,
                    files: &files,
                    kept: &kept,
                    image,
                    subject,
                }
                .machine(session)?;
                (prepared.with(plan, files, domain, machine), kept)
            }
            None => {
                session.makes_a_snapshot();
                let made = session.run.work().join("snapshot");
                let mut vm = Self::first_boot(session, plan, prepared, &ingredients, image, &made)?;
                match vm.save_and_restore(session, &made, ingredients, image, subject) {
                    Ok(kept) => (vm, kept),
                    Err(error) => {
                        session.vm = Some(vm);
                        return Err(error);
                    }
                }
            }
        };
        drop(lock);
        let limit = vm.limits().provision();
        let reached = vm.wait(session, "the restored guest to see its payload", limit, |vm| {
            Ok(vm.console.line_with(marker::STARTED).map(drop))
        });
        if let Err(error) = reached {
            session.vm = Some(vm);
            // No guest's word, and a QEMU that ended: a broker that ended is another's fault.
            return Err(if Kind::Guest.is(&error) { kept.does_not_restore(error) } else { error });
        }
        let how = if kept.manifest.made_by == session.run.id() {
            format!("made a snapshot of {}, and restored it", human_bytes(kept.manifest.bytes()))
        } else {
            format!("restored in {}", human_seconds(started.elapsed().as_secs_f64()))
        };
        Ok((vm, format!("{}, {how}", session.report.guest.cpu)))
    }

    /// The machine on a payload's disk that has nothing on it.
    fn first_boot(
        session: &mut Session<'_>,
        plan: Plan,
        prepared: Prepared,
        ingredients: &Ingredients,
        image: &ReadyImage,
        made: &Path,
    ) -> Result<Self> {
        session.ui.note("no snapshot of this machine yet: it boots once and is saved after its first boot");
        make_private_dir(made)?;
        let mut files = RunFiles::of_run(made, session.run.path().join("console.log"))?;
        files.backing = vec![image.disk.clone()];
        files.console_socket = session.run.work().join(CONSOLE_SOCKET);
        media::make_blank(&files.payload, ingredients.payload_bytes)?;
        make_writable_files(&plan, &files, &image.base(), &session.ui)?;
        // Each later run gives the machine keys of its own.
        let seed = Seed {
            instance_id: session.run.id(),
            authorized_key: &prepared.keys.user_public,
            host_private_key: &prepared.keys.host_private,
            host_public_key: &prepared.keys.host_public,
            ..snapshots::neutral_seed(&plan)
        };
        media::make_seed(&files.seed, &seed, made, &session.ui)?;
        let domain = Domain::write(&plan, &files, &session.run.work())?;
        let machine = domain.start(&prepared.hypervisor)?;
        Ok(prepared.with(plan, files, domain, machine))
    }

    /// The first boot to its end; the snapshot out of it, in the cache; and the machine out of the snapshot, as the next run has it.
    fn save_and_restore(
        &mut self,
        session: &mut Session<'_>,
        made: &Path,
        ingredients: Ingredients,
        image: &ReadyImage,
        subject: &Payload<'_>,
    ) -> Result<Snapshot> {
        let limit = self.limits().boot() + self.limits().provision();
        session.limit = Some(limit);
        self.wait(session, "the end of the guest's first boot", limit, |vm| {
            let ended = [marker::IDLE, marker::LACKS].iter().any(|sign| vm.console.line_with(sign).is_some());
            Ok(ended.then_some(()))
        })?;
        lacks_nothing(&self.console)?;
        session.ui.tick("saving it")?;
        self.machine.save(&made.join(snapshots::RAM))?;
        let key = ingredients.key(&self.plan.image.name, self.plan.spec.architecture);
        let snapshot = SnapshotManifest {
            ingredients,
            image: self.plan.image.name.clone(),
            arch: self.plan.spec.architecture,
            uuid: self.files.uuid.clone(),
            made_at: now_rfc3339(),
            made_by: session.run.id().to_owned(),
            files: BTreeMap::new(),
        };
        let kept = xtask_images::snapshots::keep(&session.cache, &key, made, snapshot)?;
        session.run.uses_snapshot(&kept.directory)?;
        session.use_snapshot(&kept, subject.as_pair().is_some());
        self.console.new_boot()?;
        let files = own_files(session, &kept, image)?;
        let restore = Restore {
            plan: &self.plan,
            hypervisor: &self.hypervisor,
            keys: &self.keys,
            broker: &self.broker,
            files: &files,
            kept: &kept,
            image,
            subject,
        };
        let (domain, machine) = restore.machine(session)?;
        (self.files, self.domain, self.machine) = (files, domain, machine);
        Ok(kept)
    }
}

/// What the agent needs and is not the agent is in a snapshot.
fn lacks_nothing(console: &Console) -> Result<()> {
    let Some((_, reason)) = console.line_with(marker::LACKS).and_then(|line| line.split_once(marker::LACKS))
    else {
        return Ok(());
    };
    let hint = "agent/dist/prerequisites.sh failed in the guest: run again if the distribution's mirror did not answer, or use \
                --cold to see the installer fail";
    let error = format!("the guest could not install the agent's prerequisites:{reason}");
    Err(Failure::host(error, hint.to_owned()).into())
}

/// By how many seconds the clock of a restored guest, which is provisioned, jumped to this host's.
pub(super) fn clock_step(console: &Console) -> Result<i64> {
    let output = console.line_with(marker::CLOCK).and_then(|line| line.split_once(marker::CLOCK));
    let step = output.and_then(|(_, step)| step.split_whitespace().next()?.parse().ok());
    step.ok_or_else(|| {
        Failure::host(
            "the restored guest did not set its clock, which still shows when the snapshot was saved",
            "nothing is known about the agent yet: run again, or use --cold",
        )
        .into()
    })
}

/// The disks of a run on this snapshot.
fn own_files(session: &Session<'_>, kept: &Snapshot, image: &ReadyImage) -> Result<RunFiles> {
    let mut files = RunFiles::of_run(&session.run.work(), session.run.path().join("console.log"))?;
    files.backing = vec![kept.file(snapshots::DISK), image.disk.clone()];
    // Later boots read it too: the same instance, so that none of them is a first one.
    files.seed = kept.file(snapshots::SEED);
    files.uuid.clone_from(&kept.manifest.uuid);
    Ok(files)
}

/// What a snapshot for this plan is made of.
fn ingredients(
    session: &mut Session<'_>,
    plan: &Plan,
    image: &ReadyImage,
    content_bytes: u64,
) -> Result<Ingredients> {
    let libvirt = session.report.host.libvirt.clone().context("libvirt's version")?;
    let store = Store { cache: &session.cache, ui: &session.ui, offline: true, run: None };
    let digest_of = |path: &Path| store.remembered_digest(path, Algorithm::Sha256);
    Ingredients::of(plan, (&image.digest, &image.disk), libvirt, content_bytes, digest_of)
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
