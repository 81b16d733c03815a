//! The findings about the programs that every run needs, and, if an image may have to be built, about the requirements
//! of this build.

use super::finding::{CI_PROGRAM, Finding, Remedy, TORTURE_PROGRAM};
use crate::host::facts::{Built, Facts};
use crate::host::local::{DEBIAN_KEYRING, Purpose, When};
use crate::host::packages::Need;
use crate::image::choice::Choice;

pub(super) fn evaluate(facts: &Facts, findings: &mut Vec<Finding>) {
    let host = &facts.host;
    let missing = |needed: fn(When, bool) -> bool| {
        host.missing_programs.iter().filter(move |(_, _, when)| needed(*when, host.root))
    };
    let of_purpose = || host.missing_programs.iter().filter(|(_, _, when)| facts.purpose.needs(*when));
    let block = |(program, need, _): &(&str, Need, When)| {
        let (sentence, evidence) =
            (format!("{program} is missing"), "not on PATH nor in the system directories");
        Finding::blocks("program", sentence, evidence, Remedy::Install(*need, facts.arch))
    };
    findings.extend(missing(|when, _| when == When::Always).map(block));
    let (id, user) = match facts.purpose {
        Purpose::Torture => (TORTURE_PROGRAM, "torture"),
        Purpose::Run | Purpose::TestSuite => (CI_PROGRAM, "the test suite"),
    };
    // These programs do not depend on the architecture of the guest.
    findings.extend(of_purpose().map(|(program, need, _)| {
        let sentence = format!("{program} is missing; {user} starts it");
        Finding::blocks(id, sentence, "not on PATH", Remedy::Install(*need, facts.arch))
    }));
    let to_build = |when: When, root: bool| when == When::Building || when == When::BuildingAsUser && !root;
    let has_no_package = |(_, need, _): &&(&str, Need, When)| {
        host.package_manager.is_none_or(|manager| manager.packages(*need, facts.arch).is_empty())
    };
    match (facts.guest.built, missing(to_build).find(has_no_package)) {
        (Built::No, _) => {}
        // No package provides a program that only the build of the fallback image needs. This does not block, because a
        // run of the chosen image works.
        (Built::Fallback, Some((program, ..))) => findings.push(no_fallback(facts, program)),
        (Built::Chosen | Built::Fallback, _) => {
            findings.extend(missing(to_build).map(block));
            check_build(facts, findings);
        }
    }
}

fn no_fallback(facts: &Facts, program: &str) -> Finding {
    let Choice { image, fallback } = &facts.guest.choice;
    let image = &image.name;
    let fallback = fallback.as_ref().map_or("any other", |image| &image.name);
    Finding::degrades(
        "no-fallback",
        format!(
            "the fallback image {fallback} cannot be built; it is needed only if the host of {image} cannot be reached"
        ),
        format!("{program} is missing, and no package of this distribution is known to provide it"),
        "if that host is reachable, no action is needed; pass --strict-image to fail instead",
    )
}

/// Adds findings about the requirements of an image build other than programs.
fn check_build(facts: &Facts, findings: &mut Vec<Finding>) {
    let host = &facts.host;
    if !host.debian_keyring {
        let remedy = Remedy::Install(Need::Keyring, facts.arch);
        let sentence = "the keys of Debian's archive are missing";
        findings.push(Finding::blocks("keyring", sentence, DEBIAN_KEYRING, remedy));
    }
    findings.extend(host.no_mounts.as_ref().map(|error| no_mounts(facts, error)));
    if !facts.runs_guest_programs {
        findings.push(guest_programs(facts));
    }
}

/// Returns the finding for a user who cannot mount file systems as an image build does. If only the fallback image
/// cannot be built, it does not block, because a run of the chosen image works.
fn no_mounts(facts: &Facts, error: &str) -> Finding {
    let how = if facts.guest.built == Built::Chosen { Finding::blocks } else { Finding::degrades };
    if facts.host.root {
        return how(
            "mount",
            "root cannot mount file systems here, which an image build needs",
            error,
            "start the container with --privileged, or with --cap-add SYS_ADMIN and a security profile that allows \
             mounts; or choose an image that is downloaded",
        );
    }
    how(
        "user-namespace",
        "an ordinary user cannot build an image here",
        error,
        "assign the user subordinate ids (usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER); on \
         Ubuntu 24.04 also: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; or run as root; or choose an \
         image that is downloaded",
    )
}

fn guest_programs(facts: &Facts) -> Finding {
    let (arch, host) = (facts.arch, &facts.host);
    let handler = format!("qemu-{}", arch.profile().machine);
    let why = format!("/proc/sys/fs/binfmt_misc/{handler} is missing or disabled");
    let sentence = format!("this kernel does not run {arch} programs; image builds need them");
    match &facts.registers_handler {
        Some(register) if facts.user_emulator => {
            // The emulator is installed but not registered: without systemd, its package does not register it.
            let mount = "mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc".split(' ');
            let mount = (!host.binfmt_mounted).then(|| mount.map(str::to_owned).collect());
            let commands = mount.into_iter().chain([register.clone()]).collect();
            Finding::blocks("binfmt", sentence, why, Remedy::RunAsRoot(commands))
        }
        _ => Finding::blocks("user-emulation", sentence, why, Remedy::Install(Need::UserEmulation, arch)),
    }
}
