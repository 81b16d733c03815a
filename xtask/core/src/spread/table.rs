//! The table at the end of a call with several smokes, and the exit code of the call.

use std::path::PathBuf;

use crate::arch::VmArchitecture;
use crate::error::{EXIT_USAGE, Verdict};
use crate::format::human_seconds;
use crate::output::clean;
use crate::report::Report;

/// The row of one smoke.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub arch: VmArchitecture,
    pub image: String,
    pub host: String,
    /// `None` for a smoke that was not started.
    pub exit_code: Option<u8>,
    pub seconds: f64,
    /// The failed phase, the error and its innermost cause; `None` for a verified smoke.
    pub reason: Option<String>,
    /// The page with the report, if the smoke has written one.
    pub report: Option<PathBuf>,
}

impl Row {
    /// Adds the result and the reason from a smoke's report.
    pub fn fill(&mut self, report: &Report) {
        self.exit_code = Some(report.exit_code);
        self.reason = report.failure.as_ref().map(|failure| {
            let cause = failure.causes.last().map_or(String::new(), |cause| format!(": {cause}"));
            format!("{}: {}{cause}", failure.phase.title(), failure.error)
        });
    }

    fn verdict(&self) -> &'static str {
        let words = [
            (Verdict::Verified.exit_code(), "VERIFIED"),
            (Verdict::Failed.exit_code(), "FAILED"),
            (Verdict::Interrupted.exit_code(), "INTERRUPTED"),
            (EXIT_USAGE, "USAGE"),
        ];
        let Some(code) = self.exit_code else { return "not started" };
        words.into_iter().find(|(of, _)| *of == code).map_or("UNAVAILABLE", |(_, word)| word)
    }

    fn cells(&self) -> [String; 6] {
        let started = self.exit_code.is_some();
        [
            self.arch.to_string(),
            clean(&self.image),
            clean(&self.host),
            self.verdict().to_owned(),
            if started { human_seconds(self.seconds) } else { "-".to_owned() },
            self.report.as_ref().map_or("-".to_owned(), |path| path.display().to_string()),
        ]
    }
}

const HEAD: [&str; 6] = ["arch", "image", "host", "verdict", "time", "report"];

/// Returns the lines of the table: a row for each smoke, followed by the first line of its reason.
pub fn lines(rows: &[Row]) -> Vec<String> {
    let cells: Vec<_> = [HEAD.map(str::to_owned)].into_iter().chain(rows.iter().map(Row::cells)).collect();
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let line = |row: &[String; 6]| {
        let [arch, image, host, verdict, time, report] = row;
        let [a, b, c, d, e] = [0, 1, 2, 3, 4].map(width);
        format!("{arch:<a$}  {image:<b$}  {host:<c$}  {verdict:<d$}  {time:>e$}  {report}")
    };
    let mut lines = vec![line(&cells[0])];
    for (row, cells) in rows.iter().zip(&cells[1..]) {
        lines.push(line(cells));
        let reason = row.reason.as_deref().and_then(|reason| reason.lines().next());
        lines.extend(reason.map(|reason| format!("    {}", clean(reason))));
    }
    lines
}

/// Returns the exit code of the call: 130 if a smoke was interrupted or not started, 1 if one failed, and then the code
/// of a smoke that ended for another reason. It is 0 only if every smoke has ended with 0.
pub fn exit_code(rows: &[Row]) -> u8 {
    let codes: Vec<_> =
        rows.iter().map(|row| row.exit_code.unwrap_or(Verdict::Interrupted.exit_code())).collect();
    let order = [Verdict::Interrupted, Verdict::Failed, Verdict::Unavailable].map(Verdict::exit_code);
    let first = order.into_iter().find(|code| codes.contains(code));
    first.or_else(|| codes.into_iter().find(|code| *code != 0)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Failure;

    fn row(arch: VmArchitecture, image: &str, host: &str, exit_code: Option<u8>) -> Row {
        let report = exit_code.map(|code| PathBuf::from(format!("/r/{code}/report.html")));
        Row {
            arch,
            image: image.to_owned(),
            host: host.to_owned(),
            exit_code,
            seconds: 61.4,
            reason: None,
            report,
        }
    }

    #[test]
    fn the_table_names_each_smoke_its_verdict_its_reason_and_its_report() {
        use VmArchitecture::{Aarch64, X86_64};
        let mut rows = [
            row(Aarch64, "ubuntu-24.04", "qemu+ssh://me@far/system", Some(0)),
            row(Aarch64, "debian-12", "qemu:///system", Some(1)),
            row(X86_64, "debian-12", "qemu:///system", Some(69)),
            row(X86_64, "a\x1b[1m", "qemu:///system", Some(130)),
            row(X86_64, "b", "-", None),
        ];
        (rows[1].seconds, rows[1].reason) = (725.0, Some("join: no status\nVERIFIED".to_owned()));
        let error =
            anyhow::anyhow!("denied").context("open /q").context(Failure::host("no QEMU", "install it"));
        rows[2].fill(&Report::before_run(X86_64, &error));
        let shown = lines(&rows).into_iter().map(|line| line + "\n").collect::<String>();
        crate::golden::compare("several.txt", shown);
    }

    #[test]
    fn the_exit_code_is_that_of_the_worst_smoke() {
        for (codes, code) in [
            (&[][..], 0),
            (&[Some(0), Some(0)], 0),
            (&[Some(0), Some(69)], 69),
            (&[Some(69), Some(1), Some(0)], 1),
            (&[Some(2), Some(0)], 2),
            (&[Some(2), Some(69)], 69),
            (&[Some(1), Some(130)], 130),
            (&[Some(0), None], 130),
            (&[Some(101)], 101),
        ] {
            let rows: Vec<_> =
                codes.iter().map(|code| row(VmArchitecture::Aarch64, "a", "h", *code)).collect();
            assert_eq!(exit_code(&rows), code, "{codes:?}");
        }
    }
}
