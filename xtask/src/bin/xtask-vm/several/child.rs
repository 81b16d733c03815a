//! One smoke of several. It is a process of its own, because libvirt's embedded driver has one root per process.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use xtask_core::error::{EXIT_USAGE, Verdict};
use xtask_core::output::write_message;
use xtask_core::report::{HTML, REPORT, Report};
use xtask_core::spread::table::Row;
use xtask_core::{job, limits, message};
use xtask_jobs::Ui;
use xtask_jobs::child::end_with_parent;

/// A smoke that runs. Dropping this value asks the smoke to end, and waits until it has tidied up.
pub(super) struct Running {
    child: Child,
    /// The thread that shows the smoke's messages. Its result is the last error among them.
    messages: Option<JoinHandle<Option<String>>>,
    /// The thread that reads the smoke's stdout: the directory with its report.
    announced: Option<JoinHandle<String>>,
    begun: Instant,
}

impl Running {
    /// Starts a smoke. Its messages appear on the screen with `name` before each line. The calling thread must live as
    /// long as the smoke; see [`end_with_parent`].
    pub(super) fn start(mut command: Command, name: &str, ui: &Ui) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        end_with_parent(&mut command);
        let mut child = command.spawn().with_context(|| format!("start the smoke {name}"))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (name, ui) = (name.to_owned(), ui.clone());
        Ok(Self {
            child,
            messages: Some(thread::spawn(move || stderr.and_then(|stderr| show(stderr, &name, &ui)))),
            announced: Some(thread::spawn(move || stdout.map(read).unwrap_or_default())),
            begun: Instant::now(),
        })
    }

    /// Returns the exit status, or `None` while the smoke runs.
    pub(super) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().context("check whether a smoke has ended")
    }

    /// Asks the smoke to end in order, as Ctrl-C does. The signal is SIGTERM, because a process that a script has
    /// started in the background ignores SIGINT, and so do its children.
    pub(super) fn interrupt(&self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM).context("interrupt a smoke")
    }

    /// Adds the result of a smoke that has ended to its row of the table. `given` is the smoke's directory of
    /// `--report`.
    pub(super) fn conclude(mut self, status: ExitStatus, given: Option<&Path>, row: &mut Row) {
        row.seconds = self.begun.elapsed().as_secs_f64();
        let last_error = self.messages.take().and_then(finished).flatten();
        let announced = self.announced.take().and_then(finished).unwrap_or_default();
        let announced = Some(Path::new(announced.trim_end())).filter(|path| path.is_absolute());
        let read = given.or(announced).map(|directory| (directory, Report::read(directory)));
        if let Some((directory, Ok(report))) = read {
            row.fill(&report);
            row.report = Some(page(directory));
        } else if !status.success() {
            row.reason = Some(last_error.unwrap_or_else(|| format!("the smoke ended with {status}")));
        }
        row.exit_code = Some(code(status));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let stopped = self.ended().and_then(|ended| match ended {
            Some(_) => Ok(()),
            None => self.interrupt().and_then(|()| self.child.wait().map(drop).context("wait for a smoke")),
        });
        if let Err(error) = stopped {
            message!("warning: {error:#}");
        }
    }
}

/// Shows the messages of a smoke with its name. Returns the last error among them. A line for the page of a CI job must
/// stay at the start of its line.
fn show(stderr: ChildStderr, name: &str, ui: &Ui) -> Option<String> {
    let mut last_error = None;
    for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        if job::is_in_job() && line.starts_with("::") {
            write_message(&format!("{line}\n"));
            continue;
        }
        ui.line(&format!("{name}: {line}"));
        last_error = line.strip_prefix("error: ").map(str::to_owned).or(last_error);
    }
    last_error
}

fn read(mut stdout: ChildStdout) -> String {
    let mut bytes = Vec::new();
    match stdout.read_to_end(&mut bytes) {
        Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_unreadable) => String::new(),
    }
}

/// Returns the result of a thread that reads from a smoke that has ended. If another process still has the pipe open,
/// the thread is abandoned.
fn finished<T>(reader: JoinHandle<T>) -> Option<T> {
    let ended = Instant::now();
    while !reader.is_finished() && ended.elapsed() < limits::CHILD_STOP {
        thread::sleep(limits::CHILD_POLL);
    }
    if reader.is_finished() { reader.join().ok() } else { None }
}

/// Returns the page with the report, or the report if the page could not be written.
fn page(directory: &Path) -> PathBuf {
    let page = directory.join(HTML);
    if page.exists() { page } else { directory.join(REPORT) }
}

/// Returns the exit code of a smoke. A smoke that was killed or ended by a bug says nothing about the agent.
fn code(status: ExitStatus) -> u8 {
    let verdicts = [Verdict::Verified, Verdict::Failed, Verdict::Unavailable, Verdict::Interrupted];
    let known = verdicts.into_iter().map(Verdict::exit_code).chain([EXIT_USAGE]);
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    let mut known = known.filter(|known| Some(*known) == code);
    known.next().unwrap_or(Verdict::Unavailable.exit_code())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn a_smoke_that_was_killed_or_broke_is_a_failure_of_the_host() {
        let ended = |raw| code(ExitStatus::from_raw(raw));
        for (code, expected) in [(0, 0), (1, 1), (2, 2), (69, 69), (130, 130), (101, 69)] {
            assert_eq!(ended(code << 8), expected);
        }
        assert_eq!(ended(9), 69, "SIGKILL");
    }
}
