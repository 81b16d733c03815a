//! The files with which a crash state is judged and booted again. They are in the directory `crash` of the run, and only
//! this user can read them. The disk below the log stays in the cache.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use xtask_core::build::Agent;
use xtask_core::cli::{DurabilityFault, MachineArgs};
use xtask_core::digest::Digest;
use xtask_core::error::Failure;
use xtask_core::format::{name_of, shell_word};
use xtask_core::fs::{make_private_dir, write_private};
use xtask_crash::CrashState;
use xtask_judge::Recording;

use super::super::run::Run;
use super::super::running::RunningVm;
use super::failing::Failing;
use super::script::Agents;

/// The directory of the bundle in that of the run.
const DIRECTORY: &str = "crash";
/// The file with the [`Bundle`].
const CONTENT: &str = "bundle.json";
/// The other files of a bundle: the log of the writes, the agent under test, the program of the workload, the firmware's
/// variables, the cloud-init seed, and the directory of the broker.
pub(super) const LOG: &str = "writes.log";
const TESTED: &str = "iot-agent";
const WORKLOAD: &str = "workload";
pub(super) const NVRAM: &str = "nvram.fd";
pub(super) const SEED: &str = "seed.img";
pub(super) const BROKER: &str = "broker";

/// The values with which the states of one recording are judged and booted again.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Bundle {
    /// The disk below the log, which is in the cache: that of a snapshot or of an image.
    pub(super) below: PathBuf,
    /// The digest of the image.
    pub(super) image: Digest,
    pub(super) uuid: String,
    /// The port of the registry, which is in the references of images.
    pub(super) registry_port: u16,
    /// The seed of the states.
    pub(super) seed: u64,
    /// The fault that was planted in the recorded run.
    pub(super) plant: Option<DurabilityFault>,
    pub(super) recording: Recording,
}

/// A state, in a file of its own beside the bundle.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedState {
    /// The number of the state from which this one was reduced.
    pub(super) number: u64,
    pub(super) state: CrashState,
    pub(super) losses: Vec<String>,
    pub(super) missing: Vec<String>,
}

/// Returns the file in which [`keep`] writes a state.
pub(super) fn file(run: &Run<'_>, number: u64) -> PathBuf {
    run.dir.path().join(DIRECTORY).join(file_name(number))
}

/// Returns the command that judges and boots the state in a file again on the same machine.
pub(super) fn command(run: &Run<'_>, state: &Path) -> String {
    let mut words = ["cargo", "xtask", "torture", "--arch"].map(str::to_owned).to_vec();
    words.push(run.options.arch.to_string());
    words.extend(flags(run.options.machine, run.options.timeout_scale));
    words.extend(["--state".to_owned(), state.display().to_string(), "--boot".to_owned()]);
    words.iter().map(|word| shell_word(word)).collect::<Vec<_>>().join(" ")
}

/// Returns the flags that are not the default.
pub(super) fn flags(machine: &MachineArgs, timeout_scale: f64) -> Vec<String> {
    let (MachineArgs { image, cpu, accel, memory, vcpus }, usual) = (machine, MachineArgs::default());
    let digest = image.image_digest.as_ref().map(ToString::to_string);
    let values = [
        ("--image", image.image.clone()),
        ("--image-digest", digest),
        ("--cpu", cpu.clone()),
        ("--accel", (*accel != usual.accel).then(|| name_of(accel))),
        ("--memory", (*memory != usual.memory).then(|| memory.to_string())),
        ("--vcpus", (*vcpus != usual.vcpus).then(|| vcpus.to_string())),
        ("--timeout-scale", (timeout_scale.to_bits() != 1_f64.to_bits()).then(|| timeout_scale.to_string())),
    ];
    let given = values.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value?]));
    let switches = [("--unverified", image.unverified), ("--offline", image.offline)];
    let on = switches.into_iter().filter(|(_, on)| *on).map(|(flag, _)| flag.to_owned());
    given.flatten().chain(on).collect()
}

fn file_name(number: u64) -> String {
    format!("state-{number}.json")
}

/// Writes the bundle with the states that lose something.
pub(super) fn keep(
    run: &Run<'_>,
    vm: &mut RunningVm,
    agents: &Agents,
    workload: &[u8],
    (bundle, failing): (&Bundle, &[Failing]),
) -> Result<()> {
    run.ui.tick("keeping the log and the broker for a repetition")?;
    let directory = run.dir.path().join(DIRECTORY);
    make_private_dir(&directory)?;
    let log = run.write_log().context("there is no log of the writes")?;
    fs_err::hard_link(&log, directory.join(LOG))?;
    write_private(&directory.join(TESTED), &agents.tested.content)?;
    write_private(&directory.join(WORKLOAD), workload)?;
    write_private(&directory.join(NVRAM), fs_err::read(&vm.files.nvram)?)?;
    write_private(&directory.join(SEED), fs_err::read(&vm.files.seed)?)?;
    vm.broker.keep(&directory.join(BROKER))?;
    for failed in failing {
        let Failing { number, state, losses, missing, .. } = failed;
        let saved = SavedState {
            number: *number,
            state: state.clone(),
            losses: losses.clone(),
            missing: missing.clone(),
        };
        write_private(&directory.join(file_name(*number)), serde_json::to_string_pretty(&saved)?)?;
    }
    write_private(&directory.join(CONTENT), serde_json::to_string(bundle)?)
}

/// A bundle in its directory, with one of its states.
pub(super) struct OpenedBundle {
    pub(super) directory: PathBuf,
    pub(super) bundle: Bundle,
    pub(super) saved: SavedState,
    pub(super) workload: Vec<u8>,
}

/// Reads the bundle of a file with a state.
///
/// # Errors
/// Returns a usage error that names the file which is missing or cannot be parsed, or the disk which is no longer in the
/// cache.
pub(super) fn read(state: &Path) -> Result<OpenedBundle> {
    let read = || -> Result<OpenedBundle> {
        let directory = state.parent().context("the file has no directory")?.to_owned();
        let bundle: Bundle = parsed(&directory.join(CONTENT))?;
        fs_err::metadata(&bundle.below).context(
            "the disk below the recorded writes is no longer in the cache; a new run makes new states",
        )?;
        for name in [LOG, TESTED, NVRAM, SEED, BROKER] {
            fs_err::metadata(directory.join(name))?;
        }
        Ok(OpenedBundle {
            saved: parsed(state)?,
            workload: fs_err::read(directory.join(WORKLOAD))?,
            bundle,
            directory,
        })
    };
    read().map_err(|error| Failure::usage(format!("--state {}: {error:#}", state.display())).into())
}

fn parsed<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&fs_err::read(path)?).with_context(|| format!("parse {}", path.display()))
}

impl OpenedBundle {
    /// Returns the agent under test.
    pub(super) fn agent(&self, run: &Run<'_>) -> Result<Agent> {
        let path = self.directory.join(TESTED);
        Agent::read(&path, run.options.arch, xtask_core::build::origin::Origin::Given(path.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repetition_has_the_machine_of_the_recording() {
        let usual = MachineArgs::default();
        assert_eq!(flags(&usual, 1.0), Vec::<String>::new());
        let mut machine = MachineArgs { cpu: Some("pi5".to_owned()), memory: 3072, vcpus: 4, ..usual };
        machine.accel = xtask_core::cli::Accel::Tcg;
        machine.image.image = Some("./my image".to_owned());
        machine.image.unverified = true;
        let words = "--image|./my image|--cpu|pi5|--accel|tcg|--memory|3072|--vcpus|4|--timeout-scale|2.5|--unverified";
        assert_eq!(flags(&machine, 2.5).join("|"), words);
    }
}
