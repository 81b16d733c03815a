//! The smokes of one call of `smoke`: `--arch` and `--image` more than once, and `--host`.

use super::args::MachineArgs;
use super::faults::{Disturb, Disturbance, Sabotage};
use super::image::ImageArgs;
use super::place::PlaceArgs;
use super::repeated::Repeated;
use super::smoke::SmokeArgs;
use crate::arch::VmArchitecture;
use crate::error::Failure;
use crate::format::name_of;
use crate::libvirt_uri::ConnectUri;

impl SmokeArgs {
    /// Returns whether this call runs its smokes as processes of their own, and ends with a table.
    pub fn is_several(&self) -> bool {
        self.repeated.arches.len() > 1 || self.repeated.images.len() > 1 || !self.hosts.is_empty()
    }

    /// Returns the libvirts that run the smokes of this call: those of `--host`, or else that of `--connect` or the
    /// embedded one.
    pub fn places(&self) -> Vec<PlaceArgs> {
        let on = |uri: &ConnectUri| PlaceArgs { connect: Some(uri.clone()), ..self.place.clone() };
        match self.hosts.as_slice() {
            [] => vec![self.place.clone()],
            hosts => hosts.iter().map(on).collect(),
        }
    }

    /// Returns the guest's machine with each image of this call.
    pub fn machines(&self) -> Vec<MachineArgs> {
        let with = |image: &String| {
            let image = ImageArgs { image: Some(image.clone()), ..self.machine.image.clone() };
            MachineArgs { image, ..self.machine.clone() }
        };
        match self.repeated.images.as_slice() {
            [] => vec![self.machine.clone()],
            images => images.iter().map(with).collect(),
        }
    }

    /// Returns the single smokes of this call: one for each pair of an architecture and an image.
    pub fn smokes(&self) -> Vec<Self> {
        let machines = self.machines();
        let of = |arch: VmArchitecture, machine: &MachineArgs| {
            let images = machine.image.image.iter().cloned().collect();
            let mut smoke = self.clone();
            smoke.repeated = Repeated { arches: vec![arch], images };
            smoke.hosts.clear();
            smoke.build.arch = arch;
            smoke.machine = machine.clone();
            smoke
        };
        let of_arch =
            |arch: &VmArchitecture| machines.iter().map(|machine| of(*arch, machine)).collect::<Vec<_>>();
        self.repeated.arches.iter().flat_map(of_arch).collect()
    }

    /// Checks that the libvirts on which the smokes of this call run support the flags.
    ///
    /// # Errors
    /// Returns the errors of [`PlaceArgs::check_to_run`], and a usage error for a flag that only the embedded driver supports.
    pub fn check_places(&self) -> Result<(), Failure> {
        let places = self.places();
        places.iter().try_for_each(PlaceArgs::check_to_run)?;
        let Some(uri) = places.iter().find_map(|place| place.connect.as_ref()) else { return Ok(()) };
        let stops_qemu = |disturb: Disturb| disturb.disturbance == Disturbance::QemuStopped;
        let embedded_alone = [
            // The guest's disk is a file of the daemon's host.
            (self.fsck, "--fsck"),
            (self.warm, "--warm"),
            (self.verify_cold, "--verify-cold"),
            (self.power_cuts > 0, "--power-cuts"),
            (self.sabotage == Some(Sabotage::StaleChain), "--sabotage stale-chain"),
            (self.sabotage == Some(Sabotage::OpenNetwork), "--sabotage open-network"),
            (self.disturb.is_some_and(stops_qemu), "--disturb qemu-stopped"),
        ];
        match embedded_alone.into_iter().find(|(is_given, _)| *is_given) {
            Some((_, flag)) => Err(Failure::usage(format!(
                "{flag} needs libvirt's embedded driver, and this call uses the daemon {uri}; leave one of them out"
            ))),
            None => Ok(()),
        }
    }

    /// Checks that each flag of a call with several smokes applies to all of them.
    ///
    /// # Errors
    /// Returns a usage error for a flag of a single smoke, and for a value that is given twice. Also returns one for
    /// `--agent` with several architectures, and for `--image-digest` with several images.
    pub fn check_several(&self) -> Result<(), Failure> {
        if !self.is_several() {
            return Ok(());
        }
        let Repeated { arches, images } = &self.repeated;
        let hosts: Vec<_> = self.hosts.iter().map(ToString::to_string).collect();
        let arches: Vec<_> = arches.iter().map(ToString::to_string).collect();
        for (flag, values) in [("--arch", &arches), ("--image", images), ("--host", &hosts)] {
            let twice = values.iter().enumerate().find(|(at, value)| values[..*at].contains(value));
            if let Some((_, value)) = twice {
                return Err(Failure::usage(format!("{flag} {value} is given twice; leave one out")));
            }
        }
        if arches.len() > 1 && self.agent.is_some() {
            return Err(Failure::usage(format!(
                "--agent names an executable for one architecture, and --arch names {}: leave --agent out, or run one \
                 smoke for each executable",
                arches.join(" and ")
            )));
        }
        if images.len() > 1 && self.machine.image.image_digest.is_some() {
            return Err(Failure::usage(
                "--image-digest is the digest of one image, and --image names several: run one smoke for each digest",
            ));
        }
        let sabotage = self.sabotage.as_ref().map(|fault| format!("--sabotage {}", name_of(fault)));
        let single = [
            (self.keep, "--keep"),
            (self.keep_on_failure, "--keep-on-failure"),
            (self.verify_cold, "--verify-cold"),
            (self.power_cuts > 0, "--power-cuts"),
            (sabotage.is_some(), sabotage.as_deref().unwrap_or_default()),
        ];
        match single.into_iter().find(|(is_given, _)| *is_given) {
            Some((_, flag)) => Err(Failure::usage(format!(
                "{flag} is a flag of a single smoke: give one --arch, at most one --image and no --host"
            ))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command as Subcommand, HeavyCommand};

    fn parsed(words: &str) -> SmokeArgs {
        let line = ["xtask", "smoke"].into_iter().chain(words.split_whitespace());
        let Subcommand::Heavy(HeavyCommand::Smoke(args)) = Cli::parse_from(line).command else {
            panic!("smoke")
        };
        *args
    }

    #[test]
    fn a_call_has_a_smoke_for_each_pair_of_an_architecture_and_an_image() {
        let pairs = |words: &str| {
            let args = parsed(words);
            let pair = |smoke: SmokeArgs| {
                assert!(!smoke.is_several(), "{words}");
                let image = smoke.machine.image.image.unwrap_or_default();
                format!("{}/{image}", smoke.build.arch)
            };
            (args.is_several(), args.smokes().into_iter().map(pair).collect::<Vec<_>>().join(" "))
        };
        for (words, is_several, expected) in [
            ("", false, "x86_64/"),
            ("--arch aarch64 --image a", false, "aarch64/a"),
            ("--host qemu:///system", true, "x86_64/"),
            ("--arch aarch64 --arch x86_64", true, "aarch64/ x86_64/"),
            ("--image a --image b", true, "x86_64/a x86_64/b"),
            (
                "--arch aarch64 --image a --arch x86_64 --image b",
                true,
                "aarch64/a aarch64/b x86_64/a x86_64/b",
            ),
        ] {
            assert_eq!(pairs(words), (is_several, expected.to_owned()), "{words}");
        }
        let places = |words: &str| {
            let uri = |place: PlaceArgs| place.connect.map_or("here".to_owned(), |uri| uri.to_string());
            parsed(words).places().into_iter().map(uri).collect::<Vec<_>>()
        };
        assert_eq!(places(""), ["here"]);
        assert_eq!(places("--arch aarch64 --arch x86_64 --connect qemu:///session"), ["qemu:///session"]);
        let two = ["qemu:///system", "qemu+ssh://far/system"];
        assert_eq!(places(&format!("--host {} --host {}", two[0], two[1])), two);
        let first = parsed("--arch aarch64 --arch x86_64 --image a --image b");
        assert_eq!(
            (first.build.arch, first.machine.image.image.as_deref()),
            (VmArchitecture::Aarch64, Some("a"))
        );
    }

    #[test]
    fn a_flag_of_a_single_smoke_is_refused_for_several() {
        let two = "--arch aarch64 --arch x86_64";
        for (words, reason) in [
            (format!("{two} --agent f"), "--agent names an executable for one architecture"),
            (format!("{two} --keep"), "--keep is a flag of a single smoke"),
            (format!("{two} --keep-on-failure"), "--keep-on-failure is a flag"),
            (format!("{two} --verify-cold"), "--verify-cold is a flag"),
            (format!("{two} --power-cuts 3"), "--power-cuts is a flag"),
            (format!("{two} --sabotage kill-qemu"), "--sabotage kill-qemu is a flag"),
            ("--host qemu:///system --keep".to_owned(), "no --host"),
            (format!("{two} --arch x86_64"), "--arch x86_64 is given twice"),
            ("--image a --image a".to_owned(), "--image a is given twice"),
            ("--host qemu:///system --host qemu:///system".to_owned(), "is given twice"),
            (format!("--image a --image b --image-digest sha256:{}", "0".repeat(64)), "digest of one image"),
        ] {
            let error = parsed(&words).check_several().unwrap_err();
            assert_eq!(error.kind, crate::error::Kind::Usage, "{words}");
            assert!(error.to_string().contains(reason), "{words}: {error}");
        }
        for words in ["--keep --sabotage kill-qemu", "--image a --image b --agent f --fsck", two] {
            parsed(words).check_several().unwrap();
        }
    }
}
