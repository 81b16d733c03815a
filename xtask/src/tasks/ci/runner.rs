//! Runs the steps of the suite, one by one or several at once, and counts the steps and their tests.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, IsTerminal as _};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use xtask_core::error::{Failure, Kind, Verdict};
use xtask_core::format::human_seconds;
use xtask_core::job;
use xtask_core::message;
use xtask_core::output::write_message;
use xtask_core::workspace::Workspace;

use super::draw::{TABLES, THIRD, note_skipped, split_tests};
use super::failures::FailedTests;
use super::tested::Smoke;
use super::{IT, Step};

/// The maximum number of crates in `xtask`. Each crate makes the first build on a fresh machine slower.
const MAX_CRATES: usize = 66;

/// The numbers of steps and tests that passed and failed.
#[derive(Debug, Default)]
pub(super) struct Count {
    pub(super) passed: u64,
    pub(super) failed: u64,
    /// The failed steps and tests, each with its error or its output.
    pub(super) failures: Vec<String>,
    /// The number of failed steps that ended with exit code 69, because this host is not ready for them.
    pub(super) unavailable: u64,
    /// The distributions that were not tested, each with the reason.
    pub(super) not_tested: Vec<String>,
}

/// Runs steps, and counts them and their tests.
pub(super) struct Runner<'a> {
    workspace: &'a Workspace,
    pub(super) third: Option<usize>,
    /// True if a smoke must fail instead of testing the fallback image.
    strict_image: bool,
    pub(super) count: Count,
}

impl<'a> Runner<'a> {
    pub(super) fn new(workspace: &'a Workspace, third: Option<usize>, strict_image: bool) -> Self {
        Self { workspace, third, strict_image, count: Count::default() }
    }

    pub(super) fn one_by_one(&mut self, steps: &[Step<'_>]) {
        steps.iter().for_each(|step| self.at_once(&[&[*step]]));
    }

    /// Runs lanes at the same time, and the steps of a lane one after the other. This saves time, because two
    /// processors are mostly idle while an emulated machine waits. Each line of output begins with the name of its
    /// step.
    pub(super) fn at_once(&mut self, lanes: &[&[Step<'_>]]) {
        let alone = lanes.concat().len() == 1;
        let this = &*self;
        let run = |(name, arguments): &Step<'_>| {
            let label = if alone { String::new() } else { format!("[{name}] ") };
            let arguments = expand(arguments);
            let started = Instant::now();
            let mut tests = Count::default();
            let result = this
                .chosen(name, &arguments)
                .and_then(|arguments| this.run_cargo(name, &arguments, &label, &mut tests));
            (tests, result, started.elapsed())
        };
        let ends: Vec<_> = std::thread::scope(|scope| {
            let lanes = lanes.iter().copied();
            let started: Vec<_> =
                lanes.map(|steps| scope.spawn(move || steps.iter().map(run).collect::<Vec<_>>())).collect();
            started.into_iter().flat_map(|thread| thread.join().expect("a step does not panic")).collect()
        });
        for ((name, _), (tests, result, elapsed)) in lanes.concat().iter().zip(ends) {
            self.count.passed += tests.passed;
            self.count.failed += tests.failed;
            self.count.failures.extend(tests.failures);
            self.count.not_tested.extend(tests.not_tested);
            self.close(name, &human_seconds(elapsed.as_secs_f64()), result);
        }
    }

    fn close(&mut self, name: &str, seconds: &str, result: Result<()>) {
        match result {
            Ok(()) => {
                self.count.passed += 1;
                message!("== {name}: passed in {seconds}");
            }
            Err(error) => {
                self.count.failed += 1;
                self.count.unavailable += u64::from(Kind::Host.is(&error));
                message!("== {name}: FAILED in {seconds}: {error:#}");
                self.count.failures.push(format!("{name}: {error:#}"));
            }
        }
    }

    /// Checks that `xtask` has few crates and does not link libvirt.
    pub(super) fn guard(&mut self) {
        let name = "dependencies of xtask";
        let tree = self
            .cargo("tree --color never --package xtask --edges normal --prefix none")
            .output()
            .context("run cargo tree");
        let checked = tree.and_then(|output| check_tree(&String::from_utf8_lossy(&output.stdout)));
        if let Ok(crates) = &checked {
            message!("== {name}: {crates} crates (limit {MAX_CRATES}), no virt-sys");
        }
        self.close(name, "no time", checked.map(drop));
    }

    fn cargo(&self, arguments: &str) -> Command {
        let mut command = self.workspace.cargo();
        command.args(arguments.split(' ')).env_remove(THIRD).stdin(Stdio::null());
        command.envs(self.third.map(|third| (THIRD, third.to_string())));
        command
    }

    /// Returns the arguments of a step. If its filter selects a table, the filter is replaced by the names of the
    /// tests that this run tries.
    fn chosen(&self, name: &str, arguments: &str) -> Result<String> {
        let filtered =
            arguments.strip_prefix(IT).map(|rest| rest.trim_start().split(' ').next().unwrap_or_default());
        let has_table = |filter: &&str| TABLES.iter().any(|table| table.starts_with(filter));
        let (Some(filter), Some(_)) = (filtered.filter(has_table), self.third) else {
            return Ok(arguments.to_owned());
        };
        let list = format!("{IT} {filter} --list --format terse");
        let output = self
            .cargo(&list)
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("run cargo {list}"))?;
        ensure!(output.status.success(), "cargo {list}: {}", output.status);
        let listed = String::from_utf8_lossy(&output.stdout);
        // The filter of a test program matches anywhere in a name: `images::` also matches `attempt::images::`.
        let named = listed.lines().filter_map(|line| line.strip_suffix(": test"));
        let names: Vec<_> = named.filter(|name| name.starts_with(filter)).map(str::to_owned).collect();
        let (tried, skipped) = split_tests(self.third, &names);
        ensure!(!tried.is_empty(), "cargo {list}: the draw has no test to try");
        note_skipped(name, skipped.iter().map(String::as_str));
        Ok(arguments.replace(filter, &format!("--exact {}", tried.join(" "))))
    }

    /// Runs a step and prints its output. Counts its tests, and the distributions that it did not test.
    fn run_cargo(&self, name: &str, arguments: &str, label: &str, tests: &mut Count) -> Result<()> {
        let arguments = match arguments.strip_prefix("test ") {
            // With this flag, cargo runs the other test binaries after a failure.
            Some(rest) => format!("test --no-fail-fast {rest}"),
            None => arguments.to_owned(),
        };
        let smoke = Smoke::of(self.workspace, name, &arguments);
        let more =
            smoke.as_ref().map(|smoke| smoke.begin(self.strict_image)).transpose()?.unwrap_or_default();
        let line = format!("cargo {arguments}");
        message!("== {name}: {line}");
        // Cargo shows a bar if its own stderr is a terminal. Otherwise cargo's progress goes through this process,
        // because cargo fails if it cannot write its progress.
        let shows_bar = label.is_empty() && std::io::stderr().is_terminal();
        let stderr = if shows_bar { Stdio::inherit() } else { Stdio::piped() };
        let mut cargo = self.cargo(&arguments);
        if smoke.is_none() {
            // Tests also run smokes, which fail on purpose. These must not be on the page of the job.
            for variable in job::VARIABLES {
                cargo.env_remove(variable);
            }
        }
        let mut child = cargo
            .args(more)
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("run {line}"))?;
        let stdout = child.stdout.take().context("the child's output was asked for")?;
        let stderr = child.stderr.take();
        std::thread::scope(|scope| {
            let passing = stderr.map(|stderr| scope.spawn(move || pass_on(stderr, label, |_| {})));
            let mut failed_tests = FailedTests::default();
            let read = pass_on(stdout, label, |text| {
                failed_tests.read(text);
                if let Some((passed, failed)) = test_result(text) {
                    tests.passed += passed;
                    tests.failed += failed;
                }
            });
            tests.failures.extend(failed_tests.texts().map(|text| format!("{name}: {text}")));
            read?;
            passing.map_or(Ok(()), |thread| thread.join().expect("reading lines does not panic"))
        })
        .with_context(|| format!("read the output of {line}"))?;
        let status = child.wait().with_context(|| format!("wait for {line}"))?;
        if let Some(smoke) = smoke {
            tests.not_tested.extend(smoke.not_tested(status.success())?);
        }
        check_status(status)?;
        check_ran(&arguments, tests)
    }
}

fn expand(arguments: &str) -> String {
    arguments.strip_prefix("IT ").map_or_else(|| arguments.to_owned(), |rest| format!("{IT} {rest}"))
}

/// Returns an error if the step failed. Exit code 69 gives a failure of the host.
fn check_status(status: ExitStatus) -> Result<()> {
    if status.code() == Some(Verdict::Unavailable.exit_code().into()) {
        bail!(Failure::host(format!("{status}: this host is not ready for it"), "see its messages above"));
    }
    ensure!(status.success(), "{status}");
    Ok(())
}

/// Returns an error if a test step ran no test, since a filter that matches no test proves nothing.
fn check_ran(arguments: &str, tests: &Count) -> Result<()> {
    ensure!(!arguments.starts_with("test ") || tests.passed > 0, "no test was run");
    Ok(())
}

/// Calls `look` with each line, and then prints the line after `label`. A command for the runner of a job on GitHub or
/// Gitea, `::error …`, must be at the start of its line.
fn pass_on(from: impl std::io::Read, label: &str, mut look: impl FnMut(&str)) -> Result<()> {
    for text in BufReader::new(from).lines() {
        let text = text.context("read a line")?;
        look(&text);
        let is_command = text.starts_with("::error ") || text.starts_with("::notice ");
        let label = if is_command { "" } else { label };
        write_message(&format!("{label}{text}\n"));
    }
    Ok(())
}

/// Returns the number of crates in the output of `cargo tree --prefix none`, or an error if there are too many or one
/// links libvirt.
fn check_tree(tree: &str) -> Result<usize> {
    let crates: BTreeSet<&str> =
        tree.lines().map(|line| line.trim_end_matches(" (*)")).filter(|line| !line.is_empty()).collect();
    ensure!(!crates.is_empty(), "cargo tree names no crate");
    let linked = crates.iter().find(|name| name.starts_with("virt-sys"));
    ensure!(linked.is_none(), "xtask links {linked:?}: it must build without libvirt");
    let count = crates.len();
    ensure!(count <= MAX_CRATES, "{count} crates, the limit is {MAX_CRATES}");
    Ok(count)
}

/// Parses the numbers of passed and failed tests from a line like `test result: ok. 5 passed; 0 failed; …`.
fn test_result(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut numbers = counts.split("; ").map(|part| part.split(' ').next()?.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_as_the_test_runner_prints_them() {
        let line = "test result: FAILED. 5 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s";
        assert_eq!(test_result(line), Some((5, 2)));
        assert_eq!(test_result("test agent::tests::works ... ok"), None);
    }

    #[test]
    fn a_step_knows_whether_the_host_is_at_fault() {
        use std::os::unix::process::ExitStatusExt as _;
        let kind = |code: i32| Kind::Host.is(&check_status(ExitStatus::from_raw(code << 8)).unwrap_err());
        assert!(kind(69) && !kind(1) && !kind(101));
        assert!(check_status(ExitStatus::from_raw(0)).is_ok());
    }

    #[test]
    fn the_guard_can_fail() {
        assert_eq!(check_tree("xtask v0.1.0\nanyhow v1.0\nanyhow v1.0 (*)\n").unwrap(), 2);
        assert!(check_tree("xtask v0.1.0\nvirt-sys v0.3.2\n").unwrap_err().to_string().contains("virt-sys"));
        let many: String = (0..=MAX_CRATES).map(|i| format!("crate{i} v1.0\n")).collect();
        assert!(check_tree(&many).unwrap_err().to_string().contains("67 crates"));
        assert!(check_tree("").is_err());
    }

    #[test]
    fn a_step_in_which_no_test_was_run_fails() {
        let none = Count::default();
        assert!(check_ran("test --workspace", &none).unwrap_err().to_string().contains("no test was run"));
        assert!(check_ran("test --workspace", &Count { passed: 1, ..Count::default() }).is_ok());
        assert!(check_ran("fmt --all --check", &none).is_ok());
    }
}
