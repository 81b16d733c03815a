//! Chooses the image of a run from the flags.

use std::path::Path;

use super::catalogue::Catalogue;
use super::{DownloadSource, Format, Image, LocalFile, Source, shown};
use crate::arch::VmArchitecture;
use crate::cli::ImageArgs;
use crate::error::Failure;

/// The user as which ssh logs in if the image is not in the catalogue. cloud-init creates this user.
const OWN_LOGIN_USER: &str = "tester";

/// The image of a run and its fallback image.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The image to be tested.
    pub image: Image,
    /// The image that is tested if the host of `image` cannot be reached. `None` if the user chose the image with
    /// `--image`, or if `--strict-image` is given.
    pub fallback: Option<Image>,
}

impl Choice {
    /// Returns the image that the flags request. If they name no image, returns the default image and the fallback
    /// image.
    ///
    /// # Errors
    /// Returns a usage error if the name is unknown or the file does not exist. A file or an address also needs either
    /// a digest or `--unverified`.
    pub fn from_args(args: &ImageArgs, arch: VmArchitecture) -> Result<Self, Failure> {
        let catalogue = Catalogue::built_in();
        let says_content = args.image_digest.is_some() || args.unverified;
        let Some(wanted) = &args.image else {
            if says_content {
                return Err(Failure::usage(
                    "--image-digest and --unverified need --image FILE or --image URL".to_owned(),
                ));
            }
            let fallback =
                (!args.strict_image).then(|| catalogue.find(&catalogue.fallback, arch)).transpose()?;
            return Ok(Self { image: catalogue.find(&catalogue.default, arch)?, fallback });
        };
        let image = match own_source(wanted, args)? {
            Some(source) => own_image(wanted, source, arch),
            None if says_content => {
                return Err(Failure::usage(format!(
                    "--image {wanted}: the catalogue pins its digest; --image-digest and --unverified are about a \
                     file or an address (for a file in this directory write ./{wanted})"
                )));
            }
            None => catalogue.find(wanted, arch)?,
        };
        Ok(Self { image, fallback: None })
    }
}

/// Returns the source that `wanted` names, if `wanted` is a file or an address. Returns `None` if `wanted` is a name.
fn own_source(wanted: &str, args: &ImageArgs) -> Result<Option<Source>, Failure> {
    if !wanted.contains('/') {
        return Ok(None);
    }
    let shown = shown(wanted);
    let refuse = |why: &str| Err(Failure::usage(format!("--image {shown}: {why}")));
    let digest = args.image_digest.clone();
    match (&digest, args.unverified) {
        (None, false) => {
            return refuse(
                "give its digest with --image-digest sha256:…, or accept any content with --unverified",
            );
        }
        (Some(_), true) => return Err(Failure::usage("--image-digest and --unverified exclude each other")),
        _ => {}
    }
    if let Some((scheme, _)) = wanted.split_once("://") {
        return match (scheme, &digest) {
            ("https", _) | ("http", Some(_)) => {
                Ok(Some(Source::Download(DownloadSource { url: wanted.to_owned(), digest, bytes: None })))
            }
            ("http", None) => {
                refuse("plain http does not protect it against changes: give its digest, or an https address")
            }
            _ => refuse("an address begins with https:// or http://"),
        };
    }
    let path = Path::new(wanted)
        .canonicalize()
        .map_err(|error| Failure::usage(format!("--image {wanted}: {error}")))?;
    if path.to_str().is_none_or(|path| path.contains(char::is_control)) {
        let path = path.display();
        return refuse(&format!(
            "libvirt's XML cannot name the path {path}: rename the file or its directory"
        ));
    }
    if !path.is_file() {
        return Err(Failure::usage(format!("--image {wanted}: not a file")));
    }
    Ok(Some(Source::File(LocalFile { path, digest })))
}

/// Returns the description of an image that is not in the catalogue. The format is guessed from the name: raw if the
/// name ends with `.raw`, and qcow2 otherwise. Before the boot, the format is read from the file itself.
fn own_image(wanted: &str, source: Source, arch: VmArchitecture) -> Image {
    let raw = wanted.ends_with(".raw");
    let plain = shown(wanted);
    let name = plain.trim_end_matches("?…").rsplit('/').next().unwrap_or(&plain).to_owned();
    let format = if raw { Format::Raw } else { Format::Qcow2 };
    Image { name, arch, source, format, login_user: OWN_LOGIN_USER.to_owned(), expected: None }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;
    use crate::cli::{Cli, Command, HeavyCommand};
    use clap::Parser as _;

    const ARM: VmArchitecture = VmArchitecture::Aarch64;

    fn choose(words: &[&str]) -> Result<Choice, Failure> {
        let line = ["xtask", "smoke"].iter().chain(words);
        let Command::Heavy(HeavyCommand::Smoke(args)) = Cli::parse_from(line).command else {
            panic!("smoke")
        };
        Choice::from_args(&args.machine.image, ARM)
    }

    #[test]
    fn the_key_follows_every_input() {
        let find = |arch| Catalogue::built_in().find("debian-12", arch).unwrap();
        let (arm, x86) = (find(ARM), find(VmArchitecture::X86_64));
        let key = arm.key(&["a", "b"]);
        assert_eq!(key, arm.key(&["a", "b"]));
        assert!(key.starts_with("debian-12-aarch64-"));
        for other in [arm.key(&["ab", ""]), arm.key(&["a", "c"]), x86.key(&["a", "b"])] {
            assert_ne!(key, other);
        }
    }

    #[test]
    fn only_the_default_may_be_replaced() {
        let default = choose(&[]).unwrap();
        assert_eq!(
            (default.image.name.as_str(), default.fallback.unwrap().name.as_str()),
            ("ubuntu-24.04", "debian-12")
        );
        assert!(choose(&["--strict-image"]).unwrap().fallback.is_none());
        assert!(choose(&["--image", "ubuntu-24.04"]).unwrap().fallback.is_none());
    }

    #[test]
    fn an_image_of_ones_own_needs_a_digest_or_a_word() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("d.qcow2");
        std::fs::write(&file, "").unwrap();
        let file = file.to_str().unwrap();
        assert!(choose(&["--image", file]).unwrap_err().to_string().contains("--unverified"));
        assert!(!choose(&["--image", file, "--unverified"]).unwrap().image.is_verified());
        let own = choose(&["--image", file, "--image-digest", &digest]).unwrap().image;
        let built = choose(&["--image", "debian-12"]).unwrap().image;
        assert!(built.is_built() && !built.is_verified(), "nobody vouches for the digest of a built image");
        assert!(own.is_verified() && own.name == "d.qcow2" && own.expected.is_none());
        let table: &[(&[&str], &str)] = &[
            (&["--image", "./not-there.qcow2", "--unverified"], "No such file"),
            (&["--image", "/", "--unverified"], "not a file"),
            (&["--image", "ftp://x/y", "--image-digest", &digest], "https://"),
            (&["--image", "http://x/y", "--unverified"], "plain http"),
            (&["--image", "https://x/y"], "--unverified"),
            (&["--image", "debian-12", "--unverified"], "pins its digest"),
            (&["--image", file, "--unverified", "--image-digest", &digest], "exclude"),
            (&["--unverified"], "--image FILE"),
        ];
        for (words, message) in table {
            let error = choose(words).unwrap_err().to_string();
            assert!(error.contains(message), "{words:?}: {error}");
        }
        for name in [&b"\xff.qcow2"[..], b"a\nb.qcow2"] {
            let (file, link) =
                (directory.path().join(OsStr::from_bytes(name)), directory.path().join("link"));
            std::fs::write(&file, "").unwrap();
            std::os::unix::fs::symlink(&file, &link).unwrap();
            let error = choose(&["--image", link.to_str().unwrap(), "--unverified"]).unwrap_err().to_string();
            assert!(error.contains("cannot name the path"), "{error}");
            std::fs::remove_file(&link).unwrap();
        }
    }

    #[test]
    fn an_address_is_shown_without_its_secrets() {
        for (wanted, message) in [
            ("https://u:p@host/a/b.img?token=x#y", "https://host/a/b.img?…"),
            ("https://host", "https://host"),
            ("https://host/a@b#x", "https://host/a@b"),
            (
                "-url = \"https://u:p@ss@host\" # https://u@host?q=x@y z",
                "-url = \"https://host\" # https://host?… z",
            ),
            ("https://mirror/https://u:p@host/a", "https://mirror/https://host/a"),
            ("https://", "https://"),
            ("./a@b?c.qcow2", "./a@b?c.qcow2"),
            ("no address, me@home", "no address, me@home"),
        ] {
            assert_eq!(shown(wanted), message);
        }
        let error = choose(&["--image", "https://u:secret@host/x"]).unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
        let digest = format!("sha256:{}", "0".repeat(64));
        let image =
            choose(&["--image", "https://h/x.img?token=secret", "--image-digest", &digest]).unwrap().image;
        assert_eq!(image.name, "x.img");
    }

    #[test]
    fn the_digest_decides_where_a_download_is_kept() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let key = |url: &str| choose(&["--image", url, "--image-digest", &digest]).unwrap().image.key(&[]);
        assert_eq!(key("https://a/x.img"), key("https://b/x.img"));
        assert!(
            key("https://a/..%2f").starts_with("2f-aarch64") || key("https://a/..%2f").starts_with("%2f")
        );
    }
}
