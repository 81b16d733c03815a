//! The timeline: the bars of the phases, the marks of boots and faults, and the console's lines of each phase.

use maud::{Markup, html};
use xtask_core::format::human_seconds;
use xtask_core::report::{EventKind, PhaseReport, PhaseStatus, Report};

use crate::words::status_word;
use crate::{Evidence, console_of, last_lines};

/// The maximum number of the console's lines that a page shows of one phase, and the maximum length of a line.
const CONSOLE_LINES: usize = 60;
const LINE_CHARACTERS: usize = 160;

pub(crate) fn phases(report: &Report, evidence: &Evidence) -> Markup {
    html! {
        h2 id="timeline" { "Timeline" }
        p { "Each bar is a phase. The thin lines are the boots and the faults of the list below." }
        section.scroll tabindex="0" aria-labelledby="timeline" {
            table {
                thead { tr {
                    th scope="col" { "Phase" } th scope="col" { "Outcome" } th.n scope="col" { "Time" }
                    th.wide scope="col" { "From the start to the end of the run" } th scope="col" { "Detail" }
                } }
                tbody { @for phase in &report.phases { (row(report, phase)) } }
            }
        }
        @if !report.events.is_empty() {
            h2 { "Boots and faults" }
            ol { @for event in &report.events {
                li { (human_seconds(event.seconds)) ": " strong { (kind(event.kind)) } ", " (event.text) }
            } }
        }
        @if !evidence.console.is_empty() {
            h2 { "The guest's console in each phase" }
            @for (index, phase) in report.phases.iter().enumerate() {
                (console(report, phase, console_of(report, &evidence.console, index)))
            }
        }
    }
}

fn kind(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Boot => "boot",
        EventKind::Fault => "fault",
        EventKind::End => "end of a fault",
    }
}

fn row(report: &Report, phase: &PhaseReport) -> Markup {
    let class = class_of(phase.status);
    let percent = |seconds: f64| (100.0 * seconds / report.seconds.max(0.001)).clamp(0.0, 100.0);
    let left = percent(phase.started_seconds);
    let width = percent(phase.seconds).min(100.0 - left);
    let is_skipped = phase.status == PhaseStatus::Skipped;
    let limit = phase.limit_seconds.map(|limit| format!("limit {}", human_seconds(limit)));
    html! {
        tr {
            th scope="row" { (phase.name.title()) }
            td class=(format!("short {class}")) { (status_word(phase.status)) }
            td.n title=[limit] { @if !is_skipped { (human_seconds(phase.seconds)) } }
            td.wide { div.track aria-hidden="true" {
                @if !is_skipped {
                    div class=(format!("bar {class}")) style=(format!("left:{left:.2}%;width:{width:.2}%")) {}
                }
                @for event in &report.events {
                    div.mark style=(format!("left:{:.2}%", percent(event.seconds))) {}
                }
            } }
            td { @if !is_skipped { (phase.detail) } }
        }
    }
}

pub(crate) fn class_of(status: PhaseStatus) -> &'static str {
    match status {
        PhaseStatus::Passed => "passed",
        PhaseStatus::Failed => "failed",
        PhaseStatus::Skipped => "skipped",
    }
}

fn console(report: &Report, phase: &PhaseReport, printed: &[u8]) -> Markup {
    let count = printed.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
    let lines = last_lines(printed, CONSOLE_LINES).into_iter().map(shortened);
    let lines: Vec<_> = lines.filter(|line| !line.is_empty()).collect();
    let is_open = report.failure.as_ref().is_some_and(|failure| failure.phase == phase.name);
    html! {
        @if !lines.is_empty() {
            details open[is_open] {
                summary {
                    (phase.name.title()) ": " (count) " line" @if count != 1 { "s" }
                    @if count > lines.len() { ", the last " (lines.len()) " are shown" }
                }
                pre tabindex="0" { (lines.join("\n")) }
            }
        }
    }
}

fn shortened(line: String) -> String {
    match line.char_indices().nth(LINE_CHARACTERS) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line,
    }
}
