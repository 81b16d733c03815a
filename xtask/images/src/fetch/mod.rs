//! Downloads files. A download is resumed if the server supports that, retried if that may help, and hashed while it
//! arrives. A file gets its final name only when it is complete and verified.
//!
//! Modules in reading order: [`download`] (all attempts), [`transfer`] (one attempt), [`answer`] (the head of an
//! answer), [`client`] (the causes of failures), [`partial`] (the files on disk), [`sink`], [`retry`], [`lock`],
//! [`address`], [`progress`].

mod address;
mod answer;
pub mod client;
mod download;
pub mod limits;
mod lock;
mod partial;
mod progress;
mod retry;
mod sink;
mod transfer;

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use xtask_core::bail_host;
use xtask_core::digest::Digest;
use xtask_core::error::{Kind, host_fault};
use xtask_core::image::DownloadSource;

use self::address::Address;
use self::download::Download;
use self::limits::FetchLimits;
use self::lock::Lock;
use self::partial::DownloadPaths;
use self::progress::size;
use xtask_jobs::Ui;

/// A request for a download.
#[derive(Debug, Clone, Copy)]
pub struct FetchRequest<'a> {
    /// The source: https, or http if there is a digest. Without a digest, any content is accepted, because the user has
    /// passed `--unverified`.
    pub source: &'a DownloadSource,
    /// The final path. During the download, `.partial`, `.partial.json` and `.lock` files are beside it.
    pub target: &'a Path,
    /// The policy for repeated attempts.
    pub retry_policy: RetryPolicy,
}

/// The policy for repeating the attempts of a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryPolicy {
    /// Several attempts are made, because the user asked for this very file.
    Full,
    /// There is a fallback image. The result is [`Kind::Unreachable`] if the host has not answered within
    /// `limits::PROBE`. Once it has answered, the policy is that of [`RetryPolicy::Full`].
    ProbeFirst,
    /// Like [`RetryPolicy::ProbeFirst`], but a connection that fails at once is not tried again, because the same host
    /// could not be reached a short while ago.
    Once,
}

/// The result of a download.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// The digest of the whole file.
    pub sha256: Digest,
    pub bytes: u64,
    /// The number of bytes that were taken from an earlier run.
    pub resumed_from: u64,
    pub attempts: u32,
    /// True if nothing was requested, because the file was already there or another process downloaded it.
    pub already: bool,
}

/// Downloads the file to its final path and verifies it.
///
/// # Errors
/// Returns an error of [`Kind::Usage`] if the URL is not allowed, of [`Kind::Unreachable`] if the host cannot be
/// reached, of [`Kind::Interrupted`] after Ctrl-C, and of [`Kind::Host`] for everything else.
pub fn fetch(wanted: &FetchRequest<'_>, ui: &Ui) -> Result<Fetched> {
    fetch_within(FetchLimits::from_env()?, wanted, ui)
}

fn fetch_within(limits: FetchLimits, wanted: &FetchRequest<'_>, ui: &Ui) -> Result<Fetched> {
    let address = Address::parse(&wanted.source.url, wanted.source.digest.is_some())?;
    let place = DownloadPaths::new(wanted.target);
    let fetched = Lock::wait(wanted.target, ui).and_then(|_lock| {
        if let Some(fetched) = already(wanted, &place, ui)? {
            return Ok(fetched);
        }
        let (address, place, started) = (&address, &place, Instant::now());
        let download =
            Download { limits, wanted, address, place, ui, started, answered: false, resumed_from: 0 };
        let fetched = download.run();
        let tidied = place.discard_empty();
        fetched.and_then(|fetched| tidied.map(|()| fetched))
    });
    fetched.map_err(|error| {
        if Kind::Unreachable.is(&error) {
            return error;
        }
        let hint =
            format!("check that {} is a directory that this user may write to", place.directory().display());
        host_fault(error, format!("download {address} to {}", wanted.target.display()), hint)
    })
}

/// Verifies the file that already has the final name, if there is one.
fn already(wanted: &FetchRequest<'_>, place: &DownloadPaths, ui: &Ui) -> Result<Option<Fetched>> {
    let Some((bytes, sums)) = place.finished(wanted.source.digest.as_ref(), seen("verifying", ui))? else {
        return Ok(None);
    };
    // These files are left if a run was killed after the file was renamed and before the clean-up.
    place.discard()?;
    let (sha256, found) = sums.finish();
    match wanted.source.digest.as_ref().filter(|digest| **digest != found) {
        None => Ok(Some(Fetched { sha256, bytes, resumed_from: 0, attempts: 0, already: true })),
        Some(digest) => bail_host!(
            "{} exists and has {found}, expected {digest}", wanted.target.display();
            "delete it, or choose another name"
        ),
    }
}

/// Returns a function that shows how far a file on disk has been read. The function returns an error after Ctrl-C.
fn seen<'a>(doing: &'a str, ui: &'a Ui) -> impl FnMut(u64) -> Result<()> + 'a {
    move |length| ui.tick(&format!("{doing} the file on disk: {}", size(length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::time::Duration;
    use xtask_core::error::Kind;

    /// Fetches at a tenth of the real pace: the probe's 8 s become 0.8 s.
    fn try_fetch(url: &str, retry_policy: RetryPolicy, bytes: Option<u64>) -> (anyhow::Error, Duration) {
        try_fetch_leaving(url, retry_policy, bytes, 0)
    }

    /// Fetches like [`try_fetch`]. Checks that the attempt leaves `files` files for the next one.
    fn try_fetch_leaving(
        url: &str,
        retry_policy: RetryPolicy,
        bytes: Option<u64>,
        files: usize,
    ) -> (anyhow::Error, Duration) {
        let directory = tempfile::tempdir().unwrap();
        let digest = Some(xtask_core::digest::Algorithm::Sha256.of(b""));
        let target = directory.path().join("file");
        let source = DownloadSource { url: url.to_owned(), digest, bytes };
        let wanted = FetchRequest { source: &source, target: &target, retry_policy };
        let started = Instant::now();
        let limits = FetchLimits { pace: 0.1 };
        let error = fetch_within(limits, &wanted, &Ui::quiet()).unwrap_err();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), files, "{error:#}");
        (error, started.elapsed())
    }

    #[test]
    fn a_probe_knows_soon_whether_the_host_can_be_reached() {
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = silent.local_addr().map(|address| (silent, address)).unwrap();
        for address in [nobody, silent.1] {
            let (error, took) = try_fetch(&format!("http://{address}/file"), RetryPolicy::ProbeFirst, None);
            assert!(Kind::Unreachable.is(&error), "{error:#}");
            // Without the probe, an attempt would wait 3 s for a silent host.
            assert!(took < Duration::from_millis(2500), "{took:?}: {error:#}");
        }
        let (error, took) = try_fetch(&format!("http://{nobody}/file"), RetryPolicy::Full, None);
        assert!(Kind::Unreachable.is(&error), "{error:#}");
        assert!(took > Duration::from_secs(1), "several attempts: {took:?}");
    }

    #[test]
    fn a_host_that_answered_and_went_away_is_no_host_out_of_reach() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/file", server.local_addr().unwrap());
        let answering = std::thread::spawn(move || {
            let mut stream = server.accept().unwrap().0;
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            write!(stream, "HTTP/1.1 200 OK\r\netag: \"a\"\r\ncontent-length: 5\r\n\r\nim").unwrap();
        });
        let (error, _) = try_fetch_leaving(&url, RetryPolicy::ProbeFirst, Some(5), 2);
        answering.join().unwrap();
        assert!(!Kind::Unreachable.is(&error) && Kind::Host.is(&error), "{error:#}");
    }

    #[test]
    fn a_name_that_nobody_has_is_unreachable_and_a_scheme_is_usage() {
        let (error, _) = try_fetch("http://no-such-host.invalid/file", RetryPolicy::ProbeFirst, None);
        assert!(Kind::Unreachable.is(&error), "{error:#}");
        let (error, _) = try_fetch("file:///etc/hostname", RetryPolicy::Full, None);
        assert!(Kind::Usage.is(&error), "{error:#}");
    }

    #[test]
    fn what_has_another_size_than_is_known_is_not_taken() {
        let table = [
            ("content-length: 5\r\n\r\nimage", "the file has 5 bytes, expected 4"),
            ("content-length: 4000000000\r\n\r\n", "the file has 4000000000 bytes, expected 4"),
            ("transfer-encoding: chunked\r\n\r\n5\r\nimage\r\n", "the file has more than 4 bytes"),
        ];
        for (answer, words) in table {
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let url = format!("http://{}/file", server.local_addr().unwrap());
            let answering = std::thread::spawn(move || {
                let mut stream = server.accept().unwrap().0;
                assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
                write!(stream, "HTTP/1.1 200 OK\r\n{answer}").unwrap();
                // The server sends nothing more. A client that waits for more reaches its time limit.
                stream.read(&mut [0]).map(drop)
            });
            let (error, took) = try_fetch(&url, RetryPolicy::ProbeFirst, Some(4));
            assert!(Kind::Host.is(&error) && error.to_string().contains(words), "{error:#}");
            assert!(took < Duration::from_millis(2500), "{took:?}");
            drop(answering.join().unwrap());
        }
    }
}
