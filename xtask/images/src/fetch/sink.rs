//! Hashing and writing, on a thread of their own: they take the time in which the network brings more.

use std::io;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use bytes::Bytes;
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
        let file = begun.handle().context("duplicate the handle of the partial file")?;
        let (due, flushes) = sync_channel(1);
        // Has the disk write while the network still brings. The kernel tells a failure to write once (fsync(2)): it must
        // not be lost here.
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
                    // One that is under way is enough.
                    let _under_way = due.try_send(());
                }
            };
            drop(due);
            (begun, written.and(ended(flusher)))
        });
        Ok(Self { pieces, thread })
    }

    /// Everything that was handed over is written; or why it is not.
    pub(super) fn finish(self) -> (Begun, io::Result<()>) {
        drop(self.pieces);
        ended(self.thread)
    }
}

fn ended<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
