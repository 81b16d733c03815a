//! Formats the result of a check: as text for people, as JSON, and as an error.

use std::fmt::{self, Display, Formatter};

use anyhow::Result;
use serde_json::json;

use super::findings::{Finding, Remedy, Severity};
use super::{Preflight, findings, fix};
use crate::arch::VmArchitecture;
use crate::cli::PreflightArgs;
use crate::error::Failure;
use crate::format::name_of;
use crate::host::facts::Facts;
use crate::message;
use crate::output::{clean, print_json, write_message};

/// Returns the architecture of `--arch`, or all architectures if this flag is not given.
pub fn architectures(args: &PreflightArgs) -> Vec<VmArchitecture> {
    args.arch.map_or(VmArchitecture::ALL.to_vec(), |arch| vec![arch])
}

/// Prints the result as text or as JSON, and returns the verdict.
///
/// # Errors
/// Returns the error of [`Preflight::verdict`] if a finding blocks.
pub fn present(preflight: &Preflight, args: &PreflightArgs) -> Result<()> {
    let verdict = preflight.verdict();
    if args.json {
        print_json(&as_json(preflight, verdict.is_ok()))?;
    } else {
        write_message(&clean(&preflight.to_string()));
    }
    verdict
}

impl Preflight {
    /// Returns success if no finding blocks.
    ///
    /// # Errors
    /// If a finding blocks, returns a failure of the host. It names all blocking findings, and the command or action
    /// that repairs them.
    pub fn verdict(&self) -> Result<()> {
        let blocking: Vec<_> = self.blocking().collect();
        if blocking.is_empty() {
            return Ok(());
        }
        let sentences: Vec<_> = blocking.iter().map(|finding| finding.sentence.as_str()).collect();
        let elsewhere = blocking.iter().all(|finding| finding.id.starts_with("connect-"));
        let subject = if elsewhere { "the libvirt of --connect" } else { "this machine" };
        let by_hand: Vec<_> = blocking.iter().filter_map(|finding| finding.by_hand()).collect();
        let architectures: Vec<_> = self.facts.iter().map(|facts| facts.arch.to_string()).collect();
        let arch = match architectures.as_slice() {
            [one] => format!(" --arch {one}"),
            _ => String::new(),
        };
        Err(Failure::host(
            format!("{subject} is not ready for {}: {}", architectures.join(" and "), sentences.join("; ")),
            if by_hand.len() == blocking.len() {
                by_hand.join("; ")
            } else if fix::plan(self).is_empty() {
                "--fix knows no package for it on this distribution: install it by hand".to_owned()
            } else if let Some((_, hint)) = fix::for_root(self) {
                hint
            } else if fix::was_in_vain(self) {
                "the commands of --fix have changed nothing: read their messages above, and repair it by hand"
                    .to_owned()
            } else if blocking.iter().any(|finding| finding.id == findings::CI_PROGRAM) {
                "cargo xtask ci --fix".to_owned()
            } else if blocking.iter().any(|finding| finding.id == findings::TORTURE_PROGRAM) {
                "run the command again with --fix".to_owned()
            } else {
                format!("cargo xtask preflight{arch} --fix")
            },
        )
        .into())
    }
}

fn as_json(preflight: &Preflight, ready: bool) -> serde_json::Value {
    let of_host = preflight.facts.first().map(|Facts { host, .. }| {
        json!({
            "os": host.os.name, "kernel": host.kernel, "cpus": host.cpus, "root": host.root, "systemd": host.systemd,
            "container": host.container, "libvirt": host.libvirt.as_ref().ok(),
        })
    });
    let findings = preflight.findings.iter().map(|finding| {
        let mut value = serde_json::to_value(finding).expect("a finding is plain data");
        value["commands"] = json!(fix::commands(preflight, [finding]));
        value
    });
    json!({
        "schema": 1,
        "ready": ready,
        "host": of_host,
        "findings": findings.collect::<Vec<_>>(),
        "fix": fix::plan(preflight),
    })
}

/// Formats the text for people: the machine, a block of lines for each finding, and the commands of `--fix`.
impl Display for Preflight {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let Some(Facts { host, .. }) = self.facts.first() {
            let nats = host.nats_server.as_ref().and_then(|version| version.as_ref().ok());
            let of = |known: Option<&String>| known.map_or("missing".to_owned(), Clone::clone);
            let (libvirt, nats) = (of(host.libvirt.as_ref().ok()), of(nats));
            writeln!(f, "{}, {}: libvirt {libvirt}, nats-server {nats}", host.os.name, host.describe())?;
        }
        for facts in &self.facts {
            let emulator = facts.working_emulator().map_or("missing", |emulator| &emulator.version);
            let firmware = match (&facts.firmware, &facts.edk2) {
                (Ok(_), Some(edk2)) => format!("edk2 {edk2}"),
                (Ok(_), None) => "firmware of unknown release".to_owned(),
                (Err(_), _) => "no firmware".to_owned(),
            };
            writeln!(f, "{:<8} QEMU {emulator}, {firmware}", facts.arch.to_string())?;
        }
        for finding in &self.findings {
            write_finding(f, self, finding)?;
        }
        let plan = fix::plan(self);
        if !plan.is_empty() {
            let how = match fix::for_root(self) {
                Some((why, _)) => format!("needs root; {why}"),
                None if fix::was_in_vain(self) => {
                    "--fix has run these, and they have changed nothing".to_owned()
                }
                None => "--fix runs these".to_owned(),
            };
            writeln!(f, "to install everything ({how}):")?;
            for command in plan {
                writeln!(f, "    {}", command.join(" "))?;
            }
        }
        if self.blocking().next().is_none() {
            writeln!(f, "ready")?;
        }
        Ok(())
    }
}

/// Prints a line for each finding that degrades, because it may explain the result of a run.
pub fn print_degradations(preflight: &Preflight) {
    for finding in preflight.findings.iter().filter(|finding| finding.severity == Severity::Degrades) {
        message!("note: {}", finding.sentence);
    }
}

fn write_finding(f: &mut Formatter<'_>, preflight: &Preflight, finding: &Finding) -> fmt::Result {
    writeln!(f, "{:<9} {}", name_of(&finding.severity), finding.sentence)?;
    let evidence = finding.evidence.trim_end().replace('\n', "\n                ");
    writeln!(f, "          seen: {evidence}")?;
    let commands = fix::lines(preflight, [finding]);
    match &finding.remedy {
        Some(Remedy::Manual(remedy)) => writeln!(f, "          to do: {remedy}")?,
        Some(Remedy::Install(..)) if commands.is_empty() => writeln!(
            f,
            "          to do: no package of this distribution is known to provide it; install it by hand, or choose an image \
             that does not need it"
        )?,
        Some(_) => {
            for command in commands {
                writeln!(f, "          to do: {command}")?;
            }
        }
        None => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_a_person_can_do_is_told_at_the_end() {
        let refusal = crate::preflight::remote::refusal::Refusal::Message("Permission denied".to_owned());
        let findings = vec![refusal.finding(&"qemu:///system".parse().unwrap())];
        let preflight = Preflight { facts: vec![findings::tests::sound()], findings, tried: Vec::new() };
        assert_eq!(fix::plan(&preflight), Vec::<Vec<String>>::new(), "nothing that --fix would run");
        let error = preflight.verdict().unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("the libvirt of --connect is not ready for aarch64: qemu:///system: ")
        );
        assert!(crate::error::hint(&error).unwrap().contains("usermod --append --groups libvirt"));
    }

    #[test]
    fn the_lines_of_the_evidence_stay_under_their_finding() {
        let findings = vec![Finding::informs("x", "a sentence", "one\ntwo\n")];
        let preflight = Preflight { facts: vec![findings::tests::sound()], findings, tried: Vec::new() };
        let shown = preflight.to_string();
        assert!(shown.contains("          seen: one\n                two\n"), "{shown}");
    }
}
