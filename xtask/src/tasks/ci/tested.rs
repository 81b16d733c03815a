//! The distributions that the suite's smokes did not test, as found in their reports. A smoke without `--image` may
//! have tested the fallback image.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;

use xtask_core::error::Verdict;
use xtask_core::image::catalogue::Catalogue;
use xtask_core::report::{FailureReport, Report, remove_earlier};
use xtask_core::workspace::Workspace;

/// A step that runs a smoke.
pub(super) struct Smoke {
    /// The image that the smoke must test.
    wanted: String,
    arch: String,
    /// True if the image is the default one. The smoke may then test the fallback image instead.
    is_default: bool,
    /// The directory for the smoke's report.
    directory: PathBuf,
}

impl Smoke {
    /// Returns the smoke that the step `name` runs with these arguments of cargo, or `None` if the step runs no smoke.
    pub(super) fn of(workspace: &Workspace, name: &str, arguments: &str) -> Option<Self> {
        let words: Vec<_> = arguments.strip_prefix("xtask smoke ")?.split(' ').collect();
        let value = |flag: &str| words.iter().skip_while(|word| **word != flag).nth(1);
        let image = value("--image");
        Some(Self {
            wanted: image.map_or_else(|| Catalogue::built_in().default, |name| (*name).to_owned()),
            arch: value("--arch").copied().unwrap_or_default().to_owned(),
            is_default: image.is_none(),
            directory: workspace.target_dir().join("xtask-ci").join(name.replace(' ', "-")),
        })
    }

    /// Deletes the reports of an earlier run. Returns additional arguments for the smoke.
    pub(super) fn begin(&self, strict_image: bool) -> Result<Vec<OsString>> {
        remove_earlier(&self.directory)?;
        let mut arguments = vec!["--report".into(), self.directory.clone().into()];
        if strict_image && self.is_default {
            arguments.push("--strict-image".into());
        }
        Ok(arguments)
    }

    /// Returns a line about the distribution if the smoke did not test it. The smoke must have ended.
    pub(super) fn not_tested(&self, passed: bool) -> Result<Option<String>> {
        match Report::read(&self.directory) {
            Ok(report) => Ok(self.not_tested_in(&report)),
            Err(error) if passed => Err(error),
            Err(_) => Ok(Some(self.because("the smoke wrote no report"))),
        }
    }

    fn not_tested_in(&self, report: &Report) -> Option<String> {
        let judged = [Verdict::Verified, Verdict::Failed].contains(&report.verdict);
        let reason = match report.guest.image.as_ref().filter(|_| judged) {
            Some(image) => image.fallback_briefly()?,
            None => report.failure.as_ref().map_or("the smoke did not end", root_cause),
        };
        Some(self.because(reason))
    }

    fn because(&self, reason: &str) -> String {
        format!("{} for {} ({reason})", self.wanted, self.arch)
    }
}

/// Returns the innermost cause of a failure, which is more specific than the failed action.
fn root_cause(failure: &FailureReport) -> &str {
    failure.causes.last().unwrap_or(&failure.error)
}

#[cfg(test)]
mod tests {
    use xtask_core::arch::VmArchitecture;
    use xtask_core::report::{ImageReport, Phase};

    use super::*;

    fn smoke(directory: &std::path::Path, arguments: &str) -> Smoke {
        let workspace = Workspace::find().unwrap();
        Smoke { directory: directory.to_owned(), ..Smoke::of(&workspace, "smoke x", arguments).unwrap() }
    }

    fn report(fallback_reason: Option<&str>) -> Report {
        let mut report = Report::begin("1122-101500-0a0b", "2026-11-22T10:15:00Z", VmArchitecture::Aarch64);
        report.verdict = Verdict::Verified;
        report.guest.image = Some(ImageReport {
            name: "debian-12".to_owned(),
            requested: None,
            wanted: "ubuntu-24.04".to_owned(),
            source: "packages of bookworm".to_owned(),
            digest: format!("sha256:{}", "0".repeat(64)).parse().unwrap(),
            verified: false,
            built: true,
            fallback_reason: fallback_reason.map(str::to_owned),
        });
        report
    }

    #[test]
    fn a_fallback_image_is_another_distribution() {
        let directory = tempfile::tempdir().unwrap();
        let smoke = smoke(directory.path(), "xtask smoke --cold --arch aarch64");
        let not_tested = |report: &Report| {
            report.write(directory.path()).unwrap();
            smoke.not_tested(true).unwrap()
        };
        assert_eq!(not_tested(&report(None)), None);
        assert_eq!(
            not_tested(&report(Some("cloud-images.ubuntu.com cannot be reached: no such name"))).unwrap(),
            "ubuntu-24.04 for aarch64 (cloud-images.ubuntu.com cannot be reached)"
        );
        let mut strict = report(None);
        strict.guest.image = None;
        let error =
            anyhow::anyhow!("reach https://host/disk: no such name").context("get the image ubuntu-24.04");
        strict.failure = Some(FailureReport::new(Phase::Image, &error, Vec::new()));
        let line = "ubuntu-24.04 for aarch64 (reach https://host/disk: no such name)";
        assert_eq!(not_tested(&strict).unwrap(), line);
        let unavailable = Report { verdict: Verdict::Unavailable, ..report(None) };
        assert_eq!(not_tested(&unavailable).unwrap(), "ubuntu-24.04 for aarch64 (the smoke did not end)");
    }

    #[test]
    fn an_earlier_report_proves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let smoke = smoke(directory.path(), "xtask smoke --cold --arch aarch64 --image debian-13");
        report(None).write(directory.path()).unwrap();
        let arguments = smoke.begin(true).unwrap();
        assert_eq!(arguments, [OsString::from("--report"), directory.path().into()]);
        assert!(smoke.not_tested(true).is_err());
        let line = smoke.not_tested(false).unwrap().unwrap();
        assert_eq!(line, "debian-13 for aarch64 (the smoke wrote no report)");
    }

    #[test]
    fn only_a_smoke_of_the_default_image_is_strict() {
        let directory = tempfile::tempdir().unwrap();
        let is_strict = |arguments: &str, strict_image: bool| {
            let arguments = smoke(directory.path(), arguments).begin(strict_image).unwrap();
            arguments.contains(&"--strict-image".into())
        };
        assert!(is_strict("xtask smoke --cold --arch x86_64", true));
        assert!(!is_strict("xtask smoke --cold --arch x86_64", false));
        assert!(Smoke::of(&Workspace::find().unwrap(), "tests", "test --workspace").is_none());
    }
}
