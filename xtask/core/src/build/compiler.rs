//! The C compiler of build scripts, which the crate `cc` takes from environment variables. `ring` contains C code, so
//! the agent and `xtask-vm` need a C compiler.

use std::path::Path;

use xshell::{Shell, cmd};

use super::linker::{Linker, Unfit, UnfitKind, fits};
use crate::arch::{MachineProfile, VmArchitecture};

/// Checks that the compiler and the flags from the environment compile for `machine`. If the environment names neither,
/// `cc` chooses a compiler, and the result is `Ok`.
///
/// # Errors
/// Returns [`Unfit`], whose text has the variables, the compiler's error and a remedy.
pub fn check(shell: &Shell, machine: &MachineProfile) -> Result<(), Unfit> {
    check_in(shell, machine, |name| std::env::var(name).ok())
}

fn check_in(
    shell: &Shell,
    machine: &MachineProfile,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<(), Unfit> {
    let set = |name: &str| {
        let names = variables(name, machine);
        names.into_iter().find_map(|name| variable(&name).map(|value| (name, value)))
    };
    // The device's build gets the linker as its compiler, so `CC` is not used for it.
    let compiler = set("CC").filter(|(name, _)| is_of_host(machine) || name != "CC");
    let flags = set("CFLAGS");
    let names: Vec<_> = compiler.iter().chain(&flags).map(|(name, _)| name.as_str()).collect();
    if names.is_empty() {
        return Ok(());
    }
    let own = if is_of_host(machine) { "cc".to_owned() } else { format!("{}-gcc", machine.multiarch) };
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let command = compiler.as_ref().map_or_else(|| vec![own], |(_, value)| words(value));
    let flags = flags.as_ref().map(|(_, value)| words(value)).unwrap_or_default();
    let Err(error) = compile_nothing(shell, machine, &command, &flags) else { return Ok(()) };
    let what = [command, flags].concat().join(" ");
    let names = names.join(" and ");
    let correction = format!("unset {names}, or set {} for this target alone", variables("CC", machine)[1]);
    let text = format!("compile C for {}: {what} (from {names}) {error}; {correction}", machine.triple);
    Err(Unfit { kind: UnfitKind::Compiler, text, correction: Some(correction) })
}

/// Compiles an empty file, to find flags that the compiler does not know.
fn compile_nothing(
    shell: &Shell,
    machine: &MachineProfile,
    command: &[String],
    flags: &[String],
) -> Result<(), String> {
    let (program, words) = command.split_first().ok_or("is empty")?;
    let answer = cmd!(shell, "{program} {words...} -dumpmachine").quiet().ignore_stderr().read();
    let answer = answer.map_err(|error| format!("does not run: {error}"))?;
    if !fits(&answer, machine) {
        return Err(format!("compiles for {:?}", answer.trim()));
    }
    let compile = cmd!(shell, "{program} {words...} {flags...} -fsyntax-only -x c /dev/null").quiet();
    compile.ignore_stderr().read().map(drop).map_err(|error| format!("fails: {error}"))
}

/// Returns the variables that set `name` for `machine`, the most specific one first (docs.rs/cc, "External
/// configuration via environment variables").
fn variables(name: &str, machine: &MachineProfile) -> [String; 4] {
    let kind = if is_of_host(machine) { "HOST" } else { "TARGET" };
    [
        format!("{name}_{}", machine.triple),
        format!("{name}_{}", machine.triple.replace('-', "_")),
        format!("{kind}_{name}"),
        name.to_owned(),
    ]
}

fn is_of_host(machine: &MachineProfile) -> bool {
    VmArchitecture::of_host() == Some(machine.arch)
}

/// Returns the variable that makes `linker` the C compiler for `machine` too. Otherwise `cc` would search the compiler
/// under a name of its own (briansmith/ring#1573). Returns `None` on the device's own architecture, or if a variable
/// already names a compiler for this target.
pub(super) fn variable_for<'a>(machine: &MachineProfile, linker: &'a Linker) -> Option<(String, &'a Path)> {
    let names = variables("CC", machine);
    let is_set = names[..3].iter().any(|name| std::env::var_os(name).is_some());
    let [_, name, ..] = names;
    (!is_of_host(machine) && !is_set).then_some((name, linker.program.as_path()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::linker::LinkerOrigin;

    #[test]
    fn a_compiler_or_a_flag_for_another_machine_is_found() {
        let shell = Shell::new().unwrap();
        let own = VmArchitecture::of_host().unwrap();
        let checked = |variables: &[(&str, &str)]| {
            let variable = |name: &str| {
                let found = variables.iter().find(|(set, _)| *set == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            check_in(&shell, own.profile(), variable).map_err(|unfit| unfit.text)
        };
        let of_target = format!("CC_{}", own.profile().triple.replace('-', "_"));
        checked(&[]).unwrap();
        checked(&[("CC", "cc"), ("CFLAGS", "-O2 -g")]).unwrap();
        checked(&[("CC", "echo"), (&of_target, "cc")]).unwrap();
        let foreign = checked(&[("CC", "echo")]).unwrap_err();
        assert!(foreign.contains("echo (from CC) compiles for \"-dumpmachine\""), "{foreign}");
        assert!(foreign.contains("unset CC, or set CC_"), "{foreign}");
        let missing = checked(&[("HOST_CC", "/nonexistent/gcc")]).unwrap_err();
        assert!(missing.contains("(from HOST_CC) does not run"), "{missing}");
        let flags = checked(&[("CFLAGS", "-march=of-another-machine")]).unwrap_err();
        assert!(flags.contains("(from CFLAGS) fails"), "{flags}");
    }

    #[test]
    fn the_devices_c_code_is_compiled_by_the_resolved_linker() {
        let linker = Linker { program: "/opt/gcc".into(), origin: LinkerOrigin::Default };
        for arch in VmArchitecture::ALL {
            let expected = format!("CC_{}", arch.profile().triple.replace('-', "_"));
            let expected = Some((expected, Path::new("/opt/gcc")));
            let expected = expected.filter(|_| VmArchitecture::of_host() != Some(arch));
            assert_eq!(variable_for(arch.profile(), &linker), expected);
        }
    }
}
