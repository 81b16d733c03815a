//! Access to the files of a judged disk.

use anyhow::Error;
use ext4_view::{Ext4, Ext4Error, FileType};

/// The reason why a file could not be judged.
#[derive(Debug)]
pub(crate) enum Fault {
    /// This host failed, which says nothing about the device.
    Host(Error),
    /// The file system is damaged at this path.
    Disk { path: String, text: String },
}

pub(crate) type Checked<T> = Result<T, Fault>;

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    /// A symbolic link with its target.
    Link(String),
    Other,
}

/// The files of a disk. All paths are absolute. A missing file is no error.
pub(crate) trait Files {
    /// Returns the kind of a file. The last component of the path is not followed if it is a link.
    fn kind(&self, path: &str) -> Checked<Option<Kind>>;

    /// Returns the content of a file. Follows links.
    fn read(&self, path: &str) -> Checked<Option<Vec<u8>>>;

    /// Returns whether a file has this content, or `None` if the file is missing. Follows links.
    fn has(&self, path: &str, expected: &[u8]) -> Checked<Option<bool>> {
        Ok(self.read(path)?.map(|content| content == expected))
    }

    /// Returns the names in a directory, sorted. A missing directory is an empty one.
    fn list(&self, path: &str) -> Checked<Vec<String>>;
}

impl Files for Ext4 {
    fn kind(&self, path: &str) -> Checked<Option<Kind>> {
        let Some(metadata) = found(path, self.symlink_metadata(path))? else { return Ok(None) };
        Ok(match metadata.file_type() {
            FileType::Symlink => {
                let target = found(path, self.read_link(path))?;
                target.map(|target| Kind::Link(target.display().to_string()))
            }
            FileType::Directory => Some(Kind::Directory),
            FileType::Regular => Some(Kind::File),
            _ => Some(Kind::Other),
        })
    }

    fn read(&self, path: &str) -> Checked<Option<Vec<u8>>> {
        found(path, Ext4::read(self, path))
    }

    /// Compares block by block. Most of the time of a judgement would otherwise be the copy of an executable.
    fn has(&self, path: &str, expected: &[u8]) -> Checked<Option<bool>> {
        let Some(mut file) = found(path, self.open(path))? else { return Ok(None) };
        if file.metadata().len() != expected.len() as u64 {
            return Ok(Some(false));
        }
        let mut buffer = [0; 1 << 16];
        let mut rest = expected;
        while !rest.is_empty() {
            let Some(count) = found(path, file.read_bytes(&mut buffer))? else { return Ok(None) };
            let Some(following) = rest.strip_prefix(&buffer[..count]).filter(|_| count > 0) else {
                return Ok(Some(false));
            };
            rest = following;
        }
        Ok(Some(true))
    }

    fn list(&self, path: &str) -> Checked<Vec<String>> {
        let Some(entries) = found(path, self.read_dir(path))? else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for entry in entries {
            let Some(entry) = found(path, entry)? else { continue };
            let name = entry.file_name().display().to_string();
            if ![".", ".."].contains(&name.as_str()) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

fn found<T>(path: &str, result: Result<T, Ext4Error>) -> Checked<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => Ok(None),
        Err(error @ (Ext4Error::Io(_) | Ext4Error::Incompatible(_))) => {
            Err(Fault::Host(Error::new(error).context(format!("read {path} of the judged disk"))))
        }
        Err(error) => Err(Fault::Disk { path: path.to_owned(), text: error.to_string() }),
    }
}

/// Returns how the content of a file differs from the expected one, or `None` if they are equal.
pub(crate) fn difference(content: &[u8], expected: &[u8]) -> Option<String> {
    if content == expected {
        return None;
    }
    if content.is_empty() {
        return Some("is empty".to_owned());
    }
    let same = content.iter().zip(expected).take_while(|(found, expected)| found == expected).count();
    let (length, whole) = (content.len(), expected.len());
    let rest = &content[same..];
    let zeros =
        if rest.is_empty() || rest.iter().any(|byte| *byte != 0) { "" } else { ", with only zeros there" };
    Some(match same == length {
        true => format!("ends after {length} of {whole} bytes"),
        false => format!("has {length} bytes instead of {whole} and differs from byte {same} on{zeros}"),
    })
}

/// A directory of this host in place of a disk.
#[cfg(test)]
pub(crate) struct Directory(pub(crate) std::path::PathBuf);

#[cfg(test)]
impl Directory {
    pub(crate) fn path(&self, path: &str) -> std::path::PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }
}

#[cfg(test)]
impl Files for Directory {
    fn kind(&self, path: &str) -> Checked<Option<Kind>> {
        let Ok(metadata) = std::fs::symlink_metadata(self.path(path)) else { return Ok(None) };
        Ok(Some(if metadata.is_symlink() {
            Kind::Link(std::fs::read_link(self.path(path)).unwrap().display().to_string())
        } else if metadata.is_dir() {
            Kind::Directory
        } else {
            Kind::File
        }))
    }

    fn read(&self, path: &str) -> Checked<Option<Vec<u8>>> {
        match self.kind(path)? {
            Some(Kind::Link(target)) => self.read(&target),
            Some(Kind::File) => Ok(Some(std::fs::read(self.path(path)).unwrap())),
            Some(_) => Err(Fault::Disk { path: path.to_owned(), text: "it is a directory".to_owned() }),
            None => Ok(None),
        }
    }

    fn list(&self, path: &str) -> Checked<Vec<String>> {
        let Ok(entries) = std::fs::read_dir(self.path(path)) else { return Ok(Vec::new()) };
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().to_str().unwrap().to_owned()).collect();
        names.sort();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_described() {
        for (content, expected, words) in [
            ("abc", "abc", None),
            ("", "abc", Some("is empty")),
            ("ab", "abc", Some("ends after 2 of 3 bytes")),
            ("aXc", "abc", Some("has 3 bytes instead of 3 and differs from byte 1 on")),
            (
                "a\0\0",
                "abc",
                Some("has 3 bytes instead of 3 and differs from byte 1 on, with only zeros there"),
            ),
            ("abcd", "abc", Some("has 4 bytes instead of 3 and differs from byte 3 on")),
        ] {
            assert_eq!(difference(content.as_bytes(), expected.as_bytes()).as_deref(), words, "{content:?}");
        }
    }
}
