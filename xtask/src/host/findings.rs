//! Facts judged: pure, so that every finding can be tested without the machine that has it.

use serde::Serialize;

use super::facts::{DEBIAN_KEYRING, Facts};
use super::kvm::Kvm;
use super::packages::Need;
use crate::arch::VmArchitecture;

const GIB: u64 = 1 << 30;
/// An image, its build's intermediate files, and a run's overlay.
const DISK_NEEDED: u64 = 4 * GIB;
/// The default guest and QEMU itself.
const MEMORY_NEEDED: u64 = 5 * GIB / 2;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// No run can succeed.
    Blocks,
    /// It works, worse than it could.
    Degrades,
    /// Good to know.
    Informs,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable, for machines.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is so, in a few words.
    pub sentence: String,
    /// What was looked at: a path, a version, a command's output.
    pub evidence: String,
    /// What to do.
    pub remedy: Option<Remedy>,
}

impl Finding {
    /// What only a person can do about it.
    pub fn by_hand(&self) -> Option<&str> {
        match &self.remedy {
            Some(Remedy::Manual(text)) => Some(text),
            _ => None,
        }
    }
}

/// What to do about a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    /// Install what brings it.
    #[serde(serialize_with = "serialize_need")]
    Install(Need, VmArchitecture),
    /// Run this as root.
    RunAsRoot(Vec<Vec<String>>),
    /// Run this as oneself.
    Run(Vec<String>),
    /// Something that only a person can do.
    Manual(String),
}

fn serialize_need<S: serde::Serializer>(
    need: &Need,
    arch: &VmArchitecture,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format!("{need:?} for {arch}"))
}

fn blocks(
    id: &'static str,
    sentence: impl Into<String>,
    evidence: impl Into<String>,
    remedy: Remedy,
) -> Finding {
    let (sentence, evidence) = (sentence.into(), evidence.into());
    Finding { id, severity: Severity::Blocks, sentence, evidence, remedy: Some(remedy) }
}

/// Everything that is to be said of a machine.
pub fn judge(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    judge_virtualisation(facts, &mut findings);
    judge_programs(facts, &mut findings);
    judge_build(facts, &mut findings);
    judge_image_build(facts, &mut findings);
    judge_room(facts, &mut findings);
    findings
}

fn judge_virtualisation(facts: &Facts, findings: &mut Vec<Finding>) {
    let arch = facts.arch;
    let emulator = arch.profile().emulator;
    match &facts.emulator {
        None => findings.push(blocks(
            "emulator",
            format!("{emulator} is missing"),
            "not on PATH",
            Remedy::Install(Need::Emulator, arch),
        )),
        Some((path, Err(error))) => findings.push(blocks(
            "emulator-broken",
            format!("{emulator} does not run"),
            error,
            Remedy::Manual(format!("reinstall the package that brings {}", path.display())),
        )),
        Some((path, Ok(version))) if older_than(version, (9, 1)) => findings.push(Finding {
            id: "emulator-old",
            severity: Severity::Degrades,
            sentence: format!("QEMU {version} works; 9.1 or newer emulates some 8 % faster"),
            evidence: path.display().to_string(),
            remedy: None,
        }),
        Some(_) => {}
    }
    if let Err(error) = &facts.firmware {
        let remedy = Remedy::Install(Need::Firmware, arch);
        findings.push(blocks("firmware", format!("UEFI firmware for {arch} is missing"), error, remedy));
    }
    if facts.libvirt_driver.is_none() {
        findings.push(blocks(
            "libvirt-driver",
            "libvirt's QEMU driver is missing",
            "no libvirt_driver_qemu.so in libvirt's connection-driver directory",
            Remedy::Install(Need::LibvirtDriver, arch),
        ));
    }
    if let Some(user) = facts.missing_libvirt_user {
        let command = format!(
            "useradd --system --user-group --home-dir /var/lib/libvirt --no-create-home --shell /usr/sbin/nologin {user}"
        );
        findings.push(blocks(
            "libvirt-user",
            format!("the account {user} is missing, without which libvirt does not start as root"),
            format!("getent passwd {user}"),
            Remedy::RunAsRoot(vec![command.split(' ').map(str::to_owned).collect()]),
        ));
    }
    if let Kvm::No(reason) | Kvm::Failed(reason) = &facts.kvm {
        findings.push(Finding {
            id: "kvm",
            severity: Severity::Informs,
            sentence: format!("{arch} guests are emulated"),
            evidence: reason.clone(),
            remedy: None,
        });
    }
}

fn judge_programs(facts: &Facts, findings: &mut Vec<Finding>) {
    for (program, need) in &facts.missing_programs {
        findings.push(blocks(
            "program",
            format!("{program} is missing"),
            "not on PATH nor in the system directories",
            Remedy::Install(*need, facts.arch),
        ));
    }
}

fn judge_build(facts: &Facts, findings: &mut Vec<Finding>) {
    let arch = facts.arch;
    if !facts.pkg_config {
        let remedy = Remedy::Install(Need::PkgConfig, arch);
        findings.push(blocks("pkg-config", "pkg-config is missing", "not on PATH", remedy));
    }
    if let Err(error) = &facts.libvirt {
        let remedy = Remedy::Install(Need::LibvirtHeaders, arch);
        findings.push(blocks("libvirt-headers", "libvirt's headers are missing", error, remedy));
    }
    let triple = arch.profile().triple;
    match &facts.rust_target {
        Ok(true) => {}
        Ok(false) => findings.push(blocks(
            "rust-target",
            format!("Rust's standard library for {triple} is missing"),
            "rustc --print target-libdir names a directory without it",
            Remedy::Run(["rustup", "target", "add", triple].map(str::to_owned).to_vec()),
        )),
        Err(error) => findings.push(blocks(
            "rust",
            "rustc does not answer",
            error,
            Remedy::Manual("install Rust by rustup".to_owned()),
        )),
    }
    if let Err(error) = &facts.linker {
        let remedy = Remedy::Install(Need::CrossLinker, arch);
        findings.push(blocks("linker", format!("the linker for {triple} does not work"), error, remedy));
    }
}

fn judge_image_build(facts: &Facts, findings: &mut Vec<Finding>) {
    let arch = facts.arch;
    let handler = format!("qemu-{}", arch.profile().machine);
    if !facts.debian_keyring {
        let remedy = Remedy::Install(Need::Keyring, arch);
        findings.push(blocks("keyring", "the keys of Debian's archive are missing", DEBIAN_KEYRING, remedy));
    }
    if let Some(error) = &facts.no_user_namespace {
        findings.push(blocks(
            "user-namespace",
            "an ordinary user cannot build an image here",
            error,
            Remedy::Manual(
                "give the user subordinate ids (usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER); on \
                 Ubuntu 24.04 also: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; or run as root"
                    .to_owned(),
            ),
        ));
    }
    if facts.runs_guest_programs {
        return;
    }
    let why = format!("no enabled /proc/sys/fs/binfmt_misc/{handler}");
    let sentence = format!("this kernel does not run {arch} programs, as building an image needs");
    match &facts.registers_handlers {
        Some(program) if facts.user_emulator => {
            // Where there is no systemd to do it, installing the package registers nothing.
            let mut commands = Vec::new();
            let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
            if !facts.binfmt_mounted {
                commands.push(words("mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc"));
            }
            let mut register = vec![program.display().to_string()];
            if program.ends_with("update-binfmts") {
                register.extend(["--enable".to_owned(), handler]);
            }
            commands.push(register);
            findings.push(blocks("binfmt", sentence, why, Remedy::RunAsRoot(commands)));
        }
        _ => {
            findings.push(blocks("user-emulation", sentence, why, Remedy::Install(Need::UserEmulation, arch)))
        }
    }
}

fn judge_room(facts: &Facts, findings: &mut Vec<Finding>) {
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / GIB as f64);
    match &facts.cache {
        Err(error) => findings.push(blocks(
            "cache",
            "there is no place for the cache",
            error,
            Remedy::Manual("set IOT_XTASK_CACHE".into()),
        )),
        Ok(cache) => {
            if let Some(free) = facts.free_disk.filter(|free| *free < DISK_NEEDED) {
                findings.push(blocks(
                    "disk",
                    format!("{} free for images and runs, {} needed", gib(free), gib(DISK_NEEDED)),
                    cache.display().to_string(),
                    Remedy::Manual("free some space, or set IOT_XTASK_CACHE to a larger file system".into()),
                ));
            }
        }
    }
    if let Some(free) = facts.free_memory.filter(|free| *free < MEMORY_NEEDED) {
        findings.push(Finding {
            id: "memory",
            severity: Severity::Degrades,
            sentence: format!(
                "{} of memory available, {} wanted for the default guest",
                gib(free),
                gib(MEMORY_NEEDED)
            ),
            evidence: "MemAvailable in /proc/meminfo".to_owned(),
            remedy: Some(Remedy::Manual("close something, or use smoke --memory 1024".to_owned())),
        });
    }
}

fn older_than(version: &str, (major, minor): (u32, u32)) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) < (major, minor)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::agent_build::linker::Linker;
    use crate::host::firmware::Firmware;
    use crate::host::packages::PackageManager;

    /// A machine that lacks nothing.
    pub(crate) fn sound() -> Facts {
        Facts {
            arch: VmArchitecture::Aarch64,
            os: "Debian GNU/Linux 12 (bookworm)".into(),
            kernel: "6.1".into(),
            cpus: 2,
            root: true,
            escalation: None,
            package_manager: Some(PackageManager::Apt),
            missing_programs: Vec::new(),
            emulator: Some(("/usr/bin/qemu-system-aarch64".into(), Ok("10.0.2".into()))),
            firmware: Ok(Firmware { code: "/c".into(), vars_template: "/v".into() }),
            nats_server: Some("2.9.10".into()),
            pkg_config: true,
            libvirt: Ok("9.0.0".into()),
            libvirt_driver: Some("/usr/lib/d.so".into()),
            missing_libvirt_user: None,
            rust_target: Ok(true),
            linker: Ok(Linker { program: "cc".into(), origin: "test".into() }),
            kvm: Kvm::Opens,
            cache: Ok("/c".into()),
            free_disk: Some(80 * GIB),
            free_memory: Some(8 * GIB),
            runs_guest_programs: true,
            user_emulator: true,
            registers_handlers: Some("/usr/sbin/update-binfmts".into()),
            no_user_namespace: None,
            binfmt_mounted: true,
            debian_keyring: true,
        }
    }

    fn ids(change: impl FnOnce(&mut Facts)) -> Vec<&'static str> {
        let mut facts = sound();
        change(&mut facts);
        judge(&facts).iter().map(|finding| finding.id).collect()
    }

    #[test]
    fn a_sound_machine_has_no_findings() {
        assert_eq!(ids(|_| {}), Vec::<&str>::new());
    }

    #[test]
    fn each_lack_is_found_under_its_own_id() {
        type Change = fn(&mut Facts);
        let table: &[(&str, Change)] = &[
            ("emulator", |f| f.emulator = None),
            ("emulator-broken", |f| f.emulator.as_mut().unwrap().1 = Err("signal 11".into())),
            ("emulator-old", |f| f.emulator.as_mut().unwrap().1 = Ok("7.2.22".into())),
            ("firmware", |f| f.firmware = Err("none".into())),
            ("libvirt-driver", |f| f.libvirt_driver = None),
            ("libvirt-user", |f| f.missing_libvirt_user = Some("libvirt-qemu")),
            ("libvirt-headers", |f| f.libvirt = Err("none".into())),
            ("pkg-config", |f| f.pkg_config = false),
            ("rust-target", |f| f.rust_target = Ok(false)),
            ("rust", |f| f.rust_target = Err("no rustc".into())),
            ("linker", |f| f.linker = Err("none".into())),
            ("program", |f| f.missing_programs = vec![("mcopy", Need::Mtools)]),
            ("keyring", |f| f.debian_keyring = false),
            ("user-namespace", |f| f.no_user_namespace = Some("EPERM".into())),
            ("binfmt", |f| f.runs_guest_programs = false),
            ("user-emulation", |f| (f.runs_guest_programs, f.user_emulator) = (false, false)),
            ("cache", |f| f.cache = Err("none".into())),
            ("disk", |f| f.free_disk = Some(GIB)),
            ("memory", |f| f.free_memory = Some(GIB)),
            ("kvm", |f| f.kvm = Kvm::No("no /dev/kvm".into())),
        ];
        for (id, change) in table {
            assert_eq!(ids(change), [*id]);
        }
    }

    #[test]
    fn whatever_blocks_has_a_remedy() {
        let mut facts = sound();
        facts.emulator = None;
        facts.linker = Err("none".into());
        facts.missing_programs = vec![("mcopy", Need::Mtools)];
        for finding in judge(&facts).iter().filter(|finding| finding.severity == Severity::Blocks) {
            assert!(finding.remedy.is_some(), "{finding:?}");
        }
    }
}
