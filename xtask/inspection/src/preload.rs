//! The libraries that the loader adds to programs: `/etc/ld.so.preload` of the target.

use std::path::PathBuf;

use inspect::inventory::{Sysroot, Tree as _};

use crate::{DeviceRoot, Inspection};

/// The file that glibc's loader reads for each program (ld.so(8)). musl's loader does not read it.
const FILE: &str = "/etc/ld.so.preload";

impl Inspection {
    /// Returns the libraries that glibc's loader adds to each program, by their paths on the target and on this host.
    /// The loader ignores a library that is missing. The files of an image of the catalogue are not known.
    pub(crate) fn preloads(&self) -> Vec<(String, PathBuf)> {
        let DeviceRoot::Sysroot(root, _) = &self.place else { return Vec::new() };
        let tree = Sysroot(root.clone());
        let text = tree.read(FILE).unwrap_or_default();
        let place = |path: String| {
            let place = tree.resolve(&path)?.canonicalize().ok()?;
            place.is_file().then_some((path, place))
        };
        let found =
            names(&String::from_utf8_lossy(&text)).into_iter().filter_map(|name| match name.contains('/') {
                true => place(name),
                false => {
                    self.library_directories().find_map(|directory| place(format!("{directory}/{name}")))
                }
            });
        found.collect()
    }
}

/// Returns the names in the file. Spaces and colons separate them, and a comment ends with its line (glibc,
/// elf/rtld.c).
fn names(text: &str) -> Vec<String> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    let words = lines.flat_map(|line| line.split([' ', '\t', ':']));
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_separated_as_the_loader_does() {
        let text = "# none\n/a.so:/b.so\tc.so # /d.so\n\n/e.so\n";
        assert_eq!(names(text), ["/a.so", "/b.so", "c.so", "/e.so"]);
    }
}
