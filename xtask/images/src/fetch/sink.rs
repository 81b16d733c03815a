//! Hashes and writes the bytes in a separate thread, while more bytes arrive from the network.

use std::io;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use bytes::Bytes;
use tokio::sync::mpsc;

use super::partial::Begun;

/// Upper bound for the pieces between network and disk. Each is the result of one read, at most 400 KiB.
const PIECES: usize = 32;
/// Bytes after which the file is flushed to disk, while more bytes arrive. If all bytes were flushed at the end, the
/// download would take longer.
const FLUSH_EVERY: u64 = 64 << 20;

/// Takes pieces until [`Sink::finish`] is called.
#[derive(Debug)]
pub(super) struct Sink {
    pub(super) pieces: mpsc::Sender<Bytes>,
    thread: JoinHandle<(Begun, io::Result<()>)>,
}

impl Sink {
    pub(super) fn start(mut begun: Begun) -> Result<Self> {
        let file = begun.handle().context("duplicate the handle of the partial file")?;
        let (due, flushes) = sync_channel(1);
        // This makes the disk write while bytes still arrive. The kernel reports a failed write only once (fsync(2)),
        // so the error must not be lost here.
        let flusher = std::thread::spawn(move || flushes.into_iter().try_for_each(|()| file.sync_data()));
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
                    // If a flush is already under way, do not wait for it.
                    let _under_way = due.try_send(());
                }
            };
            drop(due);
            (begun, written.and(ended(flusher)))
        });
        Ok(Self { pieces, thread })
    }

    /// Waits until all pieces are written. Returns the download, and an error if they could not be written.
    pub(super) fn finish(self) -> (Begun, io::Result<()>) {
        drop(self.pieces);
        ended(self.thread)
    }
}

fn ended<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
