//! The child processes of a run. Each child has its own process group, so that Ctrl-C in a terminal reaches only this
//! process, which then ends its children in order. The kernel signals each child when this process dies.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use duct::{Expression, Handle};
use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};
use xtask_core::limits;
use xtask_core::message;
use xtask_core::processes::record_child;

use crate::Ui;

/// A child process, which ends when this value is dropped. duct's own handle does not end a process when it is
/// dropped.
pub struct Child {
    handle: Handle,
    line: String,
}

/// A command to run, with its owner and its log.
pub struct Job<'a> {
    pub program: &'a Path,
    pub arguments: Vec<OsString>,
    /// The directory that owns the process. If the run dies, a later run ends the processes of this directory.
    pub owner: &'a Path,
    /// The file for stdout and stderr.
    pub log: PathBuf,
    /// The variables to add to the environment.
    pub environment: Vec<(&'static str, OsString)>,
}

impl Child {
    pub fn start(job: &Job<'_>) -> Result<Self> {
        let line = format!("{} …", job.program.display());
        // A program that is started again appends to its earlier log.
        let log = File::options().create(true).append(true).open(&job.log);
        let log = log.with_context(|| format!("open {}", job.log.display()))?;
        let mut expression = duct::cmd(job.program, &job.arguments)
            .stdin_null()
            // duct applies the outer redirection first, so stderr goes to the log too.
            .stderr_to_stdout()
            .stdout_file(log)
            .env("LC_ALL", "C.UTF-8");
        for (name, value) in &job.environment {
            expression = expression.env(name, value);
        }
        let owner = job.owner.to_owned();
        let recorded = own(&expression.unchecked())
            .before_spawn(move |command| record_child(command, &owner).map_err(std::io::Error::other));
        let handle = recorded.start().with_context(|| format!("run {line}"))?;
        Ok(Self { handle, line })
    }

    /// Returns the exit status, or `None` while the child runs.
    pub fn ended(&self) -> Result<Option<std::process::ExitStatus>> {
        let output =
            self.handle.try_wait().with_context(|| format!("check whether {} has ended", self.line))?;
        Ok(output.map(|output| output.status))
    }

    /// Returns the child's process group. Its number is the pid of the child.
    fn group(&self) -> Option<Pid> {
        self.handle.pids().first().and_then(|pid| Pid::from_raw(i32::try_from(*pid).ok()?))
    }

    /// Sends a signal to the child's group. It is no error if the child has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        match self.group() {
            Some(group) if self.ended()?.is_none() => {
                signal_group(group, signal).with_context(|| format!("send {signal:?} to {}", self.line))
            }
            _ => Ok(()),
        }
    }

    /// Sends SIGTERM to the child's group and, after a limit, SIGKILL to the rest of the group.
    pub fn stop(&self) -> Result<()> {
        let Some(group) = self.group() else { return Ok(()) };
        if self.ended()?.is_none() {
            // A child that SIGSTOP has stopped handles SIGTERM only after SIGCONT.
            for signal in [Signal::TERM, Signal::CONT] {
                signal_group(group, signal).with_context(|| format!("stop {}", self.line))?;
            }
            let deadline = Instant::now() + limits::CHILD_STOP;
            while Instant::now() < deadline && self.ended()?.is_none() {
                std::thread::sleep(limits::CHILD_POLL);
            }
        }
        signal_group(group, Signal::KILL).with_context(|| format!("stop {}", self.line))?;
        let deadline = Instant::now() + limits::CHILD_STOP;
        while self.ended()?.is_none() {
            ensure!(Instant::now() < deadline, "stop {}: it is still alive after SIGKILL", self.line);
            std::thread::sleep(limits::CHILD_POLL);
        }
        Ok(())
    }
}

/// Sends a signal to a group. It is no error if the group does not exist any more.
fn signal_group(group: Pid, signal: Signal) -> Result<()> {
    match kill_process_group(group, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            message!("warning: {error:#}");
        }
    }
}

fn own(expression: &Expression) -> Expression {
    expression.before_spawn(|command| {
        end_with_parent(command);
        Ok(())
    })
}

/// Puts the command into its own process group. The kernel sends SIGTERM to the command when this process dies
/// (prctl(2), PR_SET_PDEATHSIG). It also does so when the thread that started the command ends. That thread must
/// therefore wait for the end of the command.
pub fn end_with_parent(command: &mut Command) {
    command.process_group(0);
    // SAFETY: the closure runs between fork and exec and makes one system call, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::TERM))?));
    }
}

/// Runs a job to its end. `sign` is called repeatedly and returns a text about the job's progress.
pub fn run(job: &Job<'_>, ui: &Ui, mut sign: impl FnMut() -> String) -> Result<()> {
    let child = Child::start(job)?;
    let status = loop {
        if let Some(status) = child.ended()? {
            break status;
        }
        ui.tick(&sign())?;
        std::thread::sleep(limits::CHILD_POLL);
    };
    // If Ctrl-C ended the child, report the interrupt and not a failure of the child.
    ui.check()?;
    if !status.success() {
        let message = last_lines(&job.log, 8).join("\n    ");
        // The message omits the arguments, because they may be long, and a mirror's address may contain a password.
        bail!("{}: {status}; its last output:\n    {message}", job.program.display());
    }
    Ok(())
}

/// Returns the output of a short command, or an error that contains the command's error output. The command is killed
/// at the limit, which scales with `--timeout-scale`, and after Ctrl-C.
pub fn read(program: &Path, arguments: &[OsString], limit: Duration, ui: &Ui) -> Result<String> {
    let output = output(program, arguments, limit, ui)?;
    let message = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let status = output.status;
    ensure!(
        status.success(),
        "{} {}: {status}: {}",
        program.display(),
        words(arguments),
        message(&output.stderr)
    );
    Ok(message(&output.stdout))
}

/// Returns the output and the exit status of a short command like [`read`], but accepts any exit status.
pub fn output(program: &Path, arguments: &[OsString], limit: Duration, ui: &Ui) -> Result<Output> {
    let line = format!("{} {}", program.display(), words(arguments));
    let expression = duct::cmd(program, arguments).stdin_null().stdout_capture().stderr_capture().unchecked();
    let handle = own(&expression).start().with_context(|| format!("run {line}"))?;
    let limit = ui.scaled(limit);
    let deadline = Instant::now() + limit;
    loop {
        if let Some(output) = handle.try_wait().with_context(|| format!("wait for {line}"))? {
            return Ok(output.clone());
        }
        let stop = ui.check().err().or_else(|| {
            (Instant::now() > deadline).then(|| anyhow!("{line}: did not end within {} s", limit.as_secs()))
        });
        if let Some(error) = stop {
            handle.kill().with_context(|| format!("stop {line}"))?;
            return Err(error);
        }
        std::thread::sleep(limits::CHILD_POLL);
    }
}

fn words(arguments: &[OsString]) -> String {
    arguments.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Returns the last lines of a text file that may still grow. The result is empty if the file does not exist yet.
pub fn last_lines(path: &Path, count: usize) -> Vec<String> {
    const ENOUGH: u64 = 1 << 14;
    let tail = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(ENOUGH)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = tail().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].iter().map(|line| (*line).to_owned()).collect()
}
