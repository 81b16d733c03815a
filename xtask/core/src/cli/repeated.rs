//! The flags `--arch` and `--image` of `smoke`, which may be given more than once.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::arch::VmArchitecture;

/// All values of `--arch` and `--image`. The fields `build` and `machine` of [`super::SmokeArgs`] have the first ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Repeated {
    pub arches: Vec<VmArchitecture>,
    /// The values of `--image`; empty for the default image.
    pub images: Vec<String>,
}

/// Reads the values without removing them, because [`super::BuildArgs`] and [`super::ImageArgs`] then read the first
/// ones. Therefore the field of this type must be the first field of [`super::SmokeArgs`].
impl FromArgMatches for Repeated {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let arches = matches.get_many("arch").into_iter().flatten().copied().collect();
        let images = matches.get_many("image").into_iter().flatten().cloned().collect();
        Ok(Self { arches, images })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The flags themselves belong to [`super::BuildArgs`] and [`super::ImageArgs`].
impl Args for Repeated {
    fn augment_args(command: Command) -> Command {
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        command
    }
}

/// Lets `--arch` and `--image` be given more than once.
pub(super) fn repeatable(flag: Arg) -> Arg {
    if !["arch", "image"].contains(&flag.get_id().as_str()) {
        return flag;
    }
    let help = flag.get_help().map(ToString::to_string).unwrap_or_default();
    flag.action(ArgAction::Append).help(format!("{help}; may be repeated"))
}
