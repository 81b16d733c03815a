//! The flags that choose the image of a smoke, and those of `cargo xtask image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::arch::VmArchitecture;
use crate::digest::Digest;

/// The flags that choose an image.
#[derive(Debug, Clone, Default, Args)]
pub struct ImageArgs {
    /// A name of `image list`, ./FILE or https://… [default: ubuntu-24.04, or debian-12 if its host cannot be reached]
    #[arg(long, value_name = "IMAGE")]
    pub image: Option<String>,

    /// The digest of a FILE or URL: sha256:… or sha512:…
    #[arg(long, value_name = "DIGEST")]
    pub image_digest: Option<Digest>,

    /// Accept a FILE or URL without a digest; the verdict says so
    #[arg(long)]
    pub unverified: bool,

    /// Fail if the default image's host cannot be reached, instead of testing the fallback image
    #[arg(long)]
    pub strict_image: bool,

    /// Do not use the network; fail if the image is not in the cache
    #[arg(long)]
    pub offline: bool,
}

/// The commands of `image`.
#[derive(Debug, Clone, Subcommand)]
pub enum ImageCommand {
    #[command(flatten)]
    Store(StoreCommand),
    /// Pin an image's newest release: find it, verify its signed digests, rewrite the catalogue, show the difference
    Bump(BumpArgs),
}

/// The commands that use the cache.
#[derive(Debug, Clone, Subcommand)]
pub enum StoreCommand {
    /// List the images: pinned and cached versions, size, age, users
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Download or build an image into the cache and print its path
    Fetch(ImageFetchArgs),
    /// Build an image from packages and print its path
    Build(ImageBuildArgs),
    /// Hash cached images again and compare the digests
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
    /// Delete cached images and snapshots that no run uses [default: those that are not in the catalogue]
    Prune(PruneArgs),
}

/// The flags of `image fetch`.
#[derive(Debug, Clone, Args)]
pub struct ImageFetchArgs {
    /// A name of the catalogue, or a URL: https, or http with a digest
    pub image: String,

    /// The guest's architecture
    #[arg(long, value_enum, default_value_t)]
    pub arch: VmArchitecture,

    /// The digest of the URL's file: sha256:… or sha512:…
    #[arg(long, value_name = "DIGEST", conflicts_with = "unverified")]
    pub image_digest: Option<Digest>,

    /// Accept any content from a URL
    #[arg(long)]
    pub unverified: bool,

    /// Write the file there instead of into the cache
    #[arg(long, value_name = "FILE")]
    pub to: Option<PathBuf>,

    /// Print JSON
    #[arg(long, conflicts_with = "to")]
    pub json: bool,
}

/// The flags of `image build`.
#[derive(Debug, Clone, Args)]
pub struct ImageBuildArgs {
    /// The image, as the catalogue names it
    pub name: String,

    /// The guest's architecture
    #[arg(long, value_enum, default_value_t)]
    pub arch: VmArchitecture,

    /// Build it even if it is in the cache, and compare the digests
    #[arg(long)]
    pub rebuild: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The flags of `image verify`.
#[derive(Debug, Clone, Args)]
pub struct ImageVerifyArgs {
    /// Names of images [default: every cached one]
    pub names: Vec<String>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The flags of `image prune`.
#[derive(Debug, Clone, Default, Args)]
pub struct PruneArgs {
    /// Delete images and snapshots that were not used for this many days
    #[arg(long, value_name = "DAYS")]
    pub older_than: Option<u64>,

    /// Delete the longest unused images and snapshots until the rest fits into this size: 500M, 20G
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub keep: Option<u64>,

    /// Delete images that are not in the catalogue [default without --older-than and --keep]
    #[arg(long)]
    pub unnamed: bool,

    /// Print what would be deleted, and delete nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Parses a size in bytes, or a number with K, M, G or T for powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let wanted = || format!("{text:?} is not a size: write bytes, or a number with K, M, G or T");
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

/// The flags of `image bump`.
#[derive(Debug, Clone, Args)]
pub struct BumpArgs {
    /// The image, as the catalogue names it
    pub name: String,

    /// The publisher's public keys, binary as gpgv reads them [default: the keyring that the catalogue names]
    #[arg(long, value_name = "FILE", conflicts_with = "unsigned")]
    pub keyring: Option<PathBuf>,

    /// Accept unsigned digests from a publisher who does not sign; only the TLS connection protects them
    #[arg(long)]
    pub unsigned: bool,

    /// Show what would change, and do not change the catalogue
    #[arg(long)]
    pub dry_run: bool,

    /// Print the outcome as JSON on stdout instead of the difference
    #[arg(long)]
    pub json: bool,

    /// The catalogue to rewrite [default: xtask/core/images.toml of the workspace]
    #[arg(long, value_name = "FILE")]
    pub catalogue: Option<PathBuf>,
}
