//! `cargo xtask bench footprint`: what the agent takes of an emulated device, by one smoke that leaves it alone for a minute.

use anyhow::{Context, Result};
use serde_json::json;
use xtask_core::cache::Cache;
use xtask_core::cli::BenchArgs;
use xtask_core::workspace::Workspace;

use super::{Scratch, smoke};
use xtask_jobs::{Step, Ui};

/// Seconds; long enough for a dozen heartbeats.
const REST: &str = "60";

pub(super) fn run(workspace: &Workspace, args: &BenchArgs, ui: &Ui) -> Result<()> {
    // Nobody else measures meanwhile.
    let cache = Cache::from_env()?;
    let _scratch = Scratch::new(&cache, ui)?;
    let step = Step { kind: "bench-footprint", what: &args.arch.to_string(), title: "smoke" };
    let (report, _) = ui.step(&cache, step, || {
        let measured = smoke(workspace, args, &["--cold", "--rest", REST], ui)?;
        Ok((measured, "the agent was left alone for a minute".to_owned()))
    })?;
    let footprint = report.evidence.footprint.context("the report has no footprint of the agent")?;
    let accelerator = report.host.accelerator.context("the report names no accelerator")?;
    let rest = footprint.rest_cpu_milliseconds as f64 * 100.0 / footprint.rest_milliseconds.max(1) as f64;
    if args.json {
        println!(
            "{:#}",
            json!({ "schema": 1, "arch": args.arch, "accelerator": accelerator, "footprint": footprint })
        );
        return Ok(());
    }
    let first = footprint.first_status_milliseconds;
    let first = first.map_or("not seen".to_owned(), |first| format!("{:.2} s", first as f64 / 1000.0));
    println!(
        "{}, {accelerator}: executable {:.1} MiB, resident {:.1} MiB, first status after {first}, at rest {rest:.2} % of a processor",
        args.arch,
        footprint.executable_bytes as f64 / f64::from(1 << 20),
        footprint.resident_kib as f64 / 1024.0,
    );
    Ok(())
}
