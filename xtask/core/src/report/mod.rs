//! The report of a run. The last lines on the screen, `report.json` and the exit code are made from it.
//!
//! `report.json` is an interface with schema number 2; `xtask/docs/reports.md` documents it.

pub mod past;
mod schema;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub use schema::*;

use crate::arch::VmArchitecture;
use crate::error::{self, Verdict};
use crate::format::{human_seconds, name_of, now_rfc3339, round};
use crate::fs::{remove_file, write_atomically};
use crate::git::Commit;

/// The file name of the report.
pub const REPORT: &str = "report.json";

/// The file name of the report as a page.
pub const HTML: &str = "report.html";

/// The file name of the report for CI servers that read JUnit.
pub const JUNIT: &str = "junit.xml";

/// The file name of the guest's serial console.
pub const CONSOLE: &str = "console.log";

/// The file name of the lines that the guest prints to report its progress.
pub const MARKERS: &str = "markers.log";

/// The file name of the guest's journal, which a failed run has.
pub const JOURNAL: &str = "journal.log";

/// The file name of what cloud-init, systemd and podman say about the guest of a failed run.
pub const GUEST: &str = "guest.txt";

/// The file name of the archive with all evidence of a failed run.
pub const ARCHIVE: &str = "failure.tar.zst";

/// The names of the files that a run writes into its directory or into that of `--report`.
pub const FILES: [&str; 12] = [
    REPORT,
    HTML,
    JUNIT,
    CONSOLE,
    MARKERS,
    JOURNAL,
    GUEST,
    "nats.log",
    "qemu.log",
    "domain.xml",
    "qmp.json",
    ARCHIVE,
];

/// Deletes the files of an earlier run in the directory of `--report`. If a run ends before it writes such files, the
/// directory must not contain those of another run beside the report.
///
/// # Errors
/// Returns an error that names the file that cannot be deleted.
pub fn remove_earlier(directory: &Path) -> Result<()> {
    FILES.iter().try_for_each(|name| remove_file(&directory.join(name)))
}

/// The schema number of `report.json`.
pub const SCHEMA: u32 = 2;

/// The maximum number of statuses in a report.
pub const MAX_STATUSES: usize = 200;

/// The report of one run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    pub schema: u32,
    pub verdict: Verdict,
    pub exit_code: u8,
    pub run_id: String,
    /// The start time in RFC 3339, UTC.
    pub started_at: String,
    pub seconds: f64,
    /// The fault that `--sabotage` planted; `None` without this flag.
    pub sabotage: Option<String>,
    /// The disturbance of `--disturb`; `None` without this flag.
    #[serde(default)]
    pub disturbance: Option<String>,
    /// The last phase, if `--until` requested one; `None` if all phases were requested.
    #[serde(default)]
    pub until: Option<String>,
    /// The snapshot of a warm run; `None` for a cold run.
    #[serde(default)]
    pub snapshot: Option<SnapshotReport>,
    /// The commit of the workspace; `None` if git does not track the workspace.
    #[serde(default)]
    pub workspace: Option<Commit>,
    pub host: HostReport,
    pub guest: GuestReport,
    pub agent: Option<AgentReport>,
    pub phases: Vec<PhaseReport>,
    pub evidence: Evidence,
    pub failure: Option<FailureReport>,
    /// The boots and the faults, in order.
    #[serde(default)]
    pub events: Vec<EventReport>,
    /// The statuses that the broker stored, in order. If there were more than [`MAX_STATUSES`], the first and the last
    /// ones.
    #[serde(default)]
    pub statuses: Vec<StatusReport>,
    /// The errors that do not change the verdict, for example a log that could not be copied or a machine that did not
    /// end.
    #[serde(default)]
    pub warnings: Vec<String>,
}

impl Report {
    /// Returns the report of a run that has just started.
    pub fn begin(run_id: &str, started_at: &str, arch: VmArchitecture) -> Self {
        Self {
            schema: SCHEMA,
            exit_code: Verdict::default().exit_code(),
            run_id: run_id.to_owned(),
            started_at: started_at.to_owned(),
            guest: GuestReport { arch, ..GuestReport::default() },
            ..Self::default()
        }
    }

    /// Returns the report of a smoke that failed before its run began. Such a smoke has no directory in the cache.
    pub fn before_run(arch: VmArchitecture, error: &anyhow::Error) -> Self {
        let mut report = Self::begin("none", &now_rfc3339(), arch);
        report.phases.push(PhaseReport {
            name: Phase::Preflight,
            status: PhaseStatus::Failed,
            started_seconds: None,
            seconds: 0.0,
            limit_seconds: None,
            detail: error.to_string(),
            console_offset: None,
        });
        report.failure = Some(FailureReport::new(Phase::Preflight, error, Vec::new()));
        report.conclude(error::kind(error).verdict(), 0.0);
        report.exit_code = error::code(error);
        report
    }

    /// Sets the verdict, and adds an entry `skipped` for each phase that was not reached.
    pub fn conclude(&mut self, verdict: Verdict, seconds: f64) {
        self.verdict = verdict;
        self.exit_code = verdict.exit_code();
        self.seconds = round(seconds);
        for phase in Phase::all() {
            if !self.phases.iter().any(|done| done.name == phase) {
                self.phases.push(PhaseReport {
                    name: phase,
                    status: PhaseStatus::Skipped,
                    started_seconds: None,
                    seconds: 0.0,
                    limit_seconds: None,
                    detail: "not reached".to_owned(),
                    console_offset: None,
                });
            }
        }
        self.phases.sort_by_key(|phase| phase.name);
    }

    /// Returns the text of `report.json`.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("a report is plain data");
        text.push('\n');
        text
    }

    /// Writes `report.json` into `directory` atomically.
    ///
    /// # Errors
    /// Returns an error that names the path if the directory cannot be made or the file cannot be written.
    pub fn write(&self, directory: &Path) -> Result<PathBuf> {
        let path = directory.join(REPORT);
        fs_err::create_dir_all(directory)?;
        write_atomically(&path, self.to_json())?;
        Ok(path)
    }

    /// Reads `report.json` in `directory`.
    ///
    /// # Errors
    /// Returns an error that names the file if it cannot be read or is not a report.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(REPORT);
        let text = fs_err::read(&path)?;
        serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
    }

    /// Returns the verdict in one line.
    pub fn verdict_line(&self) -> String {
        let what = name_of(&self.verdict).to_uppercase();
        let mut line = format!("{what}  iot-agent on {}", self.guest.arch);
        line.extend(self.agent.iter().flat_map(AgentReport::remarks));
        if let Some(image) = &self.guest.image {
            line.push_str(&format!(", {}", image.name));
            if let Some(reason) = image.fallback_briefly() {
                line.push_str(&format!(" instead of {}, because {reason}", image.wanted));
            }
            line.push_str(match (image.verified, image.built) {
                (true, _) => "",
                (false, true) => " (built from packages, no pinned digest)",
                (false, false) => " (UNVERIFIED IMAGE: its content was not checked)",
            });
        }
        if let Some(accelerator) = self.host.accelerator {
            line.push_str(&format!(", {accelerator}"));
        }
        if self.snapshot.is_some() {
            line.push_str(", warm");
        }
        if let Some(workspace) = &self.workspace {
            line.push_str(&format!(", {}", workspace.describe()));
        }
        if let Some(phase) = &self.until {
            line.push_str(&format!(", only until {phase}"));
        }
        if let Some(fault) = &self.sabotage {
            line.push_str(&format!(", sabotaged: {fault}"));
        }
        if let Some(disturbance) = &self.disturbance {
            line.push_str(&format!(", disturbed: {disturbance}"));
        }
        line.push_str(&format!(", in {}", human_seconds(self.seconds)));
        line
    }
}

impl AgentReport {
    /// Returns the remarks about the agent in the verdict line. There is a remark if the agent was given by `--agent`,
    /// if its profile is not `release`, if it was built with compiler flags from the environment, or if the inspection
    /// has warnings.
    fn remarks(&self) -> impl Iterator<Item = String> {
        let given = self.given_as.as_ref().map(|path| format!(", agent given as {}", path.display()));
        let other_profile = self.profile.as_ref().filter(|profile| *profile != "release");
        let profile = other_profile.map(|profile| format!(", profile {profile}"));
        let rustflags = self.rustflags.as_ref().map(|flags| format!(", RUSTFLAGS {flags}"));
        let warned = self.inspect_warnings.len();
        let warned = (warned > 0).then(|| format!(", {warned} warning(s) of inspect"));
        [given, profile, rustflags, warned].into_iter().flatten()
    }
}

impl ImageReport {
    /// Returns the short reason why the fallback image was used, or `None` if the wanted image was used.
    pub fn fallback_briefly(&self) -> Option<&str> {
        let reason = self.fallback_reason.as_deref()?;
        Some(reason.split(": ").next().unwrap_or(reason))
    }
}

impl FailureReport {
    /// Returns the report of a failure in `phase`. The error is split into the outermost error and its causes.
    pub fn new(phase: Phase, error: &anyhow::Error, console_tail: Vec<String>) -> Self {
        Self {
            phase,
            error: error.to_string(),
            causes: error.chain().skip(1).map(ToString::to_string).collect(),
            hint: error::hint(error).map(str::to_owned),
            console_tail,
        }
    }

    /// Returns the failure as lines for the screen: what failed, why, what to do, and the end of the console.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("error: {}: {}", self.phase.title(), self.error)];
        lines.extend(self.causes.iter().map(|cause| format!("  caused by: {cause}")));
        if let Some(hint) = &self.hint {
            lines.push(format!("  what to do: {hint}"));
        }
        if !self.console_tail.is_empty() {
            lines.push("  last lines of the guest's console:".to_owned());
            lines.extend(self.console_tail.iter().map(|line| format!("    | {line}")));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_report_lists_every_phase_in_order_and_reads_back() {
        let mut report = Report::begin("1122-101500-0a0b", "2026-11-22T10:15:00Z", VmArchitecture::Aarch64);
        let mut phase = |name, status| {
            report.phases.push(PhaseReport {
                name,
                status,
                started_seconds: None,
                seconds: 1.0,
                limit_seconds: None,
                detail: String::new(),
                console_offset: None,
            });
        };
        phase(Phase::Preflight, PhaseStatus::Passed);
        phase(Phase::Build, PhaseStatus::Failed);
        phase(Phase::Teardown, PhaseStatus::Passed);
        let error = anyhow::Error::new(crate::error::Failure::guest("no such file", "build it"))
            .context("read the agent");
        report.failure = Some(FailureReport::new(Phase::Build, &error, vec![]));
        report.conclude(Verdict::Failed, 2.0);

        let read: Report = serde_json::from_str(&report.to_json()).unwrap();
        assert!(read.phases.iter().map(|phase| phase.name).eq(Phase::all()));
        assert!(Phase::all().is_sorted() && Phase::PowerCut.title() == "power cut");
        assert_eq!(read.phases[2].status, PhaseStatus::Skipped);
        assert_eq!(read.exit_code, 1);
        let failure = read.failure.unwrap();
        assert_eq!((failure.error.as_str(), failure.causes.len()), ("read the agent", 1));
        assert_eq!(
            failure.lines(),
            ["error: build: read the agent", "  caused by: no such file", "  what to do: build it"]
        );
    }

    fn agent() -> AgentReport {
        AgentReport {
            path: "/t/iot-agent".into(),
            sha256: "0".repeat(64),
            version: None,
            target: "aarch64-unknown-linux-gnu".to_owned(),
            given_as: None,
            profile: Some("release".to_owned()),
            rustflags: None,
            inspect_warnings: Vec::new(),
        }
    }

    #[test]
    fn the_verdict_says_what_makes_an_agent_another_than_the_released_one() {
        let mut report = Report::begin("1122-101500-0a0b", "2026-11-22T10:15:00Z", VmArchitecture::Aarch64);
        report.conclude(Verdict::Verified, 99.0);
        report.agent = Some(agent());
        assert_eq!(report.verdict_line(), "VERIFIED  iot-agent on aarch64, in 99 s");
        report.workspace = Some(Commit { commit: "0123456789abcdef".repeat(3), dirty: true });
        report.agent = Some(AgentReport {
            profile: Some("dev".to_owned()),
            rustflags: Some("-Ctarget-cpu=native".to_owned()),
            inspect_warnings: vec!["instructions".to_owned(), "allocator".to_owned()],
            ..agent()
        });
        assert_eq!(
            report.verdict_line(),
            "VERIFIED  iot-agent on aarch64, profile dev, RUSTFLAGS -Ctarget-cpu=native, 2 warning(s) of inspect, \
             commit 0123456789ab (dirty), in 99 s"
        );
        let given_as = Some("./iot-agent".into());
        report.agent = Some(AgentReport { given_as, profile: None, ..agent() });
        report.workspace.as_mut().unwrap().dirty = false;
        let line = "VERIFIED  iot-agent on aarch64, agent given as ./iot-agent, commit 0123456789ab, in 99 s";
        assert_eq!(report.verdict_line(), line);
    }

    #[test]
    fn a_report_of_an_earlier_version_is_read() {
        let mut report = Report::begin("1122-101500-0a0b", "2026-11-22T10:15:00Z", VmArchitecture::Aarch64);
        report.agent = Some(agent());
        report.snapshot = Some(SnapshotReport {
            key: "debian-12-aarch64-0".to_owned(),
            made_at: "2026-11-22T10:15:00Z".to_owned(),
            age_seconds: Some(86_400),
            made_by: "1121-101500-0a0b".to_owned(),
            reused: Vec::new(),
            clock_step_seconds: None,
        });
        let mut json = serde_json::to_value(&report).unwrap();
        assert!(json.as_object_mut().unwrap().remove("workspace").is_some());
        let snapshot = json["snapshot"].as_object_mut().unwrap();
        assert_eq!(snapshot.remove("age_seconds"), Some(86_400.into()));
        let fields = json["agent"].as_object_mut().unwrap();
        for name in ["given_as", "profile", "rustflags", "inspect_warnings"] {
            assert!(fields.remove(name).is_some(), "{name}");
        }
        let read: Report = serde_json::from_value(json).unwrap();
        assert_eq!(read.snapshot.unwrap().age_seconds, None);
        assert!(read.workspace.is_none() && read.agent.unwrap().inspect_warnings.is_empty());
    }

    #[test]
    fn the_files_of_an_earlier_run_are_removed_and_no_others() {
        let directory = tempfile::tempdir().unwrap();
        for name in FILES.iter().chain(&["notes.txt"]) {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        remove_earlier(directory.path()).unwrap();
        let left: Vec<_> = crate::fs::entries(directory.path()).collect();
        assert_eq!(left, [directory.path().join("notes.txt")]);
        remove_earlier(directory.path()).unwrap();
    }

    #[test]
    fn a_failure_before_the_run_has_a_report_with_its_exit_code() {
        let table = [
            (error::Failure::host("the cache cannot be written", "set IOT_XTASK_CACHE"), 69),
            (error::Failure::usage("--agent /x: no such file"), 2),
            (error::Failure::interrupted(), 130),
        ];
        for (failure, code) in table {
            let directory = tempfile::tempdir().unwrap();
            let report = Report::before_run(VmArchitecture::Aarch64, &failure.clone().into());
            let path = report.write(&directory.path().join("new")).unwrap();
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
            let read: Report = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            assert_eq!((read.exit_code, read.verdict), (code, failure.kind.verdict()));
            assert_eq!(read.failure.unwrap().error, failure.to_string());
        }
    }

    #[test]
    fn the_verdict_names_the_image_that_was_tested() {
        let mut report = Report::begin("1122-101500-0a0b", "2026-11-22T10:15:00Z", VmArchitecture::Aarch64);
        report.guest.image = Some(ImageReport {
            name: "debian-12".to_owned(),
            requested: None,
            wanted: "ubuntu-24.04".to_owned(),
            source: "packages".to_owned(),
            digest: format!("sha256:{}", "0".repeat(64)).parse().unwrap(),
            verified: true,
            built: false,
            fallback_reason: Some("cloud-images.ubuntu.com cannot be reached: no such name".to_owned()),
        });
        report.conclude(Verdict::Verified, 99.0);
        assert_eq!(
            report.verdict_line(),
            "VERIFIED  iot-agent on aarch64, debian-12 instead of ubuntu-24.04, because cloud-images.ubuntu.com cannot be \
             reached, in 99 s"
        );
        let image = report.guest.image.as_mut().unwrap();
        (image.fallback_reason, image.verified) = (None, false);
        assert!(report.verdict_line().contains("debian-12 (UNVERIFIED IMAGE"), "{}", report.verdict_line());
        report.guest.image.as_mut().unwrap().built = true;
        let line = report.verdict_line();
        assert!(line.contains("debian-12 (built from packages, no pinned digest), in"), "{line}");
    }
}
