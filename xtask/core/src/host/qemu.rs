//! Queries the emulator on this machine for its version, its CPU models, the properties of its `max` CPU, its user-mode
//! network and the maximum number of processors. The queries are QMP commands on the emulator's standard input
//! (docs/interop/qmp-spec.rst in QEMU's sources). No machine runs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::tools;
use crate::arch::{Accelerator, MachineProfile, VmArchitecture};
use crate::cli::MachineArgs;
use crate::cpu::CpuModel;
use crate::error::Failure;

/// A full-system emulator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Emulator {
    pub path: PathBuf,
    /// The version, such as `7.2.22`.
    pub version: String,
    /// The names of the CPU models. If `--cpu` names a model, these are only the models that run 64-bit programs of the
    /// guest.
    pub cpu_models: Vec<String>,
    /// The names of the properties of the `max` CPU.
    pub max_properties: Vec<String>,
    /// `Ok` if the emulator has the user-mode network. A QEMU that was built without libslirp lacks it.
    pub user_network: Result<(), String>,
    /// The maximum number of processors of the machine type; `None` if the emulator does not report it.
    pub max_cpus: Option<u32>,
}

/// The command that begins a conversation.
const CAPABILITIES: &str = r#"{"execute":"qmp_capabilities"}"#;
/// The command that ends the emulator.
const QUIT: &str = r#"{"execute":"quit"}"#;
/// The QMP commands that are sent to each emulator. One of them adds a network, because a QEMU that was built without
/// the type `user` lists this type nevertheless.
const QUESTIONS: &str = concat!(
    r#"{"execute":"qmp_capabilities"}"#,
    r#"{"execute":"query-version","id":"version"}"#,
    r#"{"execute":"query-cpu-definitions","id":"models"}"#,
    r#"{"execute":"query-cpu-model-expansion","id":"max","arguments":{"type":"full","model":{"name":"max"}}}"#,
    r#"{"execute":"netdev_add","id":"network","arguments":{"type":"user","id":"net0"}}"#,
    r#"{"execute":"query-machines","id":"machines"}"#,
    r#"{"execute":"quit"}"#,
);

impl Emulator {
    /// Queries the emulator for `profile`'s machine. `cpu` is the value of `--cpu`.
    ///
    /// # Errors
    /// If the program does not answer, returns an error with the program's name and output.
    pub fn ask(path: &Path, profile: &MachineProfile, cpu: Option<&str>) -> Result<Self> {
        let answers = send(path, profile, QUESTIONS)?;
        let read = || format!("read the answers of {}", path.display());
        let mut emulator = Self::from_answers(path, profile, &answers).with_context(read)?;
        if cpu.is_some() {
            let questions: String = emulator.cpu_models.iter().map(|name| expansion(name)).collect();
            let questions = format!("{CAPABILITIES}{questions}{QUIT}");
            let answers = Answers::read(&send(path, profile, &questions)?).with_context(read)?;
            emulator.cpu_models.retain(|name| {
                answers.of(name).is_some_and(|answer| answer["model"]["props"][profile.cpu_is_64_bit] == true)
            });
        }
        Ok(emulator)
    }

    fn from_answers(path: &Path, profile: &MachineProfile, answers: &str) -> Result<Self> {
        let answers = Answers::read(answers)?;
        let version = &answers.of("version").context("its output contains no version")?["qemu"];
        let part =
            |name: &str| version[name].as_u64().with_context(|| format!("its version has no {name} number"));
        let list = |id: &str| answers.of(id).and_then(Value::as_array);
        let models = list("models").context("its output contains no CPU models")?;
        let names = models.iter().filter_map(|model| model["name"].as_str());
        // An emulator that does not know the command `query-cpu-model-expansion` has none of the properties that are
        // set.
        let properties = answers.of("max").and_then(|max| max["model"]["props"].as_object());
        // The machine type is an alias of the newest version of the machine.
        let named =
            |machine: &&Value| ["name", "alias"].iter().any(|key| machine[key] == profile.machine_type);
        let machine = list("machines").and_then(|machines| machines.iter().find(named));
        let max_cpus = machine.and_then(|machine| machine["cpu-max"].as_u64()?.try_into().ok());
        Ok(Self {
            path: path.to_owned(),
            version: format!("{}.{}.{}", part("major")?, part("minor")?, part("micro")?),
            cpu_models: names.map(str::to_owned).collect(),
            max_properties: properties.map(|props| props.keys().cloned().collect()).unwrap_or_default(),
            user_network: answers.error_of("network").map_or(Ok(()), |error| Err(error.to_owned())),
            max_cpus,
        })
    }

    /// Returns the major and the minor version number.
    pub fn release(&self) -> (u32, u32) {
        tools::release(&self.version)
    }

    /// Checks that this emulator has the requested CPU model and allows the requested number of processors.
    ///
    /// # Errors
    /// If the emulator does not, returns a usage error with its models or its maximum number of processors.
    pub fn check(
        &self,
        arch: VmArchitecture,
        accelerator: Accelerator,
        machine: &MachineArgs,
    ) -> Result<(), Failure> {
        if let Some(cpu) = &machine.cpu {
            self.check_cpu(arch, accelerator, cpu)?;
        }
        let (vcpus, name) = (machine.vcpus, arch.profile().machine_type);
        let emulated = arch.profile().emulated_cpus.filter(|_| accelerator == Accelerator::Tcg);
        match emulated.into_iter().chain(self.max_cpus).min() {
            Some(most) if vcpus > most => Err(Failure::usage(format!(
                "--vcpus {vcpus}: the machine {name} of {} has at most {most} processors here",
                self.path.display()
            ))),
            _ => Ok(()),
        }
    }

    fn check_cpu(
        &self,
        arch: VmArchitecture,
        accelerator: Accelerator,
        requested: &str,
    ) -> Result<(), Failure> {
        let model = CpuModel::requested(arch, accelerator, Some(requested));
        if model == CpuModel::Named("host".to_owned()) {
            return Err(Failure::usage("--cpu host: it needs KVM; leave out --cpu, or name a model"));
        }
        if model == CpuModel::HostPassthrough || self.cpu_models.iter().any(|known| known == model.name()) {
            return Ok(());
        }
        let aliases = arch.profile().cpu_aliases.iter().map(|(alias, _)| *alias);
        let models = self.cpu_models.iter().map(String::as_str).filter(|name| *name != "host");
        let mut known: Vec<_> = aliases.chain(models).collect();
        known.sort_unstable();
        let program = self.path.display();
        Err(Failure::usage(format!(
            "--cpu {requested}: {program} has no such 64-bit CPU model; it has: {}",
            known.join(", ")
        )))
    }
}

/// Sends QMP commands to the emulator and returns its output.
fn send(path: &Path, profile: &MachineProfile, questions: &str) -> Result<String> {
    let machine = ["-machine", profile.machine_type, "-accel", "tcg", "-nodefaults"];
    let arguments = [&machine[..], &["-display", "none", "-S", "-qmp", "stdio"]].concat();
    tools::ask(path, &arguments, questions.as_bytes())
}

/// Returns the command that asks for the properties of a CPU model. Its id is the model's name.
fn expansion(name: &str) -> String {
    let arguments = json!({ "type": "full", "model": { "name": name } });
    json!({ "execute": "query-cpu-model-expansion", "id": name, "arguments": arguments }).to_string()
}

/// The emulator's answers to QMP commands.
struct Answers(Vec<Value>);

impl Answers {
    fn read(text: &str) -> Result<Self> {
        Ok(Self(serde_json::Deserializer::from_str(text).into_iter().collect::<Result<_, _>>()?))
    }

    fn find(&self, id: &str, key: &str) -> Option<&Value> {
        self.0.iter().find(|answer| answer["id"] == id)?.get(key)
    }

    fn of(&self, id: &str) -> Option<&Value> {
        self.find(id, "return")
    }

    fn error_of(&self, id: &str) -> Option<&str> {
        self.find(id, "error")?["desc"].as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWERS: &str = r#"{"QMP": {"version": {}, "capabilities": ["oob"]}}
        {"return": {}}
        {"return": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "id": "version"}
        {"return": [{"name": "cortex-a76", "typename": "x"}, {"name": "max"}], "id": "models"}
        {"return": {"model": {"name": "max", "props": {"pauth": true, "sve": true}}}, "id": "max"}
        {"return": {}, "id": "network"}
        {"return": [{"name": "virt-7.2", "alias": "virt", "cpu-max": 512}, {"name": "raspi3b", "cpu-max": 4}], "id": "machines"}
        {"timestamp": {}, "event": "SHUTDOWN"}{"return": {}}"#;

    fn read(answers: &str) -> Result<Emulator> {
        Emulator::from_answers(Path::new("/q"), VmArchitecture::Aarch64.profile(), answers)
    }

    #[test]
    fn its_answers_are_read() {
        let emulator = read(ANSWERS).unwrap();
        assert_eq!((emulator.version.as_str(), emulator.release()), ("7.2.22", (7, 2)));
        assert_eq!(emulator.cpu_models, ["cortex-a76", "max"]);
        assert_eq!(emulator.max_properties, ["pauth", "sve"]);
        assert_eq!((&emulator.user_network, emulator.max_cpus), (&Ok(()), Some(512)));
        let without = r#"{"error": {"class": "GenericError", "desc": "network backend 'user' is not compiled"}, "id": "network"}"#;
        let without = read(&ANSWERS.replace(r#"{"return": {}, "id": "network"}"#, without)).unwrap();
        assert_eq!(without.user_network, Err("network backend 'user' is not compiled".to_owned()));
    }

    #[test]
    fn what_it_does_not_have_is_a_flag_to_correct() {
        let mut emulator = read(ANSWERS).unwrap();
        let check = |emulator: &Emulator, accelerator, cpu: &str, vcpus| {
            let machine = MachineArgs { cpu: Some(cpu.to_owned()), vcpus, ..MachineArgs::default() };
            emulator.check(VmArchitecture::Aarch64, accelerator, &machine).map_err(|error| error.to_string())
        };
        let tcg = |emulator: &Emulator, cpu, vcpus| check(emulator, Accelerator::Tcg, cpu, vcpus);
        assert!(tcg(&emulator, "pi5", 8).is_ok() && tcg(&emulator, "pi4", 1).is_err());
        let refused = tcg(&emulator, "cortex-a99", 1).unwrap_err();
        assert!(
            refused.contains("/q has no such 64-bit CPU model; it has: cortex-a76, max, pi4, pi5"),
            "{refused}"
        );
        assert!(tcg(&emulator, "host", 1).is_err());
        assert_eq!(check(&emulator, Accelerator::Kvm, "host", 16), Ok(()));
        let refused = tcg(&emulator, "max", 9).unwrap_err();
        assert!(refused.contains("--vcpus 9: the machine virt of /q has at most 8 processors"), "{refused}");
        emulator.max_cpus = Some(4);
        assert!(check(&emulator, Accelerator::Kvm, "host", 5).unwrap_err().contains("at most 4"));
    }

    #[test]
    fn a_program_that_is_no_emulator_is_told_by_what_it_does() {
        let ask = |program: &str| {
            let path = tools::find(program).unwrap();
            format!("{:#}", Emulator::ask(&path, VmArchitecture::Aarch64.profile(), None).unwrap_err())
        };
        let (failed, silent) = (ask("false"), ask("true"));
        assert!(failed.contains("exit status: 1"), "{failed}");
        assert!(silent.contains("contains no version"), "{silent}");
        assert!(read("no json").is_err());
    }
}
