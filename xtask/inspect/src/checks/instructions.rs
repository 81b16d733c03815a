//! `instructions`: finds instructions that the target's core lacks.

use crate::Target;
use crate::elf::{Elf, shown};
use crate::finding::{Finding, Severity};
use crate::functions::{Functions, Needy, Path, Section, needy, reached, starts};
use crate::guard::{Detection, Graph, Use, chosen_for, go_level};
use crate::isa::Isa;
use crate::isa::features::{Feature, Set};

/// A function with instructions that the core lacks, and how the function is used.
struct Judged<'a> {
    name: Option<&'a [u8]>,
    address: u64,
    mnemonic: String,
    needs: Set,
    count: u32,
    used: Use,
}

pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>, findings: &mut Vec<Finding>) {
    let lacks = !target.device.features;
    let mut judged: Vec<Judged<'_>> = Vec::new();
    let (mut detection, mut left) = (None, 0);
    let starts = starts(elf);
    for code in elf.code() {
        let Some(functions) = Functions::of(&starts, &code) else { continue };
        let section = Section { isa: target.device.isa, elf, code: &code, functions: &functions };
        let (found, more) = needy(&section, lacks);
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
            findings.push(finding(severity, &of_it, &detection, left, target));
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

/// Decides for each function how it is used. Returns whether code of the section asks the processor for its features
/// directly. If no function needed a walk over the code, the result is false.
fn judge<'a>(
    section: &Section<'a, '_>,
    lacks: Set,
    detection: &Detection,
    found: &[Needy],
    judged: &mut Vec<Judged<'a>>,
) -> bool {
    let Section { isa, elf, code, .. } = *section;
    let names = names(section, found);
    // The graph is made only if it is needed, because it takes several walks over all of the code. Usually the names
    // are sufficient.
    let mut graph = None;
    for (needy, name) in found.iter().zip(names) {
        let function = needy.function as usize;
        let path = reached(section, function, lacks);
        if path == Path::None && !isa.is_amid_code(code.bytes, needy.first as usize) {
            continue;
        }
        let promised = name.map_or(Set::NONE, |name| chosen_for(isa, name));
        let is_chosen = (needy.needs & lacks & !promised).is_empty();
        let by_name = Use::Guarded("its name says that it is chosen for these features at run time");
        let used = match path {
            Path::Direct(_) if detection.go => Use::Guarded("Go tests the features that its runtime found"),
            // A name is evidence only if something in the file asks the processor for its features. Otherwise no code
            // can choose between functions.
            Path::Direct(_) if is_chosen && !detection.is_absent() => by_name,
            Path::Computed | Path::None if is_chosen => by_name,
            // If no path leads to these bytes, they may be a table between functions.
            Path::Computed | Path::None => Use::Unclear,
            Path::Direct(_) => {
                let graph = graph.get_or_insert_with(|| Graph::of(section, detection));
                let absent = graph.nobody_asks() && detection.is_absent();
                // A static executable without names may ask the processor in an unknown way, as musl's start code
                // does.
                let may_be_told = elf.dynamic.needed().next().is_none() && graph.tests(function);
                match (absent, is_chosen) {
                    (true, _) if !may_be_told => Use::Plain,
                    (_, true) => by_name,
                    _ => graph.used(function),
                }
            }
        };
        let first = if let Path::Direct(at) = path { at } else { needy.first as usize };
        let mnemonic = isa.mnemonic(code.bytes.get(first..).unwrap_or_default());
        let address = code.address.wrapping_add(first as u64);
        judged.push(Judged { name, address, mnemonic, needs: needy.needs, count: needy.count, used });
    }
    graph.is_some_and(|graph| !graph.nobody_asks())
}

/// Returns the names of the functions, in one pass over the symbols.
fn names<'a>(section: &Section<'a, '_>, found: &[Needy]) -> Vec<Option<&'a [u8]>> {
    let Section { isa, elf, functions, .. } = *section;
    let mut names: Vec<Option<&'a [u8]>> = vec![None; found.len()];
    for symbol in elf.symbols().filter(|symbol| symbol.function) {
        let Some(function) = functions.beginning_at(symbol.address) else { continue };
        if let Ok(at) = found.binary_search_by_key(&(function as u32), |needy| needy.function) {
            // If a function has several names, the one that names features is used.
            let says = |name: &[u8]| chosen_for(isa, name) != Set::NONE;
            let says_more = names[at].is_none_or(|known| !says(known) && says(symbol.name));
            if says_more {
                names[at] = Some(symbol.name);
            }
        }
    }
    names
}

fn finding(
    severity: Severity,
    judged: &[&Judged<'_>],
    detection: &Detection,
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
    let asks = match detection.how.as_slice() {
        [] => "nothing in it asks the processor".to_owned(),
        how => format!("it asks the processor: {}", how.join(", ")),
    };
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
    Finding::new("instructions", severity, found).offers(offers).remedy(remedy).details(details)
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
