//! Checks that glibc's loader finds the libraries in the directories that only `/etc/ld.so.conf` names. It does not read
//! this file, but ldconfig's cache (ld.so(8), ldconfig(8)).

use memchr::memmem;

use super::musl;
use super::resolve::Loaded;
use crate::Target;
use crate::elf::Elf;
use crate::finding::Finding;

const CACHE: &str = "/etc/ld.so.cache";

/// The directories that glibc's loader searches without its cache. Debian adds those with the triplet of the
/// architecture.
const TRUSTED: [&str; 4] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64"];

/// Returns a finding if the cache lacks libraries. A package is left out, because its installation runs ldconfig.
pub(super) fn check(elf: &Elf<'_>, loaded: &Loaded, target: &Target<'_>) -> Option<Finding> {
    let tree = target.tree.filter(|_| !target.packaged && !musl::is_asked_by(elf))?;
    let paths: Vec<&str> = loaded.found_by_search().filter(|path| !is_trusted(path)).collect();
    if paths.is_empty() {
        return None;
    }
    let cache = tree.read(CACHE).unwrap_or_default();
    let absent: Vec<_> =
        paths.into_iter().filter(|path| memmem::find(&cache, path.as_bytes()).is_none()).collect();
    (!absent.is_empty()).then(|| {
        let found = format!("it needs {}, which {CACHE} does not list", absent.join(", "));
        let offers = format!(
            "the loader finds libraries in other directories than {} only by this cache",
            TRUSTED.join(", ")
        );
        Finding::warned(
            "needed",
            &found,
            &offers,
            "run ldconfig in the image, after the libraries were added",
        )
    })
}

fn is_trusted(path: &str) -> bool {
    let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
    let of_triplet = |(parent, name): (&str, &str)| TRUSTED.contains(&parent) && name.contains("-linux-gnu");
    TRUSTED.contains(&directory) || directory.rsplit_once('/').is_some_and(of_triplet)
}
