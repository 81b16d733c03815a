//! `report.html`: one file that loads nothing and needs no script. It has at most 300 KB, because each list and each
//! text in it has a maximum length.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use xtask_core::error::Verdict;
use xtask_core::format::{human_seconds, name_of};
use xtask_core::report::past::PastRun;
use xtask_core::report::{FailureReport, Report, StatusEvidence, WorkloadEvidence};

use crate::words::{cleaned, not_tested, short, verdict};
use crate::{Evidence, faults, last, lines, shortened, timeline, torture};

/// The maximum number of characters of a text of the report.
const CHARACTERS: usize = 400;
/// The maximum number of characters of the error, which may list all parts of a machine.
const ERROR_CHARACTERS: usize = 1500;
/// The maximum number of warnings, and of causes of a failure.
const TEXTS: usize = 8;
/// The maximum number of the lines of the journal, and of the console's end, with their maximum size in HTML.
const LOG: (usize, usize) = (80, 12_000);
/// The maximum number of the lines of the journal that name the agent, with their maximum size in HTML.
const AGENT_LOG: (usize, usize) = (30, 5_000);
/// The maximum number of the lines of guest.txt, with their maximum size in HTML.
const GUEST: (usize, usize) = (250, 12_000);
/// The number of statuses that are shown at the beginning and at the end of their list.
const STATUSES: usize = 40;
/// The maximum number of characters of the list of deployments of a status.
const DEPLOYMENTS: usize = 60;

/// Returns the page about a run.
pub fn html(report: &Report, evidence: &Evidence) -> String {
    let report = &cleaned(report);
    let word = name_of(&report.verdict);
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (word) ": smoke of " (report.guest.arch) ", " (report.started_at) }
                style { (PreEscaped(include_str!("style.css").trim_end())) }
            }
            body {
                main {
                    h1 class=(word) { (word.to_uppercase()) ": iot-agent on " (report.guest.arch) }
                    p { (verdict(report)) }
                    @if let Some(failure) = &report.failure { (cause(failure, &word, evidence)) }
                    (subject(report))
                    (limitations(report))
                    (torture::section(report))
                    (faults::section(report))
                    (comparison(report))
                    (timeline::phases(report, evidence))
                    (journal(report, evidence))
                    (statuses(report))
                    (warnings(report))
                    (history(report, &evidence.past))
                }
            }
        }
    };
    page.into_string()
}

fn cause(failure: &FailureReport, word: &str, evidence: &Evidence) -> Markup {
    let agent_lines = about_agent(&evidence.journal);
    html! {
        section class=(format!("cause {word}")) aria-label="The cause" {
            dl {
                dt { "What failed, in the phase " (failure.phase.title()) }
                dd { (shortened(&failure.error, ERROR_CHARACTERS)) }
                @if !failure.causes.is_empty() {
                    dt { "Why" }
                    @for cause in failure.causes.iter().take(TEXTS) { dd { (text(cause)) } }
                }
                @if let Some(hint) = &failure.hint { dt { "What to do" } dd { (text(hint)) } }
            }
            @if !agent_lines.is_empty() {
                details open {
                    summary { "The last lines of the guest's journal about the agent" }
                    pre tabindex="0" { (agent_lines) }
                }
            }
            @if !failure.console_tail.is_empty() {
                details {
                    summary { "The last lines of the guest's console" }
                    pre tabindex="0" { (end_of(failure.console_tail.join("\n").as_bytes())) }
                }
            }
        }
    }
}

fn subject(report: &Report) -> Markup {
    let (guest, host) = (&report.guest, &report.host);
    let mut rows: Vec<(&str, String)> = Vec::new();
    if let Some(agent) = &report.agent {
        let version = agent.version.as_deref().unwrap_or("of unknown version");
        rows.push(("Agent", format!("{version}, {}, sha256 {}", agent.target, agent.sha256)));
    }
    if let Some(commit) = &report.workspace {
        rows.push(("Commit", commit.commit.clone()));
    }
    if let Some(image) = &guest.image {
        rows.push(("Image", format!("{}, {}, from {}", image.name, image.digest, image.source)));
    }
    if !guest.cpu.is_empty() {
        let (kind, cpu) = (&guest.machine_type, &guest.cpu);
        rows.push(("Machine", format!("{kind} {cpu}, {} processors, {} MiB", guest.vcpus, guest.memory_mib)));
    }
    if let (Some(os), Some(kernel)) = (&guest.os_release, &guest.kernel) {
        rows.push(("Guest", format!("{} {}, Linux {kernel}", os.id, os.version_id)));
    }
    let accelerator = host.accelerator.map_or(String::new(), |accelerator| format!(", {accelerator}"));
    let qemu = host.qemu.as_deref().map_or(String::new(), |version| format!(", QEMU {version}"));
    if !host.os.is_empty() {
        rows.push((
            "Host",
            format!("{}, Linux {}, {} CPUs{qemu}{accelerator}", host.os, host.kernel, host.cpus),
        ));
    }
    if let Some(daemon) = &host.daemon {
        let name = daemon.host.as_deref().map_or(String::new(), |name| format!("{name}, "));
        let cpus = daemon.cpus.map_or(String::new(), |cpus| format!("{cpus} CPUs, "));
        rows.push(("libvirt", format!("{}: {name}{cpus}network {}", daemon.uri, daemon.network)));
    }
    if let Some(snapshot) = &report.snapshot {
        rows.push(("Snapshot", format!("made at {} by the run {}", snapshot.made_at, snapshot.made_by)));
    }
    rows.push((
        "Run",
        format!("{}, started at {}, {}", report.run_id, report.started_at, human_seconds(report.seconds)),
    ));
    html! {
        h2 { "What was tested" }
        table { tbody { @for (name, value) in rows { tr { th scope="row" { (name) } td { code { (text(&value)) } } } } } }
    }
}

fn limitations(report: &Report) -> Markup {
    let sentences = not_tested(report);
    html! {
        h2 { "What was not tested, or tested differently" }
        @if sentences.is_empty() {
            p { "Nothing: all phases ran, with the release build and the wanted image." }
        } @else {
            ul { @for sentence in sentences { li { (text(&sentence)) } } }
        }
    }
}

/// Compares the device before the power cut, without a broker, and after the broker's return.
fn comparison(report: &Report) -> Markup {
    let evidence = &report.evidence;
    let status = |of: fn(&StatusEvidence) -> String| {
        [evidence.join.as_ref().map(of), None, evidence.rejoin.as_ref().map(of)]
    };
    let workload = |of: fn(&WorkloadEvidence) -> String| {
        [&evidence.workload, &evidence.workload_offline, &evidence.workload_rejoin]
            .map(|answer| answer.as_ref().map(of))
    };
    let rows = [
        ("Boot id of the agent's status", status(|status| short(&status.boot_id).to_owned())),
        ("Revision of the status", status(|status| status.kv_revision.to_string())),
        ("Executable of the agent", status(|status| short(&status.exe_sha256).to_owned())),
        ("Machine type", status(|status| status.machine.clone())),
        ("Boot id of the workload", workload(|answer| short(&answer.boot_id).to_owned())),
        (
            "Page size of the workload's kernel",
            workload(|answer| answer.page_size.map_or(String::new(), |bytes| bytes.to_string())),
        ),
        ("Generation of the workload", workload(|answer| answer.generation.to_string())),
        ("Starts of the workload", workload(|answer| answer.starts.to_string())),
    ];
    html! {
        @if evidence.join.is_some() {
            h2 id="evidence" { "Evidence before and after the power cut" }
            section.scroll tabindex="0" aria-labelledby="evidence" {
                table {
                    thead { tr {
                        td {} th scope="col" { "Before" } th scope="col" { "After, without a broker" }
                        th scope="col" { "After, with the broker" }
                    } }
                    tbody { @for (name, values) in rows {
                        tr { th scope="row" { (name) } @for value in values { td { code { (shortened(&value.unwrap_or_default(), DEPLOYMENTS)) } } } }
                    } }
                }
            }
        }
    }
}

fn journal(report: &Report, evidence: &Evidence) -> Markup {
    html! {
        @if !evidence.journal.is_empty() {
            h2 { "The end of the guest's journal" }
            pre tabindex="0" { (end_of(&evidence.journal)) }
        } @else if report.verdict == Verdict::Failed && !evidence.console.is_empty() {
            h2 { "The end of the guest's journal" }
            p { "There is no journal.log: the guest was off, was not up yet, had rebooted by itself, or did not answer." }
        }
        @if !evidence.guest.is_empty() {
            h2 { "The state of the guest" }
            details {
                summary { "The agent's unit, failed units, cloud-init, containers, disks and memory" }
                pre tabindex="0" { (last(&lines(&evidence.guest), GUEST.0, GUEST.1).join("\n")) }
            }
        }
    }
}

/// Returns the last lines of the journal that name the agent: its own lines, and those of systemd about its unit.
fn about_agent(journal: &[u8]) -> String {
    let mut lines = lines(journal);
    lines.retain(|line| line.contains("iot-agent"));
    last(&lines, AGENT_LOG.0, AGENT_LOG.1).join("\n")
}

/// Returns a text of the report, which an agent or a guest can have made long.
fn text(text: &str) -> String {
    shortened(text, CHARACTERS)
}

/// Returns the last lines of an output of the guest.
fn end_of(output: &[u8]) -> String {
    last(&lines(output), LOG.0, LOG.1).join("\n")
}

fn statuses(report: &Report) -> Markup {
    let all = &report.statuses;
    let is_shown = |index: usize| index < STATUSES || index + STATUSES >= all.len();
    let shown = all.iter().enumerate().filter(|(index, _)| is_shown(*index)).map(|(_, status)| status);
    html! {
        @if !report.statuses.is_empty() {
            h2 id="statuses" { "Statuses of the agent" }
            section.scroll tabindex="0" aria-labelledby="statuses" {
                table {
                    thead { tr {
                        th.n scope="col" { "Time" } th.n scope="col" { "Revision" } th scope="col" { "Boot id" }
                        th.n scope="col" { "Number" } th.n scope="col" { "Uptime" } th.n scope="col" { "Acknowledges" }
                        th scope="col" { "Deployments" }
                    } }
                    tbody { @for status in shown {
                        tr {
                            td.n { (human_seconds(status.seconds)) } td.n { (status.kv_revision) }
                            td { code { (short(&status.boot_id)) } } td.n { (status.sequence) }
                            td.n { (status.uptime_seconds) " s" } td.n { (status.desired_revision) }
                            td { (shortened(&status.deployments.join(", "), DEPLOYMENTS)) }
                        }
                    } }
                }
            }
        }
    }
}

fn warnings(report: &Report) -> Markup {
    html! {
        @if !report.warnings.is_empty() {
            h2 { "Warnings" }
            ul { @for warning in report.warnings.iter().take(TEXTS) { li { (text(warning)) } } }
        }
    }
}

fn history(report: &Report, past: &[PastRun]) -> Markup {
    let longest = past.iter().map(|run| run.seconds).fold(0.001, f64::max);
    let verified = past.iter().filter(|run| run.verdict == Verdict::Verified).count();
    html! {
        @if !past.is_empty() {
            h2 id="history" { "The last runs in this cache" }
            p { "Verified: " (verified) " of " (past.len()) "." }
            section.scroll tabindex="0" aria-labelledby="history" {
                table {
                    thead { tr {
                        th scope="col" { "Started" } th scope="col" { "Outcome" } th.n scope="col" { "Time" }
                        th.wide scope="col" { "" span.dim { "Time as a bar" } } th scope="col" { "Guest" }
                        th scope="col" { "Commit" }
                    } }
                    tbody { @for run in past.iter().rev() { (past_run(report, run, longest)) } }
                }
            }
        }
    }
}

fn past_run(report: &Report, run: &PastRun, longest: f64) -> Markup {
    let word = name_of(&run.verdict);
    let width = 100.0 * run.seconds / longest;
    let warm = if run.is_warm { "warm" } else { "cold" };
    let accelerator = run.accelerator.map_or(String::new(), |accelerator| format!(", {accelerator}"));
    let image = run.image.as_deref().unwrap_or("no image");
    html! {
        tr {
            td { (run.started_at) @if run.run_id == report.run_id { " (this run)" } }
            td class=(word) {
                (word) @if let Some(phase) = run.failed_in { " in " (phase.title()) }
                @if let Some(fault) = &run.sabotage { ", planted: " (fault) }
                @if let Some(disturbance) = &run.disturbance { ", disturbed: " (disturbance) }
            }
            td.n { (human_seconds(run.seconds)) }
            td.wide { div.track aria-hidden="true" { div.bar style=(format!("left:0;width:{width:.2}%")) {} } }
            td { (run.arch) ", " (image) ", " (warm) (accelerator) }
            td.short { code { (run.commit.as_deref().map(short).unwrap_or_default()) } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;
    use xtask_core::report::past::REMEMBERED;
    use xtask_core::report::{EventKind, EventReport, MAX_STATUSES, StatusReport};

    fn page(report: &Report) -> String {
        html(report, &Evidence::default())
    }

    #[test]
    fn a_page_says_what_failed_and_why_and_what_to_do() {
        let text = page(&samples::failed());
        for words in [
            "<h1 class=\"failed\">FAILED: iot-agent on aarch64</h1>",
            "ask root in the guest",
            "systemd has restarted the agent 1 time",
            "read its journal",
            "&lt;script&gt;alert(1)&lt;/script&gt;",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(!text.contains("<script"), "a page has no script");
        assert!(!page(&samples::verified()).contains("What failed"));
    }

    #[test]
    fn a_page_shows_the_evidence_side_by_side() {
        let text = page(&samples::verified());
        let row = "<th scope=\"row\">Starts of the workload</th><td><code>1</code></td><td><code>2</code></td><td><code>3";
        assert!(text.contains(row), "{text}");
        assert!(text.contains("<strong>fault</strong>, power cut"));
    }

    /// The largest possible page: each list is full, and each text is long and has characters that are escaped.
    #[test]
    fn the_largest_page_has_at_most_300_kilobytes() {
        let mut report = samples::verified();
        let long = "\"<&\"".repeat(1_000);
        let mut failure = samples::failed().failure.unwrap();
        (failure.error, failure.hint) = (long.clone(), Some(long.clone()));
        (failure.causes, failure.console_tail) = (vec![long.clone(); 20], vec![long.clone(); 30]);
        report.failure = Some(failure);
        report.warnings = vec![long.clone(); 100];
        let status = StatusReport { deployments: vec![long.clone(); 3], ..report.statuses[0].clone() };
        report.statuses = vec![status; MAX_STATUSES];
        report.events = vec![EventReport { seconds: 1.0, kind: EventKind::Fault, text: long.clone() }; 200];
        let line = format!("{}\n", "\"".repeat(200));
        for (index, phase) in report.phases.iter_mut().enumerate() {
            phase.console_offset = Some((index * 100 * line.len()) as u64);
            phase.detail.clone_from(&long);
        }
        let evidence = Evidence {
            console: line.repeat(100 * report.phases.len()).into_bytes(),
            journal: format!("iot-agent {line}").repeat(100).into_bytes(),
            guest: line.repeat(300).into_bytes(),
            past: vec![PastRun::from(&report); REMEMBERED],
        };
        let page = html(&report, &evidence);
        assert!(page.len() <= 300_000, "{} bytes", page.len());
        assert!(page.contains("100 lines, the last 4 are shown"));
        assert!(!page.contains("http-equiv") && !page.contains("src="), "a page loads nothing");
    }

    #[test]
    fn a_page_of_a_failure_shows_the_agents_lines_and_the_state_of_the_guest() {
        let noise = "systemd-resolved[1]: degraded\n".repeat(200);
        let journal =
            format!("systemd[1]: iot-agent.service: Failed with result 'timeout'.\n{noise}").into_bytes();
        let evidence = Evidence { journal, guest: b"ExecStartPre=wait\n".to_vec(), ..Evidence::default() };
        let text = html(&samples::failed(), &evidence);
        assert!(text.contains("Failed with result 'timeout'"), "{text}");
        assert!(text.contains("ExecStartPre=wait"), "{text}");
        let with_console =
            |report: &Report| html(report, &Evidence { console: b"a\n".to_vec(), ..Evidence::default() });
        assert!(with_console(&samples::failed()).contains("There is no journal"));
        for other in [samples::unavailable(), samples::verified()] {
            assert!(!with_console(&other).contains("There is no journal"), "its journal is not read");
        }
    }

    #[test]
    fn a_report_of_an_earlier_version_has_one_console_and_no_bars() {
        let mut report = samples::verified();
        for phase in &mut report.phases {
            (phase.started_seconds, phase.console_offset) = (None, None);
        }
        let page = html(&report, &Evidence { console: b"a\nb\n".to_vec(), ..Evidence::default() });
        assert!(page.contains("all phases: 2 lines") && !page.contains("class=\"bar"), "{page}");
    }
}
