//! `instructions`: finds instructions that the target's core lacks.

use super::judgement::{Judged, asks_in_secret, judge};
use crate::Target;
use crate::bounds::entered_inside;
use crate::elf::{Elf, shown};
use crate::finding::{Finding, Severity};
use crate::functions::{Functions, Section, needy, starts};
use crate::guard::{Detection, Use, go_level};
use crate::isa::Isa;
use crate::isa::features::{Feature, Set};

pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>, findings: &mut Vec<Finding>) {
    let lacks = !target.device.features;
    let mut judged: Vec<Judged<'_>> = Vec::new();
    let (mut detection, mut left) = (None, 0);
    let mut starts = starts(elf);
    for code in elf.code() {
        let Some(mut functions) = Functions::of(&starts, &code) else { continue };
        let isa = target.device.isa;
        let section = Section { isa, elf, code: &code, functions: &functions };
        let (mut found, mut more) = needy(&section, lacks);
        let inside = entered_inside(&section, &found, lacks);
        if !inside.is_empty() {
            starts.extend(inside);
            starts.sort_unstable();
            functions = Functions::of(&starts, &code).unwrap_or(functions);
            (found, more) = needy(&Section { isa, elf, code: &code, functions: &functions }, lacks);
        }
        let section = Section { isa, elf, code: &code, functions: &functions };
        left += more;
        if found.is_empty() {
            continue;
        }
        let detection = detection.get_or_insert_with(|| Detection::of(elf));
        if judge(&section, lacks, detection, &found, &mut judged) && detection.is_absent() {
            detection.how.push("by its identification registers".to_owned());
        }
    }
    let detection = detection.unwrap_or_default();
    if detection.go {
        findings.extend(go(elf, target));
    }
    if judged.is_empty() {
        let found = format!("no instruction that this device lacks: {}", target.device.about);
        findings.push(Finding::informs("instructions", found));
    }
    for severity in [Severity::Refused, Severity::Warned, Severity::Informs] {
        let of_it: Vec<_> = judged.iter().filter(|judged| self::severity(&judged.used) == severity).collect();
        if !of_it.is_empty() {
            let asks = asks(&detection, elf);
            findings.push(finding(severity, &of_it, &asks, left, target));
        }
    }
}

/// Returns a finding if Go's compiler used, without a check at run time, features that the device lacks.
fn go(elf: &Elf<'_>, target: &Target<'_>) -> Option<Finding> {
    let isa = target.device.isa;
    let variable = match isa {
        Isa::Aarch64 => "GOARM64",
        Isa::X86_64 => "GOAMD64",
    };
    let (setting, needs) = go_level(isa, elf.data)?;
    let lacking = named(isa, needs & !target.device.features);
    if lacking.is_empty() {
        return None;
    }
    Some(Finding::refused(
        "instructions",
        &format!("Go compiled it with {variable}={setting}: it uses {} without a check", lacking.join(", ")),
        &format!("{} lacks them", target.device.about),
        &format!("compile it with a lower {variable}; Go's own default runs everywhere"),
    ))
}

fn named(isa: Isa, set: Set) -> Vec<String> {
    let named = |index| {
        isa.features().get(index).map(|feature: &Feature| format!("{} ({})", feature.name, feature.level))
    };
    set.iter().filter_map(named).collect()
}

fn severity(used: &Use) -> Severity {
    match used {
        Use::Plain => Severity::Refused,
        Use::Unclear => Severity::Warned,
        Use::Guarded(_) => Severity::Informs,
    }
}

/// Returns how the file asks the processor for its features, as far as that is known.
fn asks(detection: &Detection, elf: &Elf<'_>) -> String {
    match detection.how.as_slice() {
        [] if asks_in_secret(elf) => {
            "it is static and has no symbols, so that it is unknown whether it asks the processor".to_owned()
        }
        [] => "nothing in it asks the processor".to_owned(),
        how => format!("it asks the processor: {}", how.join(", ")),
    }
}

fn finding(
    severity: Severity,
    judged: &[&Judged<'_>],
    asks: &str,
    left: usize,
    target: &Target<'_>,
) -> Finding {
    let needs = judged.iter().fold(Set::NONE, |set, judged| set | judged.needs);
    let named = named(target.device.isa, needs & !target.device.features);
    let (count, functions) = (judged.iter().map(|judged| u64::from(judged.count)).sum::<u64>(), judged.len());
    let more = if left > 0 { format!(", and {left} more instructions") } else { String::new() };
    let used = match severity {
        Severity::Refused => "used without a check",
        Severity::Warned => "and it is not known whether something checks before they are used",
        Severity::Informs => "behind a check at run time, as far as is known",
    };
    let found = format!("{}: {count} instructions in {functions} functions{more}, {used}", named.join(", "));
    let offers = format!("{} lacks them; {asks}", target.device.about);
    let remedy = if severity == Severity::Informs { String::new() } else { remedy(target) };
    let details = judged.iter().map(|judged| {
        let name = judged.name.map_or_else(|| "a function without a name".to_owned(), shown);
        let why = match judged.used {
            Use::Guarded(why) => format!(": {why}"),
            _ => String::new(),
        };
        format!("{} at {:#x} in {name}{why}", judged.mnemonic, judged.address)
    });
    let paths = judged.iter().filter(|judged| !judged.path.is_empty()).map(|judged| judged.path.join(" > "));
    Finding::new("instructions", severity, found).offers(offers).remedy(remedy).details(details).paths(paths)
}

fn remedy(target: &Target<'_>) -> String {
    let level = match target.device.isa {
        Isa::Aarch64 => format!("-mcpu={}", target.device.cpu.as_deref().unwrap_or("generic")),
        Isa::X86_64 => format!("-march={}", target.device.name),
    };
    format!(
        "compile it and its static libraries for the device ({level}; Rust: -C target-cpu, never native), or choose between functions at run time"
    )
}
