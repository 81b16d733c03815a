//! The timeline: the bars of the phases, the marks of boots and faults, and the console's lines of each phase.

use maud::{Markup, html};
use xtask_core::format::human_seconds;
use xtask_core::report::{EventKind, PhaseReport, PhaseStatus, Report};

use crate::words::status_word;
use crate::{Evidence, LINE_CHARACTERS, console_of, last, lines, shortened};

/// The maximum number of the console's lines that a page shows of one phase, and their maximum size in HTML.
const CONSOLE_LINES: usize = 60;
const CONSOLE_BYTES: usize = 6_000;
/// The maximum number of boots and faults that a page shows.
const EVENTS: usize = 40;
/// The maximum number of characters of the detail of a phase.
const DETAIL_CHARACTERS: usize = 300;

pub(crate) fn phases(report: &Report, evidence: &Evidence) -> Markup {
    html! {
        h2 id="timeline" { "Timeline" }
        p { "Each bar is a phase. The thin lines are the boots and the faults of the list below." }
        section.scroll tabindex="0" aria-labelledby="timeline" {
            table {
                thead { tr {
                    th scope="col" { "Phase" } th scope="col" { "Outcome" } th.n scope="col" { "Start" }
                    th.n scope="col" { "Time" }
                    th.wide scope="col" { "From the start to the end of the run" } th scope="col" { "Detail" }
                } }
                tbody { @for phase in &report.phases { (row(report, phase)) } }
            }
        }
        @if !report.events.is_empty() {
            h2 { "Boots and faults" }
            // Events that follow each other within a second must be told apart.
            ol { @for event in report.events.iter().take(EVENTS) {
                li { (format!("{:.1} s", event.seconds)) ": " strong { (kind(event.kind)) } ", " (shortened(&event.text, LINE_CHARACTERS)) }
            } }
        }
        @if !evidence.console.is_empty() {
            h2 { "The guest's console" }
            @if report.phases.iter().all(|phase| phase.console_offset.is_none()) {
                (console("all phases", true, &evidence.console))
            }
            @for (index, phase) in report.phases.iter().enumerate() {
                @if let Some(printed) = console_of(report, &evidence.console, index) {
                    (console(&phase.name.title(), is_failed(report, phase), printed))
                }
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
    let left = percent(phase.started_seconds.unwrap_or(0.0));
    let width = percent(phase.seconds).min(100.0 - left);
    let is_skipped = phase.status == PhaseStatus::Skipped;
    let limit = phase.limit_seconds.map(|limit| format!("limit {}", human_seconds(limit)));
    html! {
        tr {
            th scope="row" { (phase.name.title()) }
            td class=(format!("short {class}")) { (status_word(phase.status)) }
            td.n { @if let Some(start) = phase.started_seconds { (human_seconds(start)) } }
            td.n title=[limit] { @if !is_skipped { (human_seconds(phase.seconds)) } }
            td.wide { div.track aria-hidden="true" {
                @if phase.started_seconds.is_some() {
                    div class=(format!("bar {class}")) style=(format!("left:{left:.2}%;width:{width:.2}%")) {}
                }
                @for event in report.events.iter().take(EVENTS) {
                    div.mark style=(format!("left:{:.2}%", percent(event.seconds))) {}
                }
            } }
            td { @if !is_skipped { (shortened(&phase.detail, DETAIL_CHARACTERS)) } }
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

fn is_failed(report: &Report, phase: &PhaseReport) -> bool {
    report.failure.as_ref().is_some_and(|failure| failure.phase == phase.name)
}

/// Returns the end of an output of the guest as a part of the page that can be opened.
fn console(title: &str, is_open: bool, printed: &[u8]) -> Markup {
    let all = lines(printed);
    let shown = last(&all, CONSOLE_LINES, CONSOLE_BYTES);
    html! {
        @if !all.is_empty() {
            details open[is_open] {
                summary {
                    (title) ": " (all.len()) " line" @if all.len() != 1 { "s" }
                    @if all.len() > shown.len() { ", the last " (shown.len()) " are shown" }
                }
                pre tabindex="0" { (shown.join("\n")) }
            }
        }
    }
}
