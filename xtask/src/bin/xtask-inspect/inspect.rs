//! `cargo xtask inspect`: checks without a boot whether an executable will run on a device.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use inspect::finding::{Finding, Report, SCHEMA, Severity};
use serde_json::json;
use xshell::Shell;

use xtask_core::build;
use xtask_core::cli::{BuildArgs, InspectArgs, Verbosity};
use xtask_core::error::Failure;
use xtask_core::format::round;
use xtask_core::message;
use xtask_core::output::print_json;
use xtask_core::workspace::Workspace;
use xtask_inspection::{DeviceRoot, Inspection, arch_of_file};

/// The bytes that are read before the rest of a file: the ELF header, and the signatures of other formats.
const START: u64 = 64;
/// The details that are shown without `-v`.
const SHOWN: usize = 8;

/// Inspects the given executable, or the agent if none is given.
pub(crate) fn run(args: &InspectArgs, verbosity: Verbosity) -> Result<()> {
    let given = args.path.as_deref().map(Opened::at).transpose()?;
    let mut args = args.clone();
    if args.device.is_none() {
        // Without a flag, the file itself decides.
        args.arch = args.arch.or_else(|| arch_of_file(&given.as_ref()?.start));
    }
    let inspection = Inspection::from_args(&args)?;
    let file = match given {
        Some(file) => file,
        None => Opened::at(&agent(&args, &inspection)?)?,
    };
    let started = Instant::now();
    let report = match inspection.header(&file.start) {
        Some(report) => report,
        None => inspection.look_at_file(&file.path, &file.read()?),
    };
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        print_json(&as_json(&file, &inspection, &report, seconds))?;
    }
    print(&file.path, &inspection, &report, verbosity);
    if report.is_sound() { Ok(()) } else { Err(Failure::reported(1).into()) }
}

/// An opened file, of which only the start was read.
struct Opened {
    path: PathBuf,
    file: File,
    bytes: u64,
    start: Vec<u8>,
}

impl Opened {
    /// Opens a file. A FIFO or a device is refused before anything is read, because that could take for ever.
    fn at(path: &Path) -> Result<Self> {
        let failed = |error| Failure::usage(format!("inspect {}: {error}", path.display()));
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if !metadata.is_file() {
            let what = if metadata.is_dir() { "a directory" } else { "no regular file" };
            return Err(Failure::usage(format!("inspect {}: it is {what}", path.display())).into());
        }
        let file = File::open(path).map_err(failed)?;
        let mut start = Vec::new();
        (&file).take(START).read_to_end(&mut start).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, bytes: metadata.len(), start })
    }

    /// Reads the whole file.
    fn read(&self) -> Result<Vec<u8>> {
        let mut content = self.start.clone();
        content.reserve_exact(usize::try_from(self.bytes.saturating_sub(content.len() as u64))?);
        let failed = |error| Failure::usage(format!("inspect {}: {error}", self.path.display()));
        (&self.file).read_to_end(&mut content).map_err(failed)?;
        Ok(content)
    }
}

/// Builds the agent unless it is up to date. Returns the path of its executable.
fn agent(args: &InspectArgs, inspection: &Inspection) -> Result<PathBuf> {
    let workspace = Workspace::find()?;
    let build = BuildArgs { arch: inspection.arch, profile: args.profile.clone() };
    let shell = Shell::new().context("create the shell that runs commands")?;
    Ok(build::build(&shell, &workspace, &build)?.path)
}

fn as_json(file: &Opened, inspection: &Inspection, report: &Report, seconds: f64) -> serde_json::Value {
    let known = match &inspection.place {
        DeviceRoot::Image(image, None) => json!({
            "from": image.name, "known": "release",
            "glibc": image.expected.as_ref().map(|expected| &expected.glibc),
        }),
        DeviceRoot::Image(image, Some(inventory)) => json!({
            "from": image.name, "known": "all", "source": inventory.source,
            "libraries": inventory.libraries.len(),
        }),
        DeviceRoot::Sysroot(path, _) => json!({ "from": path.to_string_lossy(), "known": "all" }),
    };
    json!({
        "schema": SCHEMA,
        "verdict": if report.is_sound() { "sound" } else { "refused" },
        "file": { "path": file.path.to_string_lossy(), "bytes": file.bytes },
        "target": {
            "arch": inspection.arch, "device": inspection.device.name, "about": inspection.device.about,
            "libraries": known,
        },
        "findings": report.findings,
        "seconds": round(seconds),
    })
}

fn print(path: &Path, inspection: &Inspection, report: &Report, verbosity: Verbosity) {
    if !verbosity.quiet {
        let informs = report.of(Severity::Informs).filter(|finding| verbosity.verbose || says_more(finding));
        for finding in report.of(Severity::Refused).chain(report.of(Severity::Warned)).chain(informs) {
            for line in lines(finding, verbosity.verbose) {
                message!("{line}");
            }
            for path in finding.paths.iter().filter(|_| verbosity.verbose) {
                message!("         reached through {path}");
            }
        }
    }
    let verdict = if report.is_sound() { "sound" } else { "REFUSED" };
    let warnings = report.of(Severity::Warned).count();
    let warned = if warnings == 0 { String::new() } else { format!(", {warnings} warning(s)") };
    message!(
        "{verdict}{warned}: {} on {} with {}",
        path.display(),
        inspection.device.name,
        inspection.name()
    );
}

/// Returns whether a finding of severity `informs` is shown without `-v`. It is shown if it has a remedy, or if it
/// lists instructions that are guarded by a check at run time.
fn says_more(finding: &Finding) -> bool {
    !finding.remedy.is_empty() || (finding.id == "instructions" && !finding.details.is_empty())
}

fn lines(finding: &Finding, all: bool) -> Vec<String> {
    let mut lines = vec![format!("{:<8} {}: {}", finding.severity, finding.id, finding.found)];
    let rest = [("the target", &finding.offers), ("what to do", &finding.remedy)];
    lines.extend(
        rest.iter()
            .filter(|(_, text)| !text.is_empty())
            .map(|(what, text)| format!("         {what}: {text}")),
    );
    let shown = if all { finding.details.len() } else { SHOWN.min(finding.details.len()) };
    lines.extend(finding.details[..shown].iter().map(|detail| format!("         - {detail}")));
    let more = finding.details.len() - shown;
    if more > 0 {
        lines.push(format!("         - and {more} more, which -v and --json list"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_regular_file_is_opened() {
        for (path, words) in
            [("/dev/zero", "no regular file"), ("/", "a directory"), ("/nonexistent", "No such")]
        {
            let error = Opened::at(Path::new(path)).err().unwrap();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn the_text_has_the_first_details_and_says_how_many_there_are() {
        let finding = Finding::informs("needed", "").details((0..20).map(|number| number.to_string()));
        let lines = [lines(&finding, false), lines(&finding, true)];
        assert_eq!(lines.each_ref().map(Vec::len), [1 + SHOWN + 1, 1 + 20]);
        assert!(lines[0].last().unwrap().contains("12 more"));
    }
}
