//! The memory that a new process can have: the available memory of the host, or what a cgroup of this process still
//! allows, whichever is less.

use std::path::{Path, PathBuf};

/// An amount of memory that is available.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    pub bytes: u64,
    /// The value and the file that state the amount, for messages.
    pub source: String,
}

/// The files of a cgroup that limit its memory (Linux, cgroup-v2.rst and cgroup-v1/memory.rst).
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// The line of `memory.stat` with the inactive part of the page cache in bytes. The kernel reclaims it before it
    /// kills a process.
    reclaimable: &'static str,
}

static V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file ",
};
static V2: Files = Files { limit: "memory.max", usage: "memory.current", reclaimable: "inactive_file " };

/// Returns the memory that a new process can have without swapping. In a container, `/proc/meminfo` describes the host,
/// and the cgroup may allow less.
pub fn available() -> Option<Memory> {
    available_below(Path::new("/"))
}

fn available_below(root: &Path) -> Option<Memory> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let host = number(&read("proc/meminfo"), "MemAvailable:")
        .map(|kib| Memory { bytes: kib * 1024, source: "MemAvailable in /proc/meminfo".to_owned() });
    let (groups, mounts) = (read("proc/self/cgroup"), read("proc/self/mountinfo"));
    let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let limits = directories(&groups, &mounts).into_iter().filter_map(|(directory, files)| {
        let source = format!("{} in {}", files.limit, directory.display());
        Some(Memory { bytes: left(&below(&directory), files)?, source })
    });
    host.into_iter().chain(limits).min_by_key(|memory| memory.bytes)
}

/// Returns the directories of this process's cgroups and of all their parents (proc(5), `/proc/self/cgroup` and
/// `/proc/self/mountinfo`).
fn directories(groups: &str, mounts: &str) -> Vec<(PathBuf, &'static Files)> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let Some((mount, kind)) = line.split_once(" - ") else { continue };
        let files = match kind.split(' ').collect::<Vec<_>>()[..] {
            ["cgroup2", ..] => &V2,
            ["cgroup", .., options] if options.split(',').any(|option| option == "memory") => &V1,
            _ => continue,
        };
        let [_, _, _, root, point, ..] = mount.split(' ').collect::<Vec<_>>()[..] else { continue };
        let own = groups.lines().find_map(|line| match line.splitn(3, ':').collect::<Vec<_>>()[..] {
            ["0", "", path] if std::ptr::eq(files, &V2) => Some(path),
            [_, names, path] if std::ptr::eq(files, &V1) && names.split(',').any(|name| name == "memory") => {
                Some(path)
            }
            _ => None,
        });
        // The mount of a container may begin at the container's own cgroup.
        let Some(own) = own else { continue };
        let inside = Path::new(own).strip_prefix(root).unwrap_or(Path::new(""));
        let all: PathBuf = Path::new(point).components().chain(inside.components()).collect();
        let parents = all.ancestors().take_while(|directory| directory.starts_with(point));
        found.extend(parents.map(|directory| (directory.to_owned(), files)));
    }
    found
}

/// Returns the bytes that the cgroup can still use; `None` if it has no limit.
fn left(directory: &Path, files: &Files) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).ok();
    let value = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let reclaimable = number(&read("memory.stat").unwrap_or_default(), files.reclaimable).unwrap_or(0);
    let used = value(files.usage)?.saturating_sub(reclaimable);
    Some(value(files.limit)?.saturating_sub(used))
}

/// Returns the first number after `name` at the start of a line.
fn number(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    /// The mounts of a host with both versions, and a container's view of its own cgroup.
    const HYBRID: &str = "31 24 0:26 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n\
        33 24 0:29 / /sys/fs/cgroup/memory rw,nosuid shared:15 - cgroup cgroup rw,memory\n\
        34 24 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
    const CONTAINER: &str = "31 24 0:26 /docker/ab /sys/fs/cgroup ro - cgroup2 cgroup rw\n";

    #[test]
    fn the_smallest_limit_of_the_hierarchy_counts() {
        let available = |groups: &str, mounts: &str, files: &[(&str, &str)]| {
            let root = tempfile::tempdir().unwrap();
            let own = [
                ("proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 8388608 kB\n"),
                ("proc/self/cgroup", groups),
                ("proc/self/mountinfo", mounts),
            ];
            for (name, text) in own.iter().chain(files) {
                let path = root.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            let memory = available_below(root.path()).unwrap();
            (memory.bytes / MIB, memory.source)
        };
        let host = (8192, "MemAvailable in /proc/meminfo".to_owned());
        assert_eq!(available("", "", &[]), host);
        let parent = [
            ("sys/fs/cgroup/a/memory.max", "1073741824\n"),
            ("sys/fs/cgroup/a/memory.current", "524288000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 104857600\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "1\n"),
        ];
        let whole = CONTAINER.replace("/docker/ab", "/");
        assert_eq!(
            available("0::/a/b\n", &whole, &parent),
            (624, "memory.max in /sys/fs/cgroup/a".to_owned())
        );
        let inside = [("sys/fs/cgroup/memory.max", "2097152\n"), ("sys/fs/cgroup/memory.current", "0\n")];
        assert_eq!(
            available("0::/docker/ab\n", CONTAINER, &inside),
            (2, "memory.max in /sys/fs/cgroup".to_owned())
        );
        let old = [
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "3145728\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "1048576\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1048576\n"),
        ];
        let of_v1 = (2, "memory.limit_in_bytes in /sys/fs/cgroup/memory/x".to_owned());
        assert_eq!(available("7:cpu:/y\n5:memory:/x\n0::/\n", HYBRID, &old), of_v1);
        assert_eq!(available("5:memory:/\n0::/\n", HYBRID, &old[2..]), host);
    }
}
