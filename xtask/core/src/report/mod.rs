//! The report of a run. The last lines on the screen, `report.json` and the exit code are made from it.
//!
//! `report.json` is an interface with schema number 2; `xtask/docs/reports.md` documents it.

mod faults;
mod healing;
pub mod past;
mod schema;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub use faults::{EpisodeReport, FaultsReport};
pub use healing::{HealingReport, SlowHealing};
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
pub const FILES: [&str; 13] = [
    REPORT,
    HTML,
    JUNIT,
    CONSOLE,
    MARKERS,
    JOURNAL,
    GUEST,
    "nats.log",
    "registry.log",
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
    /// The judgement of crash states; `None` for a smoke.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torture: Option<TortureReport>,
    /// The episodes of `torture --faults`; `None` for other runs.
    #[serde(default)]
    pub faults: Option<FaultsReport>,
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
        let phases: Vec<_> = match (&self.torture, &self.faults) {
            (Some(_), _) => Phase::of_torture().collect(),
            (None, Some(_)) => Phase::of_faults().collect(),
            (None, None) => Phase::of_smoke().collect(),
        };
        for phase in phases {
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
        if let Some(daemon) = &self.host.daemon {
            line.push_str(&format!(", on {} ({})", daemon.uri, daemon.network));
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
        line.extend(self.torture.as_ref().map(TortureReport::remark));
        line.extend(self.faults.as_ref().map(FaultsReport::remark));
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

impl TortureReport {
    /// Returns the remark about the crash states in the verdict line.
    fn remark(&self) -> String {
        let Self { states, seed, failed, boots, .. } = self;
        let converged = boots.iter().filter(|boot| boot.converged).count();
        format!(
            ", {failed} of {states} crash states (seed {seed}) lost something, {converged} of {} booted ones converged",
            boots.len()
        )
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
mod tests;
