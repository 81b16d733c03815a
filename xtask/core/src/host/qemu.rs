//! Queries the emulator on this machine for its version, its CPU models and the properties of its `max` CPU. The
//! queries are QMP commands on the emulator's standard input (docs/interop/qmp-spec.rst in QEMU's sources). No machine
//! runs.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::tools;
use crate::arch::{Accelerator, MachineProfile, VmArchitecture};
use crate::cpu::CpuModel;
use crate::error::Failure;

/// A full-system emulator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Emulator {
    pub path: PathBuf,
    /// The version, such as `7.2.22`.
    pub version: String,
    /// The names of the CPU models.
    pub cpu_models: Vec<String>,
    /// The names of the properties of the `max` CPU.
    pub max_properties: Vec<String>,
}

/// The QMP commands that are sent to the emulator.
const QUESTIONS: &str = concat!(
    r#"{"execute":"qmp_capabilities"}"#,
    r#"{"execute":"query-version","id":"version"}"#,
    r#"{"execute":"query-cpu-definitions","id":"models"}"#,
    r#"{"execute":"query-cpu-model-expansion","id":"max","arguments":{"type":"full","model":{"name":"max"}}}"#,
    r#"{"execute":"quit"}"#,
);

impl Emulator {
    /// Queries the emulator for `profile`'s machine.
    ///
    /// # Errors
    /// If the program does not answer, returns an error with the program's name and output.
    pub fn ask(path: &Path, profile: &MachineProfile) -> Result<Self> {
        let machine = ["-machine", profile.machine_type, "-accel", "tcg", "-nodefaults"];
        let arguments = [&machine[..], &["-display", "none", "-S", "-qmp", "stdio"]].concat();
        let answers = tools::ask(path, &arguments, QUESTIONS.as_bytes())?;
        Self::from_answers(path, &answers).with_context(|| format!("read the answers of {}", path.display()))
    }

    fn from_answers(path: &Path, answers: &str) -> Result<Self> {
        let answers: Vec<Value> =
            serde_json::Deserializer::from_str(answers).into_iter().collect::<Result<_, _>>()?;
        let answer =
            |id: &str| answers.iter().find(|answer| answer["id"] == id).map(|answer| &answer["return"]);
        let version = &answer("version").context("its output contains no version")?["qemu"];
        let part =
            |name: &str| version[name].as_u64().with_context(|| format!("its version has no {name} number"));
        let models =
            answer("models").and_then(Value::as_array).context("its output contains no CPU models")?;
        let names = models.iter().filter_map(|model| model["name"].as_str());
        // An emulator that does not know the command `query-cpu-model-expansion` has none of the properties that are
        // set.
        let properties = answer("max").and_then(|max| max["model"]["props"].as_object());
        Ok(Self {
            path: path.to_owned(),
            version: format!("{}.{}.{}", part("major")?, part("minor")?, part("micro")?),
            cpu_models: names.map(str::to_owned).collect(),
            max_properties: properties.map(|props| props.keys().cloned().collect()).unwrap_or_default(),
        })
    }

    /// Returns the major and the minor version number.
    pub fn release(&self) -> (u32, u32) {
        tools::release(&self.version)
    }

    /// Checks that this emulator has a CPU model.
    ///
    /// # Errors
    /// If the emulator does not have the model, returns a usage error that lists its models.
    pub fn check_cpu(
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
        let known: Vec<_> = aliases.chain(self.cpu_models.iter().map(String::as_str)).collect();
        let program = self.path.display();
        Err(Failure::usage(format!(
            "--cpu {requested}: {program} has no such CPU model; it has: {}",
            known.join(", ")
        )))
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
        {"timestamp": {}, "event": "SHUTDOWN"}{"return": {}}"#;

    #[test]
    fn its_answers_are_read() {
        let emulator = Emulator::from_answers(Path::new("/q"), ANSWERS).unwrap();
        assert_eq!((emulator.version.as_str(), emulator.release()), ("7.2.22", (7, 2)));
        assert_eq!(emulator.cpu_models, ["cortex-a76", "max"]);
        assert_eq!(emulator.max_properties, ["pauth", "sve"]);
        let check = |accelerator, cpu| emulator.check_cpu(VmArchitecture::Aarch64, accelerator, cpu);
        assert!(check(Accelerator::Tcg, "pi5").is_ok() && check(Accelerator::Tcg, "pi4").is_err());
        let refused = check(Accelerator::Tcg, "cortex-a99").unwrap_err().to_string();
        assert!(refused.contains("/q has no such CPU model; it has: pi5, pi4, cortex-a76, max"), "{refused}");
        assert!(check(Accelerator::Tcg, "host").is_err());
        assert!(check(Accelerator::Kvm, "host").is_ok());
    }

    #[test]
    fn a_program_that_is_no_emulator_is_told_by_what_it_does() {
        let ask = |program: &str| {
            let path = tools::find(program).unwrap();
            format!("{:#}", Emulator::ask(&path, VmArchitecture::Aarch64.profile()).unwrap_err())
        };
        let (failed, silent) = (ask("false"), ask("true"));
        assert!(failed.contains("exit status: 1"), "{failed}");
        assert!(silent.contains("contains no version"), "{silent}");
        assert!(Emulator::from_answers(Path::new("/q"), "no json").is_err());
    }
}
