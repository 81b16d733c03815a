//! `cargo xtask bench footprint`: measures the memory and processor time that the agent uses on an emulated device.
//! One smoke leaves the agent alone for a minute.

use anyhow::{Context, Result};
use serde_json::json;

use super::Bench;

/// The seconds for which the agent is left alone: long enough for a dozen heartbeats.
const REST: &str = "60";

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let arch = bench.args.arch;
    let (report, _) = bench.step(&arch.to_string(), "smoke", || {
        let measured = bench.smoke(&["--cold", "--rest", REST])?;
        Ok((measured, "the agent was left alone for a minute".to_owned()))
    })?;
    let footprint = report.evidence.footprint.context("the report has no footprint of the agent")?;
    let accelerator = report.host.accelerator.context("the report names no accelerator")?;
    let rest = footprint.rest_cpu_milliseconds as f64 * 100.0 / footprint.rest_milliseconds.max(1) as f64;
    let first = footprint.first_status_milliseconds;
    let first = first.map_or("not seen".to_owned(), |first| format!("{:.2} s", first as f64 / 1000.0));
    let executable = footprint.executable_bytes as f64 / f64::from(1 << 20);
    let resident = footprint.resident_kib as f64 / 1024.0;
    let text = format!(
        "{arch}, {accelerator}: executable {executable:.1} MiB, resident {resident:.1} MiB, \
         first status after {first}, at rest {rest:.2} % of a processor"
    );
    let figures = json!({ "schema": 1, "arch": arch, "accelerator": accelerator, "footprint": footprint });
    bench.print(&figures, text)
}
