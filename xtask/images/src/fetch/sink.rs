//! Hashing and writing, on a thread of their own: they take the time in which the network brings more.

use std::io;
use std::sync::mpsc::SyncSender;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use bytes::Bytes;
use fs_err::File;
use tokio::sync::mpsc;

use super::partial::Begun;

/// Pieces in hand between network and disk; each is what one read brought, at most 400 KiB.
const PIECES: usize = 32;
/// After so many bytes the disk is told to begin: flushing all of them at the end would take its time twice.
const FLUSH_EVERY: u64 = 64 << 20;

/// Takes pieces until it is told that they end.
#[derive(Debug)]
pub(super) struct Sink {
    pub(super) pieces: mpsc::Sender<Bytes>,
    thread: JoinHandle<(Begun, io::Result<()>)>,
}

impl Sink {
    pub(super) fn start(mut begun: Begun) -> Result<Self> {
        let flusher = Flusher::start(begun.handle().context("duplicate the handle of the partial file")?);
        let (pieces, mut queue) = mpsc::channel::<Bytes>(PIECES);
        let thread = std::thread::spawn(move || {
            let mut announced = begun.length;
            let written = loop {
                let Some(piece) = queue.blocking_recv() else { break Ok(()) };
                if let Err(error) = begun.write(&piece) {
                    break Err(error);
                }
                if begun.length - announced >= FLUSH_EVERY {
                    announced = begun.length;
                    flusher.flush();
                }
            };
            let flushed = flusher.stop();
            (begun, written.and(flushed))
        });
        Ok(Self { pieces, thread })
    }

    /// Everything that was handed over is written; or why it is not.
    pub(super) fn finish(self) -> (Begun, io::Result<()>) {
        drop(self.pieces);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Has the disk write while the network still brings.
#[derive(Debug)]
struct Flusher {
    due: SyncSender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Flusher {
    fn start(file: File) -> Self {
        let (due, when) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::spawn(move || {
            // The kernel tells a failure to write once (fsync(2)): it must not be lost here.
            when.into_iter().try_for_each(|()| file.sync_data())
        });
        Self { due, thread }
    }

    /// One that is under way is enough.
    fn flush(&self) {
        let _under_way = self.due.try_send(());
    }

    fn stop(self) -> io::Result<()> {
        drop(self.due);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
