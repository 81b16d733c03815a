//! The entries of the corpus.

use std::collections::BTreeMap;

use serde::Deserialize;
use xtask_core::digest::Algorithm;

/// The registry that has a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Source {
    Pypi,
    Npm,
    Debian,
}

impl Source {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pypi => "pypi",
            Self::Npm => "npm",
            Self::Debian => "debian",
        }
    }
}

/// The half of the corpus to which a package belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Half {
    /// The findings about these packages were looked at while the checks were changed.
    Seen,
    /// The findings about these packages were looked at once, after the changes.
    Held,
}

impl Half {
    /// Returns the half by a rule that does not depend on the content of the package.
    pub(crate) fn of(source: Source, package: &str) -> Self {
        let digest = Algorithm::Sha256.of(format!("{}:{package}", source.name()).as_bytes());
        let first = u8::from_str_radix(&digest.hex()[..2], 16).expect("a digest has hexadecimal digits");
        if first.is_multiple_of(2) { Self::Seen } else { Self::Held }
    }
}

/// What happens on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Truth {
    Runs,
    Fails,
}

/// A file of a published package.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct File {
    pub(crate) source: Source,
    pub(crate) package: String,
    pub(crate) version: String,
    /// The file name of the package.
    pub(crate) archive: String,
    /// The digest of the package.
    pub(crate) sha256: String,
    /// The path of the file in the package.
    pub(crate) member: String,
    pub(crate) device: String,
    pub(crate) half: Half,
    /// The expected findings: id and severity, without those that only inform.
    #[serde(default)]
    pub(crate) expect: BTreeMap<String, String>,
    pub(crate) truth: Truth,
    /// How the truth is known.
    pub(crate) how: String,
    /// Why the expected findings are not the truth.
    #[serde(default)]
    pub(crate) why: String,
}

impl File {
    pub(crate) fn name(&self) -> String {
        format!("{} {} {}: {}", self.source.name(), self.package, self.version, self.member)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Corpus {
    /// The release of glibc on the devices.
    pub(crate) glibc: String,
    #[serde(rename = "file")]
    pub(crate) files: Vec<File>,
}

impl Corpus {
    pub(crate) fn parse(text: &str) -> Self {
        toml::from_str(text).expect("read corpus.toml")
    }

    /// Returns the files of each archive.
    pub(crate) fn by_archive(&self) -> BTreeMap<&str, Vec<&File>> {
        let mut all: BTreeMap<&str, Vec<&File>> = BTreeMap::new();
        for file in &self.files {
            all.entry(&file.archive).or_default().push(file);
        }
        all
    }
}
