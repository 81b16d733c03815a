//! Finds the libraries of an executable as the loader does (ld.so(8)): breadth first, in `DT_RPATH`, `DT_RUNPATH` and
//! the directories of the target.

use std::collections::BTreeSet;

use crate::Target;
use crate::elf::{Elf, Ident};
use crate::finding::LoadedLibrary;
use crate::inventory::{Inventory, Library, Tree, normalised};

/// Upper bound for the directories of a search path that are read.
const MAX_DIRECTORIES: usize = 64;

/// The file itself or a library that it loads.
pub(super) struct Object {
    pub(super) library: Library,
    /// The name by which the library was needed.
    name: String,
    /// The index of the object that needs it.
    parent: usize,
    /// The object's directory, to which `$ORIGIN` leads; `None` if it is not known.
    directory: Option<String>,
    /// True if the object comes with the file and is not the target's.
    pub(super) beside: bool,
    /// The directories that the loader searches before the one with the object, and that were not read.
    pub(super) unread: Vec<String>,
    /// True if the object was found in the directories that the loader searches for every program.
    by_search: bool,
}

/// A library that was not found.
pub(super) struct Absent {
    pub(super) name: String,
    /// The library that needs it; empty for the file itself.
    pub(super) by: String,
    /// The directories that the loader also searches, and that were not read.
    pub(super) unread: Vec<String>,
    /// The file at which the loader ends the search with an error.
    pub(super) broken: Option<Broken>,
}

/// A file with the name of a library that the loader cannot load.
pub(super) struct Broken {
    pub(super) path: String,
    /// A sentence without a full stop.
    pub(super) why: String,
}

/// The file, its libraries, and those that were not found.
pub(super) struct Loaded {
    pub(super) objects: Vec<Object>,
    pub(super) absent: Vec<Absent>,
    /// The directories of the target that the loader searches for each library, in order.
    pub(super) searched: Vec<String>,
}

impl Loaded {
    /// Returns the library that was loaded for a name.
    pub(super) fn named(&self, name: &str) -> Option<&Object> {
        self.objects.iter().skip(1).find(|object| object.answers(name))
    }

    /// Returns the paths of the libraries that were found in the directories that the loader searches for every
    /// program.
    pub(super) fn found_by_search(&self) -> impl Iterator<Item = &str> {
        self.objects.iter().filter(|object| object.by_search).map(|object| object.library.path.as_str())
    }

    /// Returns the libraries that were found.
    pub(super) fn libraries(self) -> impl Iterator<Item = LoadedLibrary> {
        let found = self.objects.into_iter().skip(1);
        found.map(|object| LoadedLibrary { path: object.library.path, beside: object.beside })
    }
}

impl Object {
    fn answers(&self, name: &str) -> bool {
        self.name == name || self.library.soname == name
    }
}

/// A directory of a search path.
enum Directory {
    Known { path: String, beside: bool },
    Unknown(String),
}

/// The files of the target and those beside the executable.
pub(super) struct Files<'a> {
    target: &'a Target<'a>,
    inventory: &'a Inventory,
    machine: u16,
    search: Vec<String>,
    is_musl: bool,
}

impl<'a> Files<'a> {
    /// `search` has the directories in which the loader looks at last. `is_musl` is true if the loader is musl's.
    pub(super) fn new(
        target: &'a Target<'a>,
        inventory: &'a Inventory,
        machine: u16,
        search: Vec<String>,
        is_musl: bool,
    ) -> Self {
        Self { target, inventory, machine, search, is_musl }
    }

    /// Loads the libraries of a file.
    pub(super) fn load(&self, file: Library) -> Loaded {
        let directory = self.target.origin.map(|origin| origin.directory.to_owned());
        let (name, unread) = (String::new(), Vec::new());
        let root =
            Object { library: file, name, parent: 0, directory, beside: true, unread, by_search: false };
        let searched = [&*self.target.library_path, &*self.search].concat();
        let mut loaded = Loaded { objects: vec![root], absent: Vec::new(), searched };
        let mut asked = BTreeSet::new();
        let mut at = 0;
        while let Some(object) = loaded.objects.get(at) {
            for name in object.library.needed.clone() {
                if !asked.insert(name.clone()) || loaded.named(&name).is_some() {
                    continue;
                }
                match self.find(&loaded.objects, at, &name) {
                    Ok(object) => loaded.objects.push(object),
                    Err((unread, broken)) => {
                        let by = if at == 0 {
                            String::new()
                        } else {
                            loaded.objects[at].library.name().to_owned()
                        };
                        loaded.absent.push(Absent { name, by, unread, broken });
                    }
                }
            }
            at += 1;
        }
        loaded
    }

    /// Finds a library for the object at an index.
    ///
    /// # Errors
    /// If the library is in none of the directories that were read, or if the loader ends the search at another file,
    /// returns the directories that were not read, and that file.
    fn find(
        &self,
        objects: &[Object],
        parent: usize,
        name: &str,
    ) -> Result<Object, (Vec<String>, Option<Broken>)> {
        let mut unread = Vec::new();
        let found = if name.contains('/') {
            // The loader opens such a path as it is. What it is relative to is known only when the program starts.
            match name.starts_with('/') {
                true => self.target_library(name).map(|library| (library, false, false)),
                false => {
                    unread.push(format!("the working directory ({name})"));
                    None
                }
            }
        } else {
            let places = self.search_path(objects, parent);
            let before_search = places.len() - self.search.len();
            places.into_iter().enumerate().find_map(|(index, place)| match place {
                Directory::Unknown(text) => {
                    unread.push(text);
                    None
                }
                Directory::Known { path, beside } => {
                    let (library, beside) = self.in_directory(&path, beside, name, &mut unread)?;
                    Some((library, beside, index >= before_search))
                }
            })
        };
        let Some((library, beside, by_search)) = found else { return Err((unread, None)) };
        let library = match library {
            Ok(library) => library,
            Err(broken) => return Err((unread, Some(broken))),
        };
        let directory = library.path.rsplit_once('/').map(|(directory, _)| directory.to_owned());
        Ok(Object { library, name: name.to_owned(), parent, directory, beside, unread, by_search })
    }

    /// Returns the directories that the loader searches for a library of `objects[parent]`, in order (ld.so(8)). musl's
    /// loader searches `LD_LIBRARY_PATH` first, and a RUNPATH also for what the object's libraries need.
    fn search_path(&self, objects: &[Object], parent: usize) -> Vec<Directory> {
        let known = |paths: &[String]| {
            let paths = paths.iter().cloned();
            paths.map(|path| Directory::Known { path, beside: false }).collect::<Vec<_>>()
        };
        let chain = || {
            let chain = std::iter::successors(Some(parent), |at| (*at > 0).then(|| objects[*at].parent));
            chain.map(|at| &objects[at])
        };
        let asking = &objects[parent].library;
        let mut places = Vec::new();
        if self.is_musl {
            places.extend(known(&self.target.library_path));
            for object in chain() {
                let Library { rpath, runpath, .. } = &object.library;
                places.extend(expanded(if runpath.is_empty() { rpath } else { runpath }, object));
            }
        } else {
            // RPATH counts for everything that the object loads, but not for an object with a RUNPATH.
            if asking.runpath.is_empty() {
                for object in chain().filter(|object| object.library.runpath.is_empty()) {
                    places.extend(expanded(&object.library.rpath, object));
                }
            }
            places.extend(known(&self.target.library_path));
            places.extend(expanded(&asking.runpath, &objects[parent]));
        }
        places.extend(known(&self.search));
        places
    }

    fn in_directory(
        &self,
        directory: &str,
        beside: bool,
        name: &str,
        unread: &mut Vec<String>,
    ) -> Option<(Result<Library, Broken>, bool)> {
        let path = format!("{directory}/{name}");
        if beside {
            return Some((self.library_in(self.target.origin?.tree, &path)?, true));
        }
        if self.target.tree.is_none() && !self.inventory.covers(&normalised(directory)) {
            unread.push(directory.to_owned());
        }
        Some((self.target_library(&path)?, false))
    }

    /// Returns the target's library at a path.
    fn target_library(&self, path: &str) -> Option<Result<Library, Broken>> {
        match self.target.tree {
            Some(tree) => self.library_in(tree, path),
            None => {
                let library = self.inventory.at(&normalised(path))?.clone();
                (library.machine == self.machine).then_some(Ok(library))
            }
        }
    }

    /// Returns the library at a path of a tree; `None` if the loader goes on to the next directory, because there is no
    /// file or, for glibc, because the file is for another machine.
    fn library_in(&self, tree: &dyn Tree, path: &str) -> Option<Result<Library, Broken>> {
        let why = match tree.library(path) {
            Some(library) if library.machine == self.machine => return Some(Ok(library)),
            Some(_) => OTHER_MACHINE.to_owned(),
            None => flaw(&tree.read(path)?),
        };
        (self.is_musl || why != OTHER_MACHINE).then(|| Err(Broken { path: path.to_owned(), why }))
    }
}

const OTHER_MACHINE: &str = "it is for another machine";

/// Returns why the loader does not load a file. glibc's loader compares the header with its own machine before it reads
/// the rest (elf/dl-load.c, open_verify).
fn flaw(bytes: &[u8]) -> String {
    match Ident::read(bytes) {
        Ok(ident) if ident.class != 2 => OTHER_MACHINE.to_owned(),
        Ok(_) => Elf::parse(bytes).err().unwrap_or_else(|| OTHER_MACHINE.to_owned()),
        Err(why) => why,
    }
}

/// Returns the directories of an RPATH or a RUNPATH.
fn expanded(path: &str, object: &Object) -> Vec<Directory> {
    let parts = path.split(':').filter(|_| !path.is_empty()).enumerate();
    parts
        .map(|(index, part)| {
            let whole = part.replace("${ORIGIN}", "$ORIGIN");
            // An empty part stands for the working directory.
            let named = if part.is_empty() { "the working directory" } else { part };
            let unknown = || Directory::Unknown(named.to_owned());
            if index >= MAX_DIRECTORIES {
                return unknown();
            }
            let Some(rest) = whole.strip_prefix("$ORIGIN") else {
                let is_known = whole.starts_with('/') && !whole.contains('$');
                return if is_known { Directory::Known { path: whole, beside: false } } else { unknown() };
            };
            match &object.directory {
                Some(directory) if !rest.contains('$') => {
                    Directory::Known { path: format!("{directory}{rest}"), beside: object.beside }
                }
                _ => unknown(),
            }
        })
        .collect()
}
