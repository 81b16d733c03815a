//! SHA-256 in lower-case hex.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use ring::digest::{Context, Digest, SHA256, digest};

pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    hex(&digest(&SHA256, bytes))
}

pub(crate) fn of_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hash = Context::new(&SHA256);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = file.read(&mut buffer).with_context(|| format!("read {}", path.display()))?;
        if count == 0 {
            return Ok(hex(&hash.finish()));
        }
        hash.update(&buffer[..count]);
    }
}

fn hex(digest: &Digest) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_standard() {
        // FIPS 180-2, B.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(of_bytes(b"abc"), abc);
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("abc"), "abc").unwrap();
        assert_eq!(of_file(&directory.path().join("abc")).unwrap(), abc);
        assert!(of_file(&directory.path().join("d")).unwrap_err().to_string().contains("/d"));
    }
}
