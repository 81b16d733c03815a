//! The boots of crash states. A booted device must converge to the desired state of the fleet, and its storage of
//! containers must be sound.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use xtask_core::fs::remove_file;
use xtask_core::image::Format;
use xtask_core::machine::RunFiles;
use xtask_core::report::EventKind;
use xtask_crash::{CrashState, StateDisk};
use xtask_fleet::ReceivedStatus;
use xtask_images::Base;
use xtask_images::inventory::unpack;

use super::super::cuts::check_storage;
use super::super::deployed::ExpectedAnswer;
use super::super::prepare::make_overlay;
use super::super::proof::Proof;
use super::super::run::Run;
use super::super::running::RunningVm;
use super::super::verify;
use super::of_host;
use super::recorded::Recorded;
use crate::libvirt::Condition;

/// The file, in the run's working directory, with the disk of a crash state. It is sparse.
const STATE_DISK: &str = "state.raw";

/// Writes the disk of a crash state to a raw file in the run's working directory, and returns its path.
pub(super) fn write_disk(run: &Run<'_>, recorded: &Recorded, state: &CrashState) -> Result<PathBuf> {
    let path = run.dir.work().join(STATE_DISK);
    remove_file(&path)?;
    unpack(recorded.base_path(), &path, &run.ui)?;
    let file = fs_err::OpenOptions::new().write(true).open(&path)?;
    StateDisk::new(&recorded.base, &recorded.log, state)
        .write_to(file.file())
        .with_context(|| format!("write the crash state to {}", path.display()))?;
    Ok(path)
}

/// Boots a crash state on the machine of the recording. Returns a text that says what was proven.
pub(super) fn boot(
    run: &Run<'_>,
    vm: &mut RunningVm,
    proof: &Proof<'_>,
    recorded: &Recorded,
    state: &CrashState,
) -> Result<String> {
    let before = start(run, vm, recorded, state)
        .map_err(|error| of_host(error, "start the machine in a crash state"))?;
    converges(vm, proof, recorded, &before)
}

/// Switches the machine on in a crash state. Returns the last status from before.
fn start(
    run: &Run<'_>,
    vm: &mut RunningVm,
    recorded: &Recorded,
    state: &CrashState,
) -> Result<ReceivedStatus> {
    let disk = write_disk(run, recorded, state)?;
    if vm.target.condition() == Condition::Running {
        vm.cut_power()?;
    }
    put_overlay(run, &mut vm.files, disk)?;
    vm.target.redefine(&vm.plan, &vm.files)?;
    vm.record(EventKind::Fault, "the disk was replaced by that of a crash state");
    let before = vm.broker.latest()?.context("the device's status is gone")?;
    vm.switch_on()?;
    Ok(before)
}

/// Waits until a device that has just been switched on has reached the desired state, and checks its storage. `before` is
/// the last status before the boot.
pub(super) fn converges(
    vm: &mut RunningVm,
    proof: &Proof<'_>,
    recorded: &Recorded,
    before: &ReceivedStatus,
) -> Result<String> {
    let begun = Instant::now();
    let joined = proof.comes_back(vm, &verify::evidence(before), before)?;
    let (mut running, mut gone) = (Vec::new(), Vec::new());
    for wish in &recorded.wishes {
        if wish.image.is_none() {
            gone.push(wish.deployed);
            proof.is_gone(vm, wish.deployed, wish.revision)?;
            continue;
        }
        running.push(wish.deployed);
        proof.runs(vm, wish.deployed, wish.revision)?;
        let wanted = ExpectedAnswer { machine: &joined.machine, generation: wish.generation, before: None };
        proof.answers(vm, wish.deployed, &wanted)?;
    }
    proof.agrees(vm, &joined.boot_id, &running, &gone)?;
    let images = check_storage(vm)?;
    Ok(format!("converged {:.0} s after the boot; {images}", begun.elapsed().as_secs_f64()))
}

/// Puts a new overlay over the disk of a crash state.
pub(super) fn put_overlay(run: &Run<'_>, files: &mut RunFiles, disk: PathBuf) -> Result<()> {
    let virtual_bytes = fs_err::metadata(&disk)?.len();
    files.backing = vec![disk.clone()];
    make_overlay(files, &Base { disk, format: Format::Raw, virtual_bytes }, &run.ui)
}
