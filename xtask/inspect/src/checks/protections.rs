//! `exec-stack`, `relro`, `pie`, `bti-pac`: reports which protections the builder of the file has chosen.

use object::elf::{DF_1_NOW, DF_BIND_NOW, DT_BIND_NOW, DT_FLAGS, DT_FLAGS_1, ET_DYN, PF_X};

use crate::Target;
use crate::elf::Elf;
use crate::finding::Finding;
use crate::isa::Isa;

pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>, findings: &mut Vec<Finding>) {
    findings.push(stack(elf));
    findings.push(relro(elf));
    let pie = if elf.kind() == ET_DYN {
        "yes: it is loaded at a random address"
    } else {
        "no: it is loaded at a fixed address"
    };
    findings.push(Finding::informs("pie", pie));
    findings.push(branches(elf, target));
}

fn stack(elf: &Elf<'_>) -> Finding {
    let remedy =
        "an assembler file without .note.GNU-stack does that: add the note, or link with -z noexecstack";
    let hardened = "hardened kernels and services (MemoryDenyWriteExecute=) refuse it";
    match elf.stack_flags() {
        Some(flags) if flags & PF_X.0 == 0 => Finding::informs("exec-stack", "no"),
        Some(_) => Finding::warned("exec-stack", "its stack is executable", hardened, remedy),
        None => Finding::informs(
            "exec-stack",
            "the file does not say; the kernel's default for the architecture applies",
        ),
    }
}

fn relro(elf: &Elf<'_>) -> Finding {
    let flag = |tag, bit: u64| elf.dynamic.value(tag).is_some_and(|flags| flags & bit != 0);
    let flagged = flag(DT_FLAGS, DF_BIND_NOW.0) || flag(DT_FLAGS_1, DF_1_NOW.0);
    let found = match (elf.relro, flagged || elf.dynamic.value(DT_BIND_NOW).is_some()) {
        (Some(_), true) => "full: relocations are read-only once it runs",
        (Some(_), false) => "partial: the table of lazily bound functions stays writable",
        (None, _) => "none",
    };
    Finding::informs("relro", found)
}

/// Reports the protection of branches. A core without these features treats their instructions as hints, which cost
/// nothing and do not fail.
fn branches(elf: &Elf<'_>, target: &Target<'_>) -> Finding {
    let names: &[(u32, &str)] = match target.device.isa {
        Isa::Aarch64 => &[(1, "BTI"), (2, "PAC"), (4, "GCS")],
        Isa::X86_64 => &[(1, "IBT"), (2, "SHSTK")],
    };
    let bits = elf.branch_protection().unwrap_or(0);
    let found: Vec<_> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
    let found = if found.is_empty() { "no branch protection".to_owned() } else { found.join(", ") };
    Finding::informs("bti-pac", found)
}
