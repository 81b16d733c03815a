//! The inventory of an image or a sysroot: its libraries with the versions that they define, and its dynamic loaders.
//! An inventory is read once from a tree of files. Nothing in the tree is executed.

use serde::{Deserialize, Serialize};

use crate::elf::{Elf, Ident, shown};

/// The schema of a stored inventory.
pub const SCHEMA: u32 = 2;

/// The directories that the loader always searches (ld.so(8)). They come after the distribution's own directories.
const PLAIN: [&str; 4] = ["/lib", "/usr/lib", "/lib64", "/usr/lib64"];

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
}

impl Library {
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
}

impl Inventory {
    /// Parses a stored inventory; `None` if the text is no inventory, or has another schema.
    pub fn from_json(text: &[u8]) -> Option<Self> {
        serde_json::from_slice(text).ok().filter(|inventory: &Self| inventory.schema == SCHEMA)
    }

    /// Reads the inventory of a tree. `multiarch` is the triplet in the names of its library directories. `source` is
    /// recorded in the inventory.
    pub fn of_tree(tree: &dyn Tree, source: &str, multiarch: &str) -> Self {
        let mut search = configured(tree);
        search.extend([format!("/lib/{multiarch}"), format!("/usr/lib/{multiarch}")]);
        search.extend(PLAIN.map(str::to_owned));
        let mut seen = std::collections::BTreeSet::new();
        search.retain(|directory| seen.insert(directory.clone()));
        let mut inventory = Self { schema: SCHEMA, source: source.to_owned(), ..Self::default() };
        for directory in &search {
            let names = tree.list(directory);
            inventory.interpreters.extend(
                names.iter().filter(|name| is_loader(name)).map(|name| format!("{directory}/{name}")),
            );
            inventory.take(tree, directory, &names);
            // The directories that RPATHs name are mostly one level below: /usr/lib/aarch64-linux-gnu/systemd.
            for name in names
                .iter()
                .filter(|name| !name.contains('.') && !search.contains(&format!("{directory}/{name}")))
            {
                let below = format!("{directory}/{name}");
                inventory.take(tree, &below, &tree.list(&below));
            }
        }
        inventory.search = search;
        inventory
    }

    fn take(&mut self, tree: &dyn Tree, directory: &str, names: &[String]) {
        let paths = names.iter().filter(|name| is_library(name)).map(|name| format!("{directory}/{name}"));
        self.libraries
            .extend(paths.filter_map(|path| tree.read(&path).and_then(|bytes| library(&path, &bytes))));
    }

    /// Returns the library of this name in the directories of an RPATH.
    pub fn find_in(&self, rpath: &str, name: &str) -> Option<&Library> {
        let paths: Vec<_> =
            rpath.split(':').map(|directory| format!("{}/{name}", directory.trim_end_matches('/'))).collect();
        self.libraries.iter().find(|library| paths.contains(&library.path))
    }

    /// Returns the library that the loader takes for `name`: the first one for the right machine in the directories
    /// that the loader searches.
    pub fn find(&self, name: &str, machine: u16) -> Option<&Library> {
        let places = self.search.iter().map(|directory| format!("{directory}/{name}"));
        places.into_iter().find_map(|path| {
            self.libraries.iter().find(|library| library.path == path && library.machine == machine)
        })
    }
}

/// Returns whether a file name is that of a loader: `ld-linux-aarch64.so.1`, `ld-musl-x86_64.so.1`, `ld.so.1`.
fn is_loader(name: &str) -> bool {
    (name.starts_with("ld-") || name.starts_with("ld.") || name.starts_with("ld64.")) && name.contains(".so")
}

fn is_library(name: &str) -> bool {
    name.ends_with(".so") || name.contains(".so.")
}

fn library(path: &str, bytes: &[u8]) -> Option<Library> {
    // A linker script may have the name of a library, but it is no library.
    Ident::read(bytes).ok().filter(|ident| ident.class == 2 && ident.data == 1)?;
    let elf = Elf::parse(bytes).ok()?;
    Some(Library {
        path: path.to_owned(),
        machine: elf.machine(),
        versions: elf.dynamic.offered().map(shown).collect(),
        needed: elf.dynamic.needed().map(shown).collect(),
    })
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
