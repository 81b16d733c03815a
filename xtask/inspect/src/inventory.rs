//! The inventory of an image or a sysroot: its libraries with the versions and symbols that they define, and its
//! dynamic loaders. An inventory is read from a tree of files. Nothing in the tree is executed.

use std::collections::BTreeSet;

use object::elf::{DT_RPATH, DT_RUNPATH, DT_SONAME};
use serde::{Deserialize, Serialize};

use crate::elf::{Elf, Ident, shown};

/// The schema of a stored inventory.
pub const SCHEMA: u32 = 3;

/// The directories that the loader always searches (ld.so(8)). They come after the distribution's own directories.
const PLAIN: [&str; 4] = ["/lib", "/usr/lib", "/lib64", "/usr/lib64"];

/// The directories below which people install software with directories of its own.
const WIDE: [&str; 4] = ["/opt", "/srv", "/usr", "/usr/local"];

/// The libraries and the loaders of a tree.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    pub schema: u32,
    /// The source of the inventory: an image's digest, or a directory.
    pub source: String,
    /// The directories that the loader searches, in order.
    pub search: Vec<String>,
    /// The loaders' paths.
    pub interpreters: Vec<String>,
    /// Every shared library in the directories of `search` and one level below.
    pub libraries: Vec<Library>,
    /// The paths in the root directory, and one level below [`WIDE`]. A path that begins with none of them leads
    /// nowhere.
    pub roots: Vec<String>,
}

/// A shared library.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Library {
    /// The library's path in the tree.
    pub path: String,
    /// The library's `e_machine`.
    pub machine: u16,
    /// The versions that the library defines, in the library's own order.
    pub versions: Vec<String>,
    /// The libraries that this library needs.
    pub needed: Vec<String>,
    /// `DT_SONAME`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub soname: String,
    /// `DT_RPATH`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub rpath: String,
    /// `DT_RUNPATH`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub runpath: String,
    /// The hashes of the symbols' names, as [`Elf::exports`] returns them.
    #[serde(default)]
    pub symbols: Vec<u32>,
    /// The versions that other libraries must offer: library, version. They are known of a library that was read for
    /// this inspection, and are not stored.
    #[serde(skip)]
    pub requires: Vec<(String, String)>,
}

impl Library {
    /// Reads a library. The result is `None` if the bytes are no 64-bit ELF file: a linker script may have the name of
    /// a library.
    pub fn read(path: &str, bytes: &[u8]) -> Option<Self> {
        Ident::read(bytes).ok().filter(|ident| ident.class == 2 && ident.data == 1)?;
        let elf = Elf::parse(bytes).ok()?;
        Some(Self { symbols: elf.exports(), ..Self::of(path, &elf) })
    }

    /// Returns the data of a file that the loader needs, without its symbols.
    pub(crate) fn of(path: &str, elf: &Elf<'_>) -> Self {
        let text = |tag| elf.dynamic.text(tag).map(whole).unwrap_or_default();
        let required = elf.dynamic.required().filter(|required| !required.weak);
        Self {
            path: path.to_owned(),
            machine: elf.machine(),
            versions: elf.dynamic.offered().map(shown).collect(),
            needed: elf.dynamic.needed().map(shown).collect(),
            soname: text(DT_SONAME),
            rpath: text(DT_RPATH),
            runpath: text(DT_RUNPATH),
            symbols: Vec::new(),
            requires: required.map(|one| (shown(one.library), shown(one.version))).collect(),
        }
    }

    /// Returns the name under which the loader finds the library.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }
}

/// A tree of files: a directory, or a file system in an image.
pub trait Tree {
    /// Returns the names in a directory, sorted; none if there is no such directory.
    fn list(&self, directory: &str) -> Vec<String>;
    /// Returns a file's content. Symbolic links are followed within the tree.
    fn read(&self, path: &str) -> Option<Vec<u8>>;
    /// Returns the library at a path; `None` if there is no file, or if it is no library.
    fn library(&self, path: &str) -> Option<Library> {
        Library::read(path, &self.read(path)?)
    }
}

impl Inventory {
    /// Parses a stored inventory; `None` if the text is no inventory, or has another schema.
    pub fn from_json(text: &[u8]) -> Option<Self> {
        serde_json::from_slice(text).ok().filter(|inventory: &Self| inventory.schema == SCHEMA)
    }

    /// Reads the inventory of a tree with all its libraries. `multiarch` is the triplet in the names of its library
    /// directories. `source` is recorded in the inventory.
    pub fn of_tree(tree: &dyn Tree, source: &str, multiarch: &str) -> Self {
        let mut inventory = Self::without_libraries(tree, source, multiarch);
        for directory in inventory.search.clone() {
            let names = tree.list(&directory);
            inventory.take(tree, &directory, &names);
            // The directories that RPATHs name are mostly one level below: /usr/lib/aarch64-linux-gnu/systemd.
            for name in names.iter().filter(|name| !name.contains('.')) {
                let below = format!("{directory}/{name}");
                if !inventory.search.contains(&below) {
                    inventory.take(tree, &below, &tree.list(&below));
                }
            }
        }
        inventory
    }

    /// Reads the inventory of a tree, without its libraries. It takes milliseconds, and is sufficient if the tree can
    /// still be read when an executable is inspected.
    pub fn without_libraries(tree: &dyn Tree, source: &str, multiarch: &str) -> Self {
        let mut search = configured(tree);
        search.extend([format!("/lib/{multiarch}"), format!("/usr/lib/{multiarch}")]);
        search.extend(PLAIN.map(str::to_owned));
        let mut seen = BTreeSet::new();
        search.retain(|directory| seen.insert(directory.clone()));
        let mut inventory = Self { schema: SCHEMA, source: source.to_owned(), ..Self::default() };
        for directory in &search {
            let names = tree.list(directory).into_iter().filter(|name| is_loader(name));
            let paths = names.map(|name| format!("{directory}/{name}"));
            // A link that leads nowhere is no loader.
            inventory.interpreters.extend(
                paths.filter(|path| tree.read(path).is_some_and(|bytes| Ident::read(&bytes).is_ok())),
            );
        }
        for directory in [""].into_iter().chain(WIDE) {
            let names = tree.list(if directory.is_empty() { "/" } else { directory });
            inventory.roots.extend(names.into_iter().map(|name| format!("{directory}/{name}")));
        }
        inventory.search = search;
        inventory
    }

    fn take(&mut self, tree: &dyn Tree, directory: &str, names: &[String]) {
        let paths = names.iter().filter(|name| is_library(name)).map(|name| format!("{directory}/{name}"));
        let read = paths.filter_map(|path| tree.library(&path));
        self.libraries.extend(read);
    }

    /// Returns the release of glibc for a machine, by the newest version that its libc.so.6 defines. Without an
    /// inventory of libraries, the library is read from the tree.
    pub(crate) fn glibc(&self, machine: u16, tree: Option<&dyn Tree>) -> Option<String> {
        let paths = self.search.iter().map(|directory| format!("{directory}/libc.so.6"));
        let mut found = paths.filter_map(|path| match tree {
            Some(tree) => tree.library(&path),
            None => self.at(&path).cloned(),
        });
        let libc = found.find(|library| library.machine == machine)?;
        let releases = libc.versions.iter().filter_map(|version| version.strip_prefix("GLIBC_2."));
        let newest = releases.filter_map(|minor| minor.parse::<u32>().ok()).max()?;
        Some(format!("2.{newest}"))
    }

    /// Returns the library at a normalised path.
    pub fn at(&self, path: &str) -> Option<&Library> {
        self.libraries.iter().find(|library| library.path == path)
    }

    /// Returns whether the libraries of a directory are in the inventory, if there are any.
    pub fn covers(&self, directory: &str) -> bool {
        let parent = directory.rsplit_once('/').map_or("", |(parent, _)| parent);
        self.search.iter().any(|known| known == directory || known == parent) || !self.exists(directory)
    }

    /// Returns false if it is certain that there is no such directory.
    fn exists(&self, directory: &str) -> bool {
        let known = |length: usize| {
            let parts: Vec<_> = directory.split('/').take(length + 1).collect();
            (parts.len() == length + 1).then(|| parts.join("/"))
        };
        let inside = |parent: &str| parent.is_empty() || WIDE.contains(&parent);
        (1..=3).filter_map(known).all(|path| {
            let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
            !inside(parent) || self.roots.contains(&path)
        })
    }
}

/// Returns a path without `.`, `..` and empty parts.
pub(crate) fn normalised(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Returns a text of the file for a search, which a cut would falsify.
fn whole(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Returns whether a file name is that of a loader: `ld-linux-aarch64.so.1`, `ld-musl-x86_64.so.1`, `ld.so.1`.
fn is_loader(name: &str) -> bool {
    (name.starts_with("ld-") || name.starts_with("ld.") || name.starts_with("ld64.")) && name.contains(".so")
}

fn is_library(name: &str) -> bool {
    name.ends_with(".so") || name.contains(".so.")
}

/// Returns the directories in `/etc/ld.so.conf` and in the files that it includes (ldconfig(8)).
fn configured(tree: &dyn Tree) -> Vec<String> {
    const INCLUDED: &str = "/etc/ld.so.conf.d";
    let mut files = vec!["/etc/ld.so.conf".to_owned()];
    let names = tree.list(INCLUDED).into_iter().filter(|name| name.ends_with(".conf"));
    files.extend(names.map(|name| format!("{INCLUDED}/{name}")));
    let texts = files.iter().filter_map(|file| tree.read(file));
    let texts: Vec<String> = texts.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect();
    let lines = texts.iter().flat_map(|text| text.lines()).map(str::trim);
    lines.filter(|line| line.starts_with('/')).map(|line| line.trim_end_matches('/').to_owned()).collect()
}

/// A directory on this host that is the root of a tree. Symbolic links stay within it.
#[derive(Debug)]
pub struct Sysroot(pub std::path::PathBuf);

impl Sysroot {
    /// Returns the path on this host for a path of the tree. Links are followed within the tree.
    pub fn resolve(&self, path: &str) -> Option<std::path::PathBuf> {
        const MAX_LINKS: usize = 40;
        let mut rest: Vec<String> =
            path.split('/').rev().filter(|part| !part.is_empty()).map(str::to_owned).collect();
        let mut done: Vec<String> = Vec::new();
        let mut links = 0;
        while let Some(part) = rest.pop() {
            match part.as_str() {
                "." => continue,
                ".." => {
                    done.pop();
                    continue;
                }
                _ => done.push(part),
            }
            let here = self.0.join(done.join("/"));
            let Ok(target) = std::fs::read_link(&here) else { continue };
            links += 1;
            if links > MAX_LINKS {
                return None;
            }
            done.pop();
            let target = target.to_str()?.to_owned();
            if target.starts_with('/') {
                done.clear();
            }
            rest.extend(target.split('/').rev().filter(|part| !part.is_empty()).map(str::to_owned));
        }
        Some(self.0.join(done.join("/")))
    }
}

/// Two trees, one over the other: the files of a package over those of the system on which it is installed.
pub struct Overlay<'a> {
    pub upper: &'a dyn Tree,
    pub lower: &'a dyn Tree,
}

impl Tree for Overlay<'_> {
    fn list(&self, directory: &str) -> Vec<String> {
        let names = [self.upper.list(directory), self.lower.list(directory)].concat();
        names.into_iter().collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn read(&self, path: &str) -> Option<Vec<u8>> {
        self.upper.read(path).or_else(|| self.lower.read(path))
    }

    fn library(&self, path: &str) -> Option<Library> {
        let lower = || self.upper.read(path).is_none().then(|| self.lower.library(path))?;
        self.upper.library(path).or_else(lower)
    }
}

impl Tree for Sysroot {
    fn list(&self, directory: &str) -> Vec<String> {
        let entries = self.resolve(directory).and_then(|path| std::fs::read_dir(path).ok());
        let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name());
        let mut names: Vec<_> = names.filter_map(|name| name.into_string().ok()).collect();
        names.sort();
        names
    }

    fn read(&self, path: &str) -> Option<Vec<u8>> {
        let path = self.resolve(path)?;
        path.is_file().then(|| std::fs::read(path).ok()).flatten()
    }
}
