//! The text of `torture --list`.

use xtask_core::cli::{DeviceFault, FaultGroup};
use xtask_core::format::name_of;
use xtask_core::limits::{CHANGES, HEALING};

use crate::effect::{Effect, effect_of};

/// The column at which the explanations begin.
const COLUMN: usize = 24;
/// The width of the text, which must fit on a screen.
const WIDTH: usize = 110;

/// Returns the explanation of each fault, by groups: what happens, how long it lasts, the bound with its causes, and what
/// must hold. The text has no end of line after its last line.
pub fn list() -> String {
    let mut lines = vec![format!(
        "A device must heal within the time of the causes plus {} s, counted from the end of the fault.\nIn {} s of that, it \
         follows the changes that the fleet has made during the fault.",
        (CHANGES + HEALING).as_secs(),
        CHANGES.as_secs()
    )];
    let mut group: Option<FaultGroup> = None;
    for fault in DeviceFault::all() {
        if group != Some(fault.group()) {
            group = Some(fault.group());
            lines.extend([String::new(), name_of(&fault.group())]);
        }
        let effect = effect_of(*fault);
        let holds: Vec<_> = effect.holds.iter().map(|invariant| invariant.text()).collect();
        let texts = [
            format!("{}.", fault.explanation()),
            length(&effect),
            format!("heals within {}", bound(&effect)),
            format!("meanwhile: {}", holds.join(", ")),
        ];
        for (place, line) in texts.iter().flat_map(|text| wrapped(text)).enumerate() {
            let name = if place == 0 { fault.to_string() } else { String::new() };
            lines.push(format!("  {name:width$}{line}", width = COLUMN - 2));
        }
    }
    lines.join("\n")
}

fn length(effect: &Effect) -> String {
    match &effect.lengths {
        None => "lasts for a moment".to_owned(),
        Some(lengths) if lengths.start() == lengths.end() => format!("lasts {} s", lengths.start()),
        Some(lengths) => format!("lasts {} to {} s", lengths.start(), lengths.end()),
    }
}

/// Returns the bound as a sum, and its causes.
fn bound(effect: &Effect) -> String {
    let bound = effect.bound();
    let boot = if bound.boot { "a boot + " } else { "" };
    let causes: Vec<_> = effect
        .causes
        .iter()
        .map(|cause| format!("{} ({}\u{a0}s)", cause.text, cause.time.as_secs()))
        .collect();
    format!("{boot}{} s + {} s: {}", bound.own.as_secs(), (CHANGES + HEALING).as_secs(), causes.join(", "))
}

/// Breaks a text into lines that fit beside the names, but not at a no-break space. All lines but the first are indented.
fn wrapped(text: &str) -> Vec<String> {
    const INDENT: &str = "  ";
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last().map_or(0, |line| line.chars().count());
        if COLUMN + line + 1 + word.chars().count() > WIDTH {
            lines.push(INDENT.to_owned());
        }
        if let Some(line) = lines.last_mut() {
            if !line.trim_start().is_empty() {
                line.push(' ');
            }
            line.push_str(&word.replace('\u{a0}', " "));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn the_list_explains_each_fault() {
        let text = list();
        for fault in DeviceFault::all() {
            let name = format!("\n  {fault} ");
            assert_eq!(text.matches(&name).count(), 1, "{fault}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        golden::compare("list.txt", format!("{text}\n"));
    }
}
