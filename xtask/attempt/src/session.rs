//! The conversation with the guest: sends the job and the standard input, and writes the program's output.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use xtask_core::{limits, output};
use xtask_jobs::Ui;

use crate::ending::Outcome;
use crate::machine::Machine;
use crate::report::Seen;
use crate::wire::{self, End, Job, Kind};

/// The bytes that a pipe takes at once if it is writable (pipe(7), poll(2)).
const PIPE_BUF: usize = 4096;

/// The number of frames that are read ahead of the program's output.
const AHEAD: usize = 16;

/// A conversation with a guest that has not said yet that the program runs.
pub(crate) struct Session {
    stream: UnixStream,
    frames: Receiver<std::io::Result<(Kind, Vec<u8>)>>,
}

impl Session {
    /// Sends the job.
    pub(crate) fn begin(stream: UnixStream, job: &Job) -> Result<Self> {
        let (mut to, mut from) = (&stream, stream.try_clone().context("use QEMU's port")?);
        wire::send(&mut to, Kind::Job, &job.encode()).context("send the job to the machine")?;
        let (sender, frames) = sync_channel(AHEAD);
        // The thread ends with QEMU, which closes the stream.
        thread::spawn(move || {
            loop {
                let frame = wire::receive(&mut from);
                let last = frame.is_err();
                if sender.send(frame).is_err() || last {
                    return;
                }
            }
        });
        Ok(Self { stream, frames })
    }

    /// Waits until the program starts. Returns the description of the kernel.
    pub(crate) fn wait_for_start(&self, machine: &Machine, ui: &Ui) -> Result<String> {
        let deadline = Instant::now() + limits::TRY_BOOT;
        loop {
            ui.tick("the kernel starts")?;
            match self.frames.recv_timeout(limits::POLL) {
                Ok(Ok((Kind::Started, kernel))) => return Ok(String::from_utf8_lossy(&kernel).into_owned()),
                Ok(frame) => return Err(unexpected(frame, machine)),
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(RecvTimeoutError::Timeout) => {
                    let limit = limits::TRY_BOOT.as_secs();
                    return Err(machine.fault(&format!("boot the machine: no answer within {limit} s")));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(machine.fault("boot the machine")),
            }
        }
    }

    /// Writes the program's output until its end, and keeps the end of its standard error in `seen`.
    pub(crate) fn follow(
        &self,
        machine: &Machine,
        limit: Duration,
        seen: &mut Seen,
        ui: &Ui,
    ) -> Result<Outcome> {
        seen.started = true;
        let to = Arc::new(Mutex::new(self.stream.try_clone().context("use QEMU's port")?));
        let of_input = Arc::clone(&to);
        // The thread may wait for a terminal. It ends with this process.
        thread::spawn(move || forward_input(&of_input));
        let mut has_reader = true;
        let mut deadline = Instant::now() + limit;
        loop {
            ui.check()?;
            let rest = deadline.saturating_duration_since(Instant::now());
            match self.frames.recv_timeout(rest.min(limits::POLL)) {
                // The program cannot go on while a reader such as a pager waits, so this time does not count.
                Ok(Ok((Kind::Output, bytes))) => {
                    if has_reader {
                        has_reader =
                            write_waiting(&bytes, std::io::stdout(), &mut deadline, ui, output::write)?;
                        if !has_reader {
                            let of_end = Arc::clone(&to);
                            // This waits while the program does not read its input.
                            thread::spawn(move || drop(send(&of_end, Kind::Closed, &[])));
                        }
                    }
                }
                Ok(Ok((Kind::Error, bytes))) => {
                    seen.add(&bytes);
                    // As with messages, a closed stderr is no error.
                    let write = |part: &[u8]| Ok(std::io::stderr().write_all(part).is_ok());
                    write_waiting(&bytes, std::io::stderr(), &mut deadline, ui, write)?;
                }
                Ok(Ok((Kind::End, end))) => {
                    let end = End::decode(&end).context("read the program's end")?;
                    return Ok(Outcome::Ended(end));
                }
                Ok(frame) => return Err(unexpected(frame, machine)),
                Err(RecvTimeoutError::Disconnected) => return Err(machine.fault("run the program")),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if Instant::now() >= deadline {
                return Ok(Outcome::TimedOut);
            }
        }
    }
}

/// Writes to a stream in parts that its reader takes at once: a write could wait for ever, and no signal would end it.
/// Moves the deadline by the time that this takes. Returns whether the stream still has a reader.
fn write_waiting(
    bytes: &[u8],
    stream: impl AsFd,
    deadline: &mut Instant,
    ui: &Ui,
    write: impl Fn(&[u8]) -> Result<bool>,
) -> Result<bool> {
    let started = Instant::now();
    for part in bytes.chunks(PIPE_BUF) {
        wait_for_reader(&stream, ui)?;
        if !write(part)? {
            return Ok(false);
        }
    }
    *deadline += started.elapsed();
    Ok(true)
}

fn wait_for_reader(stream: &impl AsFd, ui: &Ui) -> Result<()> {
    let pause = Timespec::try_from(limits::POLL).context("wait for the reader of the output")?;
    loop {
        ui.check()?;
        match poll(&mut [PollFd::new(stream, PollFlags::OUT)], Some(&pause)) {
            Ok(0) | Err(Errno::INTR) => {}
            // The write reports the error of a stream that cannot be written.
            _ => return Ok(()),
        }
    }
}

fn unexpected(frame: std::io::Result<(Kind, Vec<u8>)>, machine: &Machine) -> anyhow::Error {
    match frame {
        Ok((Kind::Failed, reason)) => {
            machine.fault(&format!("prepare the machine: {}", String::from_utf8_lossy(&reason)))
        }
        Ok((kind, _)) => {
            machine.fault(&format!("run the program: the guest sent {kind:?} at the wrong time"))
        }
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
            machine.fault("run the program: the machine has ended")
        }
        Err(error) => machine.fault(&format!("run the program: {error}")),
    }
}

/// Sends the standard input to the guest. An empty frame is its end. An error of the stream means that QEMU has ended,
/// which the reader of the stream reports.
fn forward_input(to: &Mutex<UnixStream>) {
    let mut buffer = vec![0; wire::MOST];
    loop {
        let length = match std::io::stdin().read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // A standard input that cannot be read, such as a directory, is empty for the program.
            read => read.unwrap_or_default(),
        };
        if send(to, Kind::Input, &buffer[..length]).is_err() || length == 0 {
            return;
        }
    }
}

fn send(to: &Mutex<UnixStream>, kind: Kind, content: &[u8]) -> std::io::Result<()> {
    wire::send(&mut *to.lock().unwrap_or_else(PoisonError::into_inner), kind, content)
}
