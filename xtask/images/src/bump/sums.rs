//! Reads the digests that a publisher lists: lines of `HASH *FILE` or `HASH  FILE`, as sha256sum prints them.

use anyhow::{Context, Result, ensure};
use xtask_core::digest::{Algorithm, Digest};

/// Returns the digest of `file` in the text of the list called `name`.
///
/// # Errors
/// Returns an error if `file` is not listed or is listed with two digests, or if the length of its digest does not fit
/// the algorithm in the list's name.
pub(super) fn digest(name: &str, text: &str, file: &str) -> Result<Digest> {
    let listed: Vec<_> = text.lines().filter_map(line).collect();
    let mut own = listed.iter().filter(|(_, listed)| *listed == file).map(|(hash, _)| *hash);
    let hash =
        own.next().with_context(|| format!("{file} is not among the {} files of {name}", listed.len()))?;
    ensure!(own.all(|other| other == hash), "{name} lists {file} twice, with two digests");
    let algorithm = Algorithm::ALL
        .into_iter()
        .find(|algorithm| algorithm.hex_digits() == hash.len())
        .with_context(|| {
            format!("{name} lists {file} with {} digits, which is neither SHA-256 nor SHA-512", hash.len())
        })?;
    let promised = named(name).unwrap_or(algorithm);
    ensure!(promised == algorithm, "{name} lists {file} with a {} digest", algorithm.name());
    let digest = format!("{}:{hash}", algorithm.name());
    digest.parse().map_err(anyhow::Error::msg).with_context(|| format!("read the line of {file} in {name}"))
}

/// Returns the algorithm that a list's name contains, for example SHA-256 for `SHA256SUMS`.
fn named(name: &str) -> Option<Algorithm> {
    let name = name.to_ascii_lowercase();
    Algorithm::ALL.into_iter().find(|algorithm| name.contains(algorithm.name()))
}

/// Splits a line into the hash and the file's name. Between them are a space and a mark: another space for text, an
/// asterisk for binary.
fn line(line: &str) -> Option<(&str, &str)> {
    let (hash, rest) = line.trim_end().split_once(' ')?;
    let file = rest.strip_prefix([' ', '*'])?;
    let hexadecimal = !hash.is_empty() && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    hexadecimal.then(|| (hash, file.strip_prefix("./").unwrap_or(file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "noble.img";

    fn read(name: &str, text: &str) -> Result<Digest> {
        digest(name, text, FILE)
    }

    #[test]
    fn both_forms_of_a_line_are_read() {
        let (short, long) = ("ab".repeat(32), "CD".repeat(64));
        let table = [
            ("SHA256SUMS", format!("{short} *{FILE}\n"), format!("sha256:{short}")),
            ("SHA512SUMS", format!("{long}  {FILE}\r\n"), format!("sha512:{}", long.to_lowercase())),
            ("CHECKSUM", format!("# {FILE}\n{short}  ./{FILE}"), format!("sha256:{short}")),
            (
                "SHA256SUMS",
                format!("{short} *x{FILE}\n{short} *{FILE}\n{short} *{FILE}\n"),
                format!("sha256:{short}"),
            ),
        ];
        for (name, text, expected) in table {
            assert_eq!(read(name, &text).unwrap().to_string(), expected, "{text:?}");
        }
    }

    #[test]
    fn a_list_that_does_not_say_it_clearly_is_refused() {
        let (one, other) = ("ab".repeat(32), "ac".repeat(32));
        let table = [
            (String::new(), "noble.img is not among the 0 files of SHA256SUMS"),
            (format!("{one} *x-{FILE}\n"), "not among the 1 files"),
            (format!("{one} {FILE}\n"), "not among the 0 files"),
            (format!("{one} *{FILE}\n{other} *{FILE}\n"), "twice"),
            (format!("{} *{FILE}\n", "ab".repeat(20)), "40 digits"),
            (format!("{} *{FILE}\n", "ab".repeat(64)), "with a sha512 digest"),
        ];
        for (text, words) in table {
            let error = read("SHA256SUMS", &text).unwrap_err().to_string();
            assert!(error.contains(words), "{error:?} does not say {words:?}");
        }
    }
}
