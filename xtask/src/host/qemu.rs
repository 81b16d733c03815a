//! What the emulator on this machine offers.

use std::path::Path;

use anyhow::{Context, Result};

use super::tools;
use crate::arch::{Accelerator, MachineProfile};
use crate::domain::cpu::qemu_name;
use crate::exit::Usage;

/// Refuses a CPU model that this emulator does not have.
///
/// # Errors
/// [`Usage`], with the models whose names come closest.
pub fn check_cpu(
    emulator: &Path,
    profile: &MachineProfile,
    accelerator: Accelerator,
    requested: &str,
) -> Result<()> {
    if accelerator == Accelerator::Tcg && requested == "host" {
        return Err(
            Usage("--cpu host: it exists under KVM alone; leave --cpu out, or name a model".into()).into()
        );
    }
    let help = tools::read(emulator, &["-machine", profile.machine_type, "-cpu", "help"])
        .context("ask the emulator for its CPU models")?;
    let name = qemu_name(profile.arch, requested);
    let models = models(&help);
    if name == "host" || models.iter().any(|model| model == name) {
        return Ok(());
    }
    let aliases = profile.cpu_aliases.iter().map(|(alias, _)| (*alias).to_owned());
    let known: Vec<_> = aliases.chain(models).collect();
    Err(Usage(format!(
        "--cpu {requested}: {} has no such CPU model; it has: {}",
        emulator.display(),
        known.join(", ")
    ))
    .into())
}

/// The model names in the output of `-cpu help`; x86 writes `x86 NAME  description`, Arm `  NAME`.
fn models(help: &str) -> Vec<String> {
    help.lines()
        .take_while(|line| !line.starts_with("Recognized"))
        .filter(|line| !line.is_empty() && !line.ends_with(':'))
        .filter_map(|line| line.trim_start_matches("x86 ").split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_of_cpu_help_are_read() {
        let arm = "Available CPUs:\n  cortex-a53\n  cortex-a76\n  max\n";
        assert_eq!(models(arm), ["cortex-a53", "cortex-a76", "max"]);
        let x86 = "Available CPUs:\nx86 486                   (alias configured by machine type)\n\
                   x86 max                   Enables all features\n\nRecognized CPUID flags:\n  3dnow\n";
        assert_eq!(models(x86), ["486", "max"]);
        let newer = "Available CPUs:\n  486                   (alias)\n  max\n";
        assert_eq!(models(newer), ["486", "max"]);
    }
}
