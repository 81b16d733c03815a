//! `cargo xtask bench fetch`: a download with its digest, against `curl | tee | sha256sum`, from one server on loopback.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use xtask_core::cache::Cache;
use xtask_core::cli::BenchArgs;
use xtask_core::digest::{Algorithm, Digest};
use xtask_core::host::tools;

use super::{Comparison, Scratch};
use xtask_jobs::{Step, Ui};

const BLOCK: usize = 1 << 20;
const BLOCKS: usize = 1024;

pub(super) fn run(args: &BenchArgs, ui: &Ui) -> Result<()> {
    let cache = Cache::from_env()?;
    let scratch = Scratch::new(&cache, ui)?;
    let directory = scratch.path.as_path();
    let (file, digest) = subject(directory)?;
    let url = format!("http://{}/file", serve(file)?);
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        ui.check()?;
        theirs.push(ui.step(&cache, Step { kind: "bench-fetch", what: "curl", title: "curl" }, || {
            let seconds = by_curl(&url, directory, &digest)?;
            Ok((seconds, format!("round {round}: curl | tee | sha256sum, 1 GiB")))
        })?);
        ui.check()?;
        ours.push(ui.step(&cache, Step { kind: "bench-fetch", what: "ours", title: "fetch" }, || {
            let seconds = by_ourselves(&url, directory, &digest)?;
            Ok((seconds, format!("round {round}: cargo xtask image fetch, 1 GiB")))
        })?);
    }
    Comparison::new("fetch", "curl | tee | sha256sum", &theirs, &ours).print(args.json)
}

/// 1 GiB that no file system and no protocol makes smaller: the same random block again and again.
fn subject(directory: &Path) -> Result<(PathBuf, Digest)> {
    let path = directory.join("subject");
    let mut block = vec![0; BLOCK];
    rustix::rand::getrandom(&mut block, rustix::rand::GetRandomFlags::empty())
        .context("ask for random bytes")?;
    let mut file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
    let mut hash = Algorithm::Sha256.hasher();
    for _ in 0..BLOCKS {
        hash.update(&block);
        file.write_all(&block).with_context(|| format!("write {}", path.display()))?;
    }
    Ok((path, hash.finish()))
}

/// Serves one file to whoever asks, until this process ends.
fn serve(file: PathBuf) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listen on loopback")?;
    let address = listener.local_addr().context("learn the port")?;
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            // Whoever hangs up has what it wanted.
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

/// Seconds, and the digest is the right one.
fn by_curl(url: &str, directory: &Path, digest: &Digest) -> Result<f64> {
    let target = directory.join("theirs");
    let (curl, tee, sha256sum) =
        (tools::require("curl")?, tools::require("tee")?, tools::require("sha256sum")?);
    let started = Instant::now();
    let pipe = duct::cmd!(curl, "--silent", "--fail", "--noproxy", "*", url)
        .pipe(duct::cmd!(tee, &target))
        .pipe(duct::cmd!(sha256sum));
    let output = pipe.read().context("run curl | tee | sha256sum")?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(output.starts_with(digest.hex()), "curl | tee | sha256sum printed {output}, expected {digest}");
    std::fs::remove_file(&target).with_context(|| format!("delete {}", target.display()))?;
    Ok(seconds)
}

fn by_ourselves(url: &str, directory: &Path, digest: &Digest) -> Result<f64> {
    let target = directory.join("ours");
    let own = std::env::current_exe().context("find this very program")?;
    let started = Instant::now();
    duct::cmd!(own, "image", "fetch", url, "--image-digest", digest.to_string(), "--to", &target, "--quiet")
        .env("NO_PROXY", "127.0.0.1")
        .stdout_null()
        .run()
        .context("run cargo xtask image fetch")?;
    let seconds = started.elapsed().as_secs_f64();
    std::fs::remove_file(&target).with_context(|| format!("delete {}", target.display()))?;
    Ok(seconds)
}
