//! What preflight found, for people and as JSON.

use std::fmt::{self, Display, Formatter};

use anyhow::Result;
use serde_json::json;

use super::findings::{Finding, Remedy, Severity};
use super::{Preflight, fix};
use crate::arch::VmArchitecture;
use crate::cli::PreflightArgs;
use crate::format::{name_of, print_json};
use crate::host::facts::Facts;

/// The guests' architectures: every one where none was named.
pub fn architectures(args: &PreflightArgs) -> Vec<VmArchitecture> {
    args.arch.map_or(VmArchitecture::ALL.to_vec(), |arch| vec![arch])
}

/// Shows what was found, as asked.
///
/// # Errors
/// The verdict, where something stands in the way.
pub fn present(preflight: &Preflight, args: &PreflightArgs) -> Result<()> {
    let verdict = preflight.verdict();
    if args.json {
        print_json(&as_json(preflight, verdict.is_ok()))?;
    } else {
        eprint!("{preflight}");
    }
    verdict
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
        value["commands"] = json!(commands(preflight, finding));
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

/// What does one finding's remedy on this machine.
fn commands(preflight: &Preflight, finding: &Finding) -> Vec<Vec<String>> {
    let facts = preflight.facts.first();
    facts.map(|facts| fix::commands(facts, std::iter::once(finding))).unwrap_or_default()
}

/// The whole screen: the machine, a block for each finding, and the commands of `--fix`.
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
            let barred = "needs root; neither sudo nor doas is installed";
            let how = if fix::wants_root(self) { barred } else { "--fix runs these" };
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

/// A line for each thing that may explain what a run does.
pub fn print_degradations(preflight: &Preflight) {
    for finding in preflight.findings.iter().filter(|finding| finding.severity == Severity::Degrades) {
        eprintln!("note: {}", finding.sentence);
    }
}

fn write_finding(f: &mut Formatter<'_>, preflight: &Preflight, finding: &Finding) -> fmt::Result {
    writeln!(f, "{:<9} {}", name_of(&finding.severity), finding.sentence)?;
    writeln!(f, "          seen: {}", finding.evidence)?;
    let commands = commands(preflight, finding);
    match &finding.remedy {
        Some(Remedy::Manual(remedy)) => writeln!(f, "          to do: {remedy}")?,
        Some(Remedy::Install(..)) if commands.is_empty() => writeln!(
            f,
            "          to do: no package of this distribution is known to provide it; install it by hand, or choose an image \
             that does not need it"
        )?,
        // The list of packages is brought up to date once, for all of them.
        Some(_) => {
            for command in commands.iter().filter(|command| !command.ends_with(&["update".to_owned()])) {
                writeln!(f, "          to do: {}", command.join(" "))?;
            }
        }
        None => {}
    }
    Ok(())
}
