//! `cargo xtask bench fetch`: compares a download that checks the digest with `curl | tee | sha256sum`, from one
//! server on loopback.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use fs_err::File;
use xtask_core::digest::{Algorithm, Digest};
use xtask_core::host::tools;

use super::{Bench, timed};

const BLOCK: usize = 1 << 20;
const BLOCKS: usize = 1024;

pub(super) fn run(bench: &Bench<'_>) -> Result<()> {
    let (file, digest) = subject(&bench.scratch)?;
    let url = format!("http://{}/file", serve(file)?);
    let target = bench.scratch.join("target");
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    for round in 1..=bench.args.rounds {
        for (all, what, title, described, fetch) in [
            (&mut theirs, "curl", "curl", "curl | tee | sha256sum", by_curl as Fetch),
            (&mut ours, "ours", "fetch", "cargo xtask image fetch", by_ourselves),
        ] {
            bench.ui.check()?;
            all.push(bench.step(what, title, || {
                let seconds = fetch(&url, &target, &digest)?;
                fs_err::remove_file(&target)?;
                Ok((seconds, format!("round {round}: {described}, 1 GiB")))
            })?);
        }
    }
    bench.compare("curl | tee | sha256sum", &theirs, &ours)
}

/// A function that fetches the URL to this path and returns the seconds that the download took. A wrong digest is an
/// error.
type Fetch = fn(&str, &Path, &Digest) -> Result<f64>;

/// Makes a file of 1 GiB that repeats one random block, so that neither a file system nor a protocol can compress it.
fn subject(directory: &Path) -> Result<(PathBuf, Digest)> {
    let path = directory.join("subject");
    let mut block = vec![0; BLOCK];
    rustix::rand::getrandom(&mut block, rustix::rand::GetRandomFlags::empty())
        .context("ask for random bytes")?;
    let mut file = File::create(&path)?;
    let mut hash = Algorithm::Sha256.hasher();
    for _ in 0..BLOCKS {
        hash.update(&block);
        file.write_all(&block)?;
    }
    Ok((path, hash.finish()))
}

/// Serves one file on a port of loopback until this process ends.
fn serve(file: PathBuf) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listen on loopback")?;
    let address = listener.local_addr().context("read the port of the listener")?;
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            // A client that closes the connection early is no error.
            drop(answer(connection, &file));
        }
    });
    Ok(address)
}

fn answer(mut connection: TcpStream, path: &Path) -> std::io::Result<()> {
    let mut request = BufReader::new(connection.try_clone()?);
    let mut line = String::new();
    while request.read_line(&mut line)? > 2 {
        line.clear();
    }
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    write!(connection, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")?;
    std::io::copy(&mut file, &mut connection)?;
    Ok(())
}

fn by_curl(url: &str, target: &Path, digest: &Digest) -> Result<f64> {
    let [curl, tee, sha256sum] = ["curl", "tee", "sha256sum"].map(tools::require);
    let pipe = duct::cmd!(curl?, "--silent", "--fail", "--noproxy", "*", url)
        .pipe(duct::cmd!(tee?, target))
        .pipe(duct::cmd!(sha256sum?));
    let (output, seconds) = timed(|| pipe.read().context("run curl | tee | sha256sum"))?;
    ensure!(output.starts_with(digest.hex()), "curl | tee | sha256sum printed {output}, expected {digest}");
    Ok(seconds)
}

fn by_ourselves(url: &str, target: &Path, digest: &Digest) -> Result<f64> {
    let own = std::env::current_exe().context("find the path of this program")?;
    let digest = digest.to_string();
    let fetch = duct::cmd!(own, "image", "fetch", url, "--image-digest", digest, "--to", target, "--quiet");
    let fetch = fetch.env("NO_PROXY", "127.0.0.1").stdout_null();
    Ok(timed(|| fetch.run().context("run cargo xtask image fetch"))?.1)
}
