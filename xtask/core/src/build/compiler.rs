//! The C compiler of build scripts, which the crate `cc` takes from environment variables and cargo's `[env]`. `ring`
//! contains C code, so the agent and `xtask-vm` need a C compiler.

use std::path::Path;

use xshell::{Shell, cmd};

use super::configuration::Configuration;
use super::linker::{Linker, Unfit, UnfitKind};
use crate::arch::{MachineProfile, VmArchitecture};

/// Checks that the compiler and the flags in the variables compile for `machine`. If no variable names one, the build
/// chooses the compiler, and the result is `Ok`. `default` is the compiler for flags without a compiler.
///
/// # Errors
/// Returns [`Unfit`], whose text has the variables, the compiler's error and a remedy.
pub fn check(
    shell: &Shell,
    configuration: &Configuration,
    machine: &MachineProfile,
    default: &Path,
) -> Result<(), Unfit> {
    let set = |names: &[String]| -> Vec<_> {
        let set = names.iter().filter_map(|name| configuration.variable(name));
        set.filter(|(value, _)| !value.trim().is_empty()).collect()
    };
    let compilers = variables("CC", machine);
    // The first compiler counts. The device's build gets the linker as its compiler, so `CC` is not used for it.
    let used = if is_of_host(machine) { compilers.len() } else { compilers.len() - 1 };
    let compiler = set(&compilers[..used]).into_iter().next();
    // All flags count. With this variable, cc reads quotes in the flags, and they are not checked.
    let flags = match configuration.variable("CC_SHELL_ESCAPED_FLAGS") {
        Some(_) => Vec::new(),
        None => set(&variables("CFLAGS", machine)),
    };
    let names: Vec<_> = compiler.iter().chain(&flags).map(|(_, name)| name.as_str()).collect();
    if names.is_empty() {
        return Ok(());
    }
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let command = match &compiler {
        None => vec![default.display().to_string()],
        Some((value, _)) if Path::new(value).exists() => vec![value.clone()],
        Some((value, _)) => words(value),
    };
    let flags = flags.iter().rev().flat_map(|(value, _)| words(value)).collect();
    let command = [command, flags].concat();
    let Err(error) = check_macros(shell, machine, &command) else { return Ok(()) };
    let reason = format!(
        "compile C for {}: {} (from {}) {error}",
        machine.triple,
        command.join(" "),
        names.join(" and ")
    );
    let remedy = format!(
        "correct or unset {}; a name such as CFLAGS_{} sets the value of one target",
        names.join(" and "),
        machine.triple.replace('-', "_")
    );
    Err(Unfit { kind: UnfitKind::Compiler, reason, remedy, is_users: true })
}

/// Has the compiler print its predefined macros, which name the machine.
fn check_macros(shell: &Shell, machine: &MachineProfile, command: &[String]) -> Result<(), String> {
    let (program, words) = command.split_first().ok_or("is empty")?;
    let macros = cmd!(shell, "{program} {words...} -dM -E -x c /dev/null").quiet().ignore_stderr().read();
    let macros = macros.map_err(|error| format!("fails: {error}"))?;
    let defines = |name: &str| macros.lines().any(|line| line.starts_with(&format!("#define {name} ")));
    if defines(&format!("__{}__", machine.machine)) && defines("__LP64__") {
        return Ok(());
    }
    Err("compiles for another machine".to_owned())
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
pub(super) fn variable_for<'a>(
    configuration: &Configuration,
    machine: &MachineProfile,
    linker: &'a Linker,
) -> Option<(String, &'a Path)> {
    let names = variables("CC", machine);
    // cc ignores an empty variable.
    let is_set = names[..3].iter().any(|name| configuration.has_variable(name));
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
        let empty = tempfile::tempdir().unwrap();
        let checked = |variables: &[(&str, &str)]| {
            let configuration = Configuration::of_test(empty.path(), empty.path(), variables);
            check(&shell, &configuration, own.profile(), Path::new("cc")).map_err(|unfit| unfit.to_string())
        };
        let triple = own.profile().triple.replace('-', "_");
        let (compiler, flags) = (format!("CC_{triple}"), format!("CFLAGS_{triple}"));
        let directory = tempfile::tempdir().unwrap();
        let spaced = directory.path().join("my cc");
        std::os::unix::fs::symlink("/usr/bin/cc", &spaced).unwrap();
        let sound: [&[(&str, &str)]; 6] = [
            &[],
            &[("CC", "")],
            &[("CC", "cc -pipe"), ("CFLAGS", "-O2 -g -Wall -Werror -pedantic")],
            &[("CC", "/nonexistent/cc"), (&compiler, "cc")],
            &[("CC", spaced.to_str().unwrap())],
            &[("CC_SHELL_ESCAPED_FLAGS", "1"), ("CFLAGS", "-DX='a b'")],
        ];
        for variables in sound {
            assert_eq!(checked(variables), Ok(()), "{variables:?}");
        }
        let table: [(&[(&str, &str)], &str); 5] = [
            (&[("CC", "echo")], "echo (from CC) compiles for another machine; correct or unset CC;"),
            (&[("HOST_CC", "/nonexistent/gcc")], "(from HOST_CC) fails"),
            (&[("CFLAGS", "-march=of-another-machine")], "(from CFLAGS) fails"),
            (&[("CFLAGS", "-march=of-another-machine"), (&flags, "-O2")], "fails"),
            (&[("CC", "cc -U__LP64__")], "compiles for another machine"),
        ];
        for (variables, words) in table {
            let error = checked(variables).unwrap_err();
            assert!(error.contains(words), "{variables:?}: {error}");
        }
    }

    #[test]
    fn the_devices_c_code_is_compiled_by_the_resolved_linker() {
        let linker = Linker { program: "/opt/gcc".into(), origin: LinkerOrigin::Default };
        let empty = tempfile::tempdir().unwrap();
        let configuration = Configuration::of_test(empty.path(), empty.path(), &[]);
        for arch in VmArchitecture::ALL {
            let expected = format!("CC_{}", arch.profile().triple.replace('-', "_"));
            let expected = Some((expected, Path::new("/opt/gcc")));
            let expected = expected.filter(|_| VmArchitecture::of_host() != Some(arch));
            assert_eq!(variable_for(&configuration, arch.profile(), &linker), expected);
        }
    }

    #[test]
    fn a_compiler_in_cargos_table_env_is_found() {
        let shell = Shell::new().unwrap();
        let own = VmArchitecture::of_host().unwrap().profile();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(".cargo/config.toml");
        std::fs::create_dir(directory.path().join(".cargo")).unwrap();
        let checked = |table: &str, variables: &[(&str, &str)]| {
            std::fs::write(&file, format!("[env]\n{table}\n")).unwrap();
            let configuration = Configuration::of_test(directory.path(), directory.path(), variables);
            check(&shell, &configuration, own, Path::new("cc")).map_err(|unfit| unfit.to_string())
        };
        let error = checked("CC = \"echo\"", &[]).unwrap_err();
        assert!(error.contains("correct or unset CC in [env] of cargo's configuration"), "{error}");
        assert_eq!(checked("CC = \"echo\"", &[("CC", "cc")]), Ok(()), "the environment wins");
        let error = checked("CC = { value = \"echo\", force = true }", &[("CC", "cc")]).unwrap_err();
        assert!(error.contains("echo (from CC in [env]"), "{error}");
        std::fs::write(&file, format!("[env]\nCC_{} = \"gcc\"\n", own.triple)).unwrap();
        let linker = Linker { program: "/opt/gcc".into(), origin: LinkerOrigin::Default };
        let configuration = Configuration::of_test(directory.path(), directory.path(), &[]);
        assert_eq!(variable_for(&configuration, own, &linker), None);
    }
}
