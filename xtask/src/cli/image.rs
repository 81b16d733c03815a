//! The flags about images: which one a smoke boots, and `cargo xtask image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::arch::VmArchitecture;
use crate::digest::Digest;

/// Which image.
#[derive(Debug, Clone, Default, Args)]
pub struct ImageArgs {
    /// A name of `image list`, ./FILE or https://… [default: ubuntu-24.04, or debian-12 where its host cannot be reached]
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<String>,

    /// What a FILE or address must be: sha256:… or sha512:…
    #[arg(long, value_name = "DIGEST")]
    pub image_digest: Option<Digest>,

    /// Take a FILE or address without a digest; the verdict says so
    #[arg(long)]
    pub unverified: bool,

    /// Fail where the default image's host cannot be reached, instead of testing another image
    #[arg(long)]
    pub strict_image: bool,

    /// Use no network: an image that is not in the cache is an error
    #[arg(long)]
    pub offline: bool,
}

/// `image`.
#[derive(Debug, Clone, Subcommand)]
pub enum ImageCommand {
    /// List the images: what is pinned, what is cached, how big, how old, used by what
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Bring an image into the cache, downloaded or built, and print its path
    Fetch(ImageFetchArgs),
    /// Build an image from packages and print its path
    Build(ImageBuildArgs),
    /// Hash cached images again and compare
    Verify(ImageVerifyArgs),
    /// Print a cached image's path
    Path {
        /// The image, as the catalogue names it
        name: String,

        /// The guest's architecture
        #[arg(long, value_enum, default_value_t)]
        arch: VmArchitecture,

        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete cached images: without a criterion those that the catalogue does not name; never what a run uses
    Prune(PruneArgs),
    /// Pin an image's newest release: find it, verify its signed digests, rewrite the catalogue, show the difference
    Bump(BumpArgs),
}

/// `image fetch`.
#[derive(Debug, Clone, Args)]
pub struct ImageFetchArgs {
    /// A name of the catalogue, or an address: https, or http with a digest
    pub image: String,

    /// The guest's architecture
    #[arg(long, value_enum, default_value_t)]
    pub arch: VmArchitecture,

    /// What an address must bring: sha256:… or sha512:…
    #[arg(long, value_name = "DIGEST", conflicts_with = "unverified")]
    pub image_digest: Option<Digest>,

    /// Take from an address whatever comes
    #[arg(long)]
    pub unverified: bool,

    /// Put the file there instead of into the cache
    #[arg(long, value_name = "FILE")]
    pub to: Option<PathBuf>,

    /// Print JSON
    #[arg(long, conflicts_with = "to")]
    pub json: bool,
}

/// `image build`.
#[derive(Debug, Clone, Args)]
pub struct ImageBuildArgs {
    /// The image, as the catalogue names it
    pub name: String,

    /// The guest's architecture
    #[arg(long, value_enum, default_value_t)]
    pub arch: VmArchitecture,

    /// Build it although it is in the cache, and compare the digests
    #[arg(long)]
    pub rebuild: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `image verify`.
#[derive(Debug, Clone, Args)]
pub struct ImageVerifyArgs {
    /// Names of images [default: every cached one]
    pub names: Vec<String>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `image prune`.
#[derive(Debug, Clone, Default, Args)]
pub struct PruneArgs {
    /// Those that were not used for so many days
    #[arg(long, value_name = "DAYS")]
    pub older_than: Option<u64>,

    /// The longest unused, until the others fit, snapshots among them: 500M, 20G
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub keep: Option<u64>,

    /// Those that the catalogue does not name; the default without a criterion
    #[arg(long)]
    pub unnamed: bool,

    /// Delete nothing, say what would be
    #[arg(long)]
    pub dry_run: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Bytes, with K, M, G or T for powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let wanted = || format!("{text:?} is no size: write bytes, or a number with K, M, G or T");
    let (digits, shift) = match text.char_indices().last() {
        Some((at, unit)) if unit.is_ascii_alphabetic() => {
            let shift = "KMGT".find(unit.to_ascii_uppercase()).ok_or_else(wanted)?;
            (&text[..at], 10 * (shift as u32 + 1))
        }
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_not_digits| wanted())?;
    number.checked_shl(shift).filter(|bytes| bytes >> shift == number).ok_or_else(wanted)
}

/// `image bump`.
#[derive(Debug, Clone, Args)]
pub struct BumpArgs {
    /// The image, as the catalogue names it
    pub name: String,

    /// The publisher's public keys, binary as gpgv reads them [default: what the catalogue names]
    #[arg(long, value_name = "FILE", conflicts_with = "unsigned")]
    pub keyring: Option<PathBuf>,

    /// Take digests that nobody signed, from a publisher who signs nothing: as good as the TLS connection, no better
    #[arg(long)]
    pub unsigned: bool,

    /// Show what would change and leave the catalogue as it is
    #[arg(long)]
    pub dry_run: bool,

    /// Print the outcome as JSON on stdout instead of the difference
    #[arg(long)]
    pub json: bool,

    /// The catalogue to rewrite [default: xtask/images.toml of the workspace]
    #[arg(long, value_name = "FILE")]
    pub catalogue: Option<PathBuf>,
}
