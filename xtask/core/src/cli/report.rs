//! The flags of `cargo xtask report`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// The flags of `report`.
#[derive(Debug, Clone, Args)]
pub struct ReportArgs {
    /// The id of a run or its beginning, or a directory with a report.json [default: the newest run]
    pub run: Option<PathBuf>,

    /// Print the report in this format on stdout, instead of writing report.html and junit.xml
    #[arg(long, value_enum, value_name = "FORMAT", conflicts_with = "open")]
    pub format: Option<ReportFormat>,

    /// Open report.html with xdg-open
    #[arg(long)]
    pub open: bool,
}

/// The formats of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// One page that loads nothing
    Html,
    /// JUnit: a suite for the smoke, a case for each phase
    Junit,
    /// The summary for the page of a CI job
    Markdown,
    /// report.json
    Json,
}
