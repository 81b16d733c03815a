//! Finds out who signed a list of digests, from gpgv's status lines (doc/DETAILS of GnuPG).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use xtask_core::arch::VmArchitecture;
use xtask_core::error::Failure;
use xtask_core::host::packages::{Need, PackageManager};
use xtask_core::host::tools;
use xtask_core::{bail_host, limits};

use xtask_jobs::{Ui, child};

/// Words of status lines about a signature that is not good: changed content, no key, expired, revoked.
const BAD: [&str; 5] = ["BADSIG", "ERRSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG"];
/// The numbers of MD5, SHA-1 and RIPEMD-160 (RFC 9580, 9.5). An attacker can make two texts with the same digest for
/// these hash functions.
const BROKEN_HASHES: [&str; 3] = ["1", "2", "3"];
/// The file name of Ubuntu's keyring, and the packages that contain it.
const UBUNTU: (&str, &str) = (
    "ubuntu-cloudimage-keyring.gpg",
    "install ubuntu-cloudimage-keyring on Ubuntu, ubuntu-keyring on Debian (Debian 12 has none: copy the file from an \
     Ubuntu machine and name it by --keyring FILE)",
);

/// The key of a good signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Signer {
    /// The key's first user id, as its owner wrote it.
    pub(super) user: String,
    /// The primary key's fingerprint.
    pub(super) fingerprint: String,
}

/// A keyring, and gpgv, which verifies signatures with it.
#[derive(Debug)]
pub(super) struct Verifier {
    gpgv: PathBuf,
    keyring: PathBuf,
}

impl Verifier {
    /// Finds gpgv and the keyring.
    ///
    /// # Errors
    /// Returns a failure of the host if gpgv or the keyring is missing.
    pub(super) fn find(keyring: &Path) -> Result<Self> {
        // gpgv looks for a name without a slash in its own home directory.
        let keyring = std::path::absolute(keyring)
            .with_context(|| format!("make the keyring's path {} absolute", keyring.display()))?;
        let content = std::fs::read(&keyring).map_err(|error| {
            Failure::host(format!("read the keyring {}: {error}", keyring.display()), keyring_hint(&keyring))
        })?;
        if content.starts_with(b"-----BEGIN") {
            let keyring = keyring.display();
            bail_host!(
                "the keyring {keyring} is armoured text, but gpgv reads only binary keyrings";
                "run gpg --dearmor {keyring}, and pass the result by --keyring"
            );
        }
        let gpgv = tools::find("gpgv").ok_or_else(|| {
            Failure::host("find gpgv on PATH: it verifies the publisher's signature", gpgv_hint())
        })?;
        Ok(Self { gpgv, keyring })
    }

    /// Returns the signer of `content`.
    ///
    /// # Errors
    /// Returns an error if the signature is not good, or if its key is not in the keyring.
    pub(super) fn verify(&self, content: &[u8], signature: &[u8], ui: &Ui) -> Result<Signer> {
        let directory = tempfile::tempdir().context("make a directory for gpgv's input")?;
        let (signed, detached) = (directory.path().join("signed"), directory.path().join("signature"));
        for (path, bytes) in [(&signed, content), (&detached, signature)] {
            fs_err::write(path, bytes)?;
        }
        let mut arguments = ["--status-fd", "1", "--keyring"].map(OsString::from).to_vec();
        arguments.extend([&self.keyring, &detached, &signed].map(OsString::from));
        let output = child::read(&self.gpgv, &arguments, limits::SIGNATURE, ui);
        // An interrupted command says nothing about the signature.
        ui.check()?;
        output.and_then(|status| parse_status(&status)).with_context(|| {
            let keyring = self.keyring.display();
            Failure::guest(
                format!("the digests are not signed by a key of {keyring}; the catalogue is left as it is"),
                "do not use them: try again later; if it persists, compare with the publisher's announcement of the key",
            )
        })
    }
}

fn keyring_hint(keyring: &Path) -> &'static str {
    let (name, hint) = UBUNTU;
    if keyring.ends_with(name) {
        hint
    } else {
        "install the package that provides it, or pass the publisher's keyring by --keyring FILE"
    }
}

fn gpgv_hint() -> String {
    let manager = PackageManager::find().unwrap_or(PackageManager::Apt);
    // The package is the same for guests of every architecture.
    let packages = manager.packages(Need::Gpgv, VmArchitecture::default());
    let commands: Vec<_> = manager.install(&packages).iter().map(|words| words.join(" ")).collect();
    commands.join(" && ")
}

/// Returns the signer from gpgv's status lines. Every signature must be good. A bad signature makes the list doubtful,
/// even if other signatures are good.
fn parse_status(status: &str) -> Result<Signer> {
    let lines = status.lines().filter_map(|line| line.strip_prefix("[GNUPG:] "));
    let lines: Vec<_> = lines.map(|line| line.split_once(' ').unwrap_or((line, ""))).collect();
    if let Some((word, rest)) = lines.iter().find(|(word, _)| BAD.contains(word)) {
        bail!("gpgv reports {word} {rest}");
    }
    let value = |wanted: &str| lines.iter().find(|(word, _)| *word == wanted).map(|(_, rest)| *rest);
    let good = value("GOODSIG").context("gpgv reports no good signature (GOODSIG)")?;
    let valid = value("VALIDSIG").context("gpgv reports no valid signature (VALIDSIG)")?;
    // The fields are: fingerprint, date, time, expiry, version, reserved, key algorithm, hash algorithm, class, primary
    // key.
    let fields: Vec<_> = valid.split(' ').collect();
    let hash = fields.get(7).with_context(|| format!("read gpgv's line VALIDSIG {valid}"))?;
    ensure!(!BROKEN_HASHES.contains(hash), "the signature uses a broken hash (OpenPGP's number {hash})");
    let fingerprint = (*fields.get(9).unwrap_or(&fields[0])).to_owned();
    let user = good.split_once(' ').map_or("", |(_, user)| user);
    Ok(Signer { user: user.chars().filter(|c| !c.is_control()).collect(), fingerprint })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str =
        "[GNUPG:] NEWSIG\n[GNUPG:] GOODSIG 1A5D6C4C7DB87C81 Image <signing@publisher.example>\n";
    const VALID: &str = "[GNUPG:] VALIDSIG D2EB 2026-07-05 1783209600 0 4 0 1 10 00 ABCD\n";

    #[test]
    fn a_good_signature_names_its_signer() {
        let signer = parse_status(&format!("{GOOD}{VALID}")).unwrap();
        assert_eq!(signer.user, "Image <signing@publisher.example>");
        assert_eq!(signer.fingerprint, "ABCD");
    }

    #[test]
    fn everything_else_is_refused() {
        let table = [
            (String::new(), "GOODSIG"),
            (GOOD.to_owned(), "VALIDSIG"),
            (VALID.to_owned(), "GOODSIG"),
            (format!("{GOOD}{VALID}[GNUPG:] BADSIG 00 Somebody\n"), "BADSIG 00 Somebody"),
            (format!("{VALID}[GNUPG:] EXPKEYSIG 1A5D Image\n"), "EXPKEYSIG"),
            (format!("{GOOD}{}", VALID.replace(" 10 00", " 2 00")), "broken hash"),
            (format!("{GOOD}[GNUPG:] VALIDSIG D2EB\n"), "read gpgv's line"),
            ("GOODSIG 1A5D Image\nVALIDSIG D2EB 0 0 0 4 0 1 10 00 ABCD\n".to_owned(), "GOODSIG"),
        ];
        for (status, words) in table {
            let error = parse_status(&status).unwrap_err().to_string();
            assert!(error.contains(words), "{error:?} does not say {words:?}");
        }
    }

    #[test]
    fn a_missing_keyring_is_answered_with_its_package() {
        let error = Verifier::find(Path::new("/nonexistent/ubuntu-cloudimage-keyring.gpg")).unwrap_err();
        assert_eq!(xtask_core::error::code(&error), 69);
        assert!(xtask_core::error::hint(&error).unwrap().contains("ubuntu-keyring on Debian"));
        let other = Verifier::find(Path::new("/nonexistent/own.gpg")).unwrap_err();
        assert!(!xtask_core::error::hint(&other).unwrap().contains("ubuntu"));
        assert!(gpgv_hint().contains("gnu") || gpgv_hint().contains("gpg"));
    }
}
