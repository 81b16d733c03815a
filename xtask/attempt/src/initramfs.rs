//! The initramfs: a cpio archive in the format `newc` (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)
//! with the guest's first process, the kernel's modules, and the console.

/// The types of a mode (inode(7)).
const DIRECTORY: u32 = 0o040_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
const REGULAR: u32 = 0o100_000;
/// The device number of the console: 5, 1 (Linux, Documentation/admin-guide/devices.txt).
const CONSOLE: (u32, u32) = (5, 1);

/// A cpio archive that is being written.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.entries += 1;
        let length =
            |bytes: usize| u32::try_from(bytes).expect("a file of an initramfs is smaller than 4 GiB");
        // The fields: inode, mode, user, group, links, time, size, device of the file system (2), device of the node
        // (2), length of the name with its final zero, checksum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            length(content.len()),
            0,
            0,
            device.0,
            device.1,
            length(name.len() + 1),
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes().chain([0]));
        self.align();
        self.bytes.extend(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Returns the archive. The first process loads the modules in the order of their names.
pub(crate) fn archive(init: &[u8], modules: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Archive::default();
    for directory in ["dev", "modules"] {
        archive.add(directory, DIRECTORY | 0o755, &[], (0, 0));
    }
    archive.add("dev/console", CHARACTER_DEVICE | 0o600, &[], CONSOLE);
    archive.add("init", REGULAR | 0o755, init, (0, 0));
    for (name, content) in modules {
        archive.add(&format!("modules/{name}"), REGULAR | 0o644, content, (0, 0));
    }
    archive.add("TRAILER!!!", 0, &[], (0, 0));
    archive.bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the names, modes and contents by the format's own rules.
    fn read(mut rest: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        let whole = rest.len();
        let mut take = |count: usize| {
            let (head, tail) = rest.split_at(count);
            rest = tail;
            (head.to_vec(), whole - tail.len())
        };
        loop {
            assert_eq!(take(6).0, b"070701");
            let fields: Vec<u32> = (0..13)
                .map(|_| u32::from_str_radix(std::str::from_utf8(&take(8).0).unwrap(), 16).unwrap())
                .collect();
            let (name, at) = take(fields[11] as usize);
            take(at.next_multiple_of(4) - at);
            let (content, at) = take(fields[6] as usize);
            take(at.next_multiple_of(4) - at);
            let name = String::from_utf8(name).unwrap().trim_end_matches('\0').to_owned();
            if name == "TRAILER!!!" {
                return found;
            }
            found.push((name, fields[1], content));
        }
    }

    #[test]
    fn the_archive_has_the_first_process_and_the_modules() {
        let modules = [("00-a.ko".to_owned(), b"abc".to_vec()), ("01-b.ko.xz".to_owned(), Vec::new())];
        let found = read(&archive(b"program", &modules));
        let names: Vec<_> = found.iter().map(|(name, mode, _)| (name.as_str(), *mode)).collect();
        let expected = [
            ("dev", 0o040_755),
            ("modules", 0o040_755),
            ("dev/console", 0o020_600),
            ("init", 0o100_755),
            ("modules/00-a.ko", 0o100_644),
            ("modules/01-b.ko.xz", 0o100_644),
        ];
        assert_eq!(names, expected);
        assert_eq!((found[3].2.as_slice(), found[4].2.as_slice()), (&b"program"[..], &b"abc"[..]));
    }
}
