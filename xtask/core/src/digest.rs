//! Calculates and parses digests in their usual notation: `sha256:…` or `sha512:…`.

use std::fmt;
use std::io::Read as _;
use std::path::Path;
use std::str::FromStr;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};

/// The hash functions that publishers of images use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Algorithm {
    Sha256,
    Sha512,
}

impl Algorithm {
    pub const ALL: [Self; 2] = [Self::Sha256, Self::Sha512];

    /// Returns the name of the algorithm, which stands before the colon in a digest.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// Returns the number of hexadecimal digits in a digest of this algorithm.
    pub fn hex_digits(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }

    pub fn of(self, bytes: &[u8]) -> Digest {
        let mut hash = self.hasher();
        hash.update(bytes);
        hash.finish()
    }

    /// Returns the digest of a file's content. Before each piece of the file, `read` is called with two numbers: the
    /// bytes that were read before, and the size of the file. An error of `read` ends the calculation.
    ///
    /// # Errors
    /// Returns an error that names the file if it cannot be read, or the error that `read` returned.
    pub fn of_file(self, path: &Path, mut read: impl FnMut(u64, u64) -> Result<()>) -> Result<Digest> {
        let mut file = fs_err::File::open(path)?;
        let total = file.metadata()?.len();
        let mut hash = self.hasher();
        let mut buffer = vec![0; 1 << 20];
        let mut so_far: u64 = 0;
        loop {
            read(so_far, total)?;
            let count = file.read(&mut buffer)?;
            if count == 0 {
                return Ok(hash.finish());
            }
            hash.update(&buffer[..count]);
            so_far += count as u64;
        }
    }

    /// Returns an empty hash of this algorithm.
    pub fn hasher(self) -> Hasher {
        match self {
            Self::Sha256 => Hasher::Sha256(Box::default()),
            Self::Sha512 => Hasher::Sha512(Box::default()),
        }
    }
}

/// A digest, written as `algorithm:hex` with the hex digits in lower case.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest {
    algorithm: Algorithm,
    hex: String,
}

impl Digest {
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Returns the hexadecimal digits without the algorithm.
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// Returns the digest with only its first digits, for messages: `sha256:0123456789ab…`.
    pub fn short(&self) -> String {
        format!("{}:{}…", self.algorithm.name(), &self.hex[..12])
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wanted =
            || format!("{text:?} is not a digest: write sha256:<64 hex digits> or sha512:<128 hex digits>");
        let (name, hex) = text.split_once(':').ok_or_else(wanted)?;
        let algorithm = Algorithm::ALL.into_iter().find(|known| known.name() == name).ok_or_else(wanted)?;
        let sound = hex.len() == algorithm.hex_digits() && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        if sound { Ok(Self { algorithm, hex: hex.to_ascii_lowercase() }) } else { Err(wanted()) }
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// A hash under calculation.
#[derive(Debug, Clone)]
pub enum Hasher {
    Sha256(Box<Sha256>),
    Sha512(Box<Sha512>),
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha512(hash) => hash.update(bytes),
        }
    }

    /// Returns the digest of all bytes that were added.
    pub fn finish(self) -> Digest {
        match self {
            Self::Sha256(hash) => Digest { algorithm: Algorithm::Sha256, hex: hex(&hash.finalize()) },
            Self::Sha512(hash) => Digest { algorithm: Algorithm::Sha512, hex: hex(&hash.finalize()) },
        }
    }
}

/// Formats bytes as lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_reads_back_and_a_wrong_one_is_refused() {
        for algorithm in Algorithm::ALL {
            let mut hash = algorithm.hasher();
            hash.update(b"abc");
            let digest = hash.finish();
            assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
            assert_eq!(
                digest.to_string().to_uppercase().replace("SHA", "sha").parse::<Digest>().unwrap(),
                digest
            );
        }
        let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(abc.parse::<Digest>().unwrap().short(), "sha256:ba7816bf8f01…");
        let table =
            ["", "md5:00", "sha256", "sha256:", &abc[..70], &abc.replace("ad", "zz"), &format!("{abc}00")];
        for wrong in table.map(str::to_owned) {
            assert!(wrong.parse::<Digest>().unwrap_err().contains("64 hex digits"), "{wrong}");
        }
    }
}
