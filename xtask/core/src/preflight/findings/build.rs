//! The findings about the requirements for two builds: that of the agent for the device, and that of `xtask-vm` for
//! this host.

use super::finding::{Finding, Remedy};
use super::virtualisation::reinstall;
use crate::arch::VmArchitecture;
use crate::build::linker::{Unfit, UnfitKind};
use crate::host::facts::{Facts, Linking};
use crate::host::packages::Need;
use crate::host::tools::release;

pub(super) fn evaluate(facts: &Facts, findings: &mut Vec<Finding>) {
    let (arch, host) = (facts.arch, &facts.host);
    if host.pkg_config.program.is_none() {
        findings.push(no_pkg_config(facts));
    }
    // If pkg-config is missing, libvirt's version is unknown. The headers are then missing only if the header file does
    // not exist.
    match &host.libvirt {
        Err(error) if !host.libvirt_header => {
            let remedy = Remedy::Install(Need::LibvirtHeaders, arch);
            findings.push(Finding::blocks("libvirt-headers", "libvirt's headers are missing", error, remedy));
        }
        Err(error) if host.pkg_config.program.is_some() => findings.push(astray(facts, error)),
        _ => {}
    }
    check_rust(facts, findings);
    match &facts.linker {
        Err(unfit) => findings.push(linker(facts, unfit)),
        Ok(linking) => {
            findings.extend((!linking.static_libc).then(|| static_libc(facts.arch)));
            findings.extend(libc(facts, linking));
        }
    }
}

fn no_pkg_config(facts: &Facts) -> Finding {
    let missing =
        |evidence: &str, remedy| Finding::blocks("pkg-config", "pkg-config is missing", evidence, remedy);
    match facts.host.pkg_config.naming_variable() {
        Some(variable) => missing(variable, "correct or unset this variable, which names no program".into()),
        None => missing("not on PATH", Remedy::Install(Need::PkgConfig, facts.arch)),
    }
}

/// Returns the finding if libvirt's headers are installed, but pkg-config does not find them. To install the headers
/// again would usually not help.
fn astray(facts: &Facts, error: &str) -> Finding {
    let pkg_config = &facts.host.pkg_config;
    let names: Vec<_> =
        pkg_config.variables.iter().filter_map(|variable| variable.split('=').next()).collect();
    let foreign = pkg_config.program.as_deref().filter(|path| !path.starts_with("/usr/bin"));
    let remedy = match (names.as_slice(), foreign) {
        ([], None) => reinstall(facts, Need::LibvirtHeaders),
        ([], Some(_)) => "put /usr/bin first on PATH, or set PKG_CONFIG=/usr/bin/pkg-config".into(),
        (names, _) => {
            format!("unset {}, or make it name the directories of this system too", names.join(" and "))
                .into()
        }
    };
    let sentence = format!(
        "libvirt's headers are installed, but pkg-config does not find them: {}",
        pkg_config.describe()
    );
    Finding::blocks("pkg-config-astray", sentence, error, remedy)
}

fn check_rust(facts: &Facts, findings: &mut Vec<Finding>) {
    let triple = facts.arch.profile().triple;
    match &facts.rust_target {
        Ok(true) => {}
        Ok(false) => findings.push(Finding::blocks(
            "rust-target",
            format!("Rust's standard library for {triple} is missing"),
            "rustc --print target-libdir names a directory without it",
            if facts.host.rustup {
                Remedy::Run(["rustup", "target", "add", triple].map(str::to_owned).to_vec())
            } else {
                let package = format!(
                    "install the package of your distribution with the standard library for {triple}"
                );
                format!("{package}, or install Rust by rustup (https://rustup.rs), and then run --fix again")
                    .into()
            },
        )),
        Err(error) => {
            let remedy = "install Rust by rustup; if the variable RUSTC or the key build.rustc of cargo's configuration is set, remove it";
            findings.push(Finding::blocks("rust", "rustc does not answer", error, remedy));
        }
    }
}

fn linker(facts: &Facts, unfit: &Unfit) -> Finding {
    let profile = facts.arch.profile();
    let triple = profile.triple;
    let (id, sentence, remedy) = match unfit.kind {
        UnfitKind::Missing => {
            let install = Remedy::Install(Need::CrossLinker, facts.arch);
            ("linker", format!("the linker for {triple} does not run"), install)
        }
        UnfitKind::Foreign => {
            let sentence = format!("the linker for {triple} links executables for another architecture");
            let set =
                format!("set target.{triple}.linker in .cargo/config.toml to {}-gcc", profile.multiarch);
            ("linker-foreign", sentence, set.into())
        }
        UnfitKind::Configuration => {
            let sentence = format!("cannot read the cargo configuration that sets the linker for {triple}");
            ("linker-configuration", sentence, "correct the syntax of that file".into())
        }
        UnfitKind::Compiler => {
            let sentence = "environment variables name a C compiler, or flags for it, for another machine";
            ("c-compiler", sentence.to_owned(), "unset these variables".into())
        }
    };
    // If a variable of the user names the program, neither a package nor the workspace's configuration changes that.
    let remedy = if unfit.is_users { unfit.remedy.clone().into() } else { remedy };
    Finding::blocks(id, sentence, &unfit.reason, remedy)
}

/// Returns the finding for a missing static C library. The smoke's workload needs it: the workload's container image
/// has no other file, so the workload is linked statically.
fn static_libc(arch: VmArchitecture) -> Finding {
    let own = VmArchitecture::of_host() == Some(arch);
    let need = if own { Need::StaticLibc } else { Need::CrossLinker };
    Finding::blocks(
        "static-libc",
        format!("the static C library for {arch} is missing; the smoke's workload is linked with it"),
        "the linker's -print-file-name=libc.a finds none",
        Remedy::Install(need, arch),
    )
}

/// Returns a finding if the linker's glibc is newer than the image's. The agent may then need symbols that the image
/// does not have.
fn libc(facts: &Facts, linking: &Linking) -> Option<Finding> {
    let (path, version) = linking.libc.as_ref()?;
    let image = facts.guest.glibc()?;
    if release(version) <= release(image) {
        return None;
    }
    let choice = &facts.guest.choice;
    let names = std::iter::once(&choice.image).chain(&choice.fallback).map(|image| image.name.as_str());
    let name = names.collect::<Vec<_>>().join(" or ");
    let sentence = format!(
        "the agent is linked against glibc {version}, but {name} has {image}: it may not start there"
    );
    let remedy = "link against an older C library (a sysroot of the image's own suite), or use a newer image";
    Some(Finding::degrades("libc-newer", sentence, path.display().to_string(), remedy))
}
