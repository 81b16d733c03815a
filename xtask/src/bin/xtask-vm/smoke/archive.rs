//! `failure.tar.zst`: all evidence of a failed run in one file, which a colleague can open.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use fs_err::File;
use xtask_core::fs::write_atomically;
use xtask_core::report::{ARCHIVE, FILES};

use super::secrets::Secrets;

/// The maximum size in bytes of a file in the archive. The end of a larger file is archived. Files of this size fit into
/// 60 MB together, even if nothing can be compressed.
const LARGEST: u64 = 4 << 20;

/// zstd's default level.
const LEVEL: i32 = 3;

/// Archives the reports and logs in the directory of a run or of `--report`, without the secrets. Returns the path of
/// the archive.
///
/// # Errors
/// Returns an error that names the file that cannot be read or written.
pub(super) fn write(directory: &Path, secrets: &Secrets) -> Result<PathBuf> {
    let path = directory.join(ARCHIVE);
    let mut archive = tar::Builder::new(zstd::Encoder::new(Vec::new(), LEVEL)?);
    for name in FILES.into_iter().filter(|name| *name != ARCHIVE) {
        let file = directory.join(name);
        if file.is_file() {
            let content = secrets.hide(end_of(&file)?);
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o600);
            archive
                .append_data(&mut header, Path::new("failure").join(name), content.as_slice())
                .with_context(|| format!("archive {}", file.display()))?;
        }
    }
    write_atomically(&path, archive.into_inner()?.finish()?)?;
    Ok(path)
}

/// Returns the last lines of a file, at most [`LARGEST`] bytes.
fn end_of(path: &Path) -> Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let surplus = file.metadata()?.len().saturating_sub(LARGEST);
    file.seek(SeekFrom::Start(surplus))?;
    let mut content = Vec::new();
    file.take(LARGEST).read_to_end(&mut content)?;
    if surplus > 0 {
        // A part of a line could be a part of a secret.
        let line = content.iter().position(|byte| *byte == b'\n').map_or(content.len(), |end| end + 1);
        content.drain(..line);
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_end_of_each_file() {
        let directory = tempfile::tempdir().unwrap();
        let large = "x".repeat(LARGEST as usize) + "\n" + &"a line\n".repeat(9) + "the end";
        std::fs::write(directory.path().join("console.log"), &large).unwrap();
        std::fs::write(directory.path().join("report.json"), "{}").unwrap();
        std::fs::write(directory.path().join("notes.txt"), "not ours").unwrap();
        let path = write(directory.path(), &Secrets::default()).unwrap();
        let mut archive = tar::Archive::new(zstd::Decoder::new(File::open(path).unwrap()).unwrap());
        let mut found = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            found.push((entry.path().unwrap().display().to_string(), text.len(), text.ends_with("the end")));
        }
        let [report, console] = &found[..] else { panic!("{found:?}") };
        assert_eq!((report.0.as_str(), console.0.as_str()), ("failure/report.json", "failure/console.log"));
        assert_eq!((console.1, console.2), (9 * 7 + 7, true), "the part of a line is left out");
        assert!(FILES.len() as u64 * LARGEST < 60_000_000);
    }
}
