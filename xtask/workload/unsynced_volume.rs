//! The workload of the planted fault `unsynced-volume`: the same program, which gives its number of starts to clients
//! before the number is on disk. It writes the file in place.

#[path = "main.rs"]
#[expect(dead_code, reason = "this program has another main, and counts in another way")]
mod workload;

use std::path::Path;
use std::{fs, io};

fn main() -> io::Result<()> {
    workload::serve(count_start)
}

fn count_start(volume: &Path) -> io::Result<u64> {
    let path = volume.join("starts");
    let before = match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(io::Error::other)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let starts: u64 = before + 1;
    fs::write(&path, format!("{starts}\n"))?;
    Ok(starts)
}
