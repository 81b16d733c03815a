//! `packed`: an executable that UPX has compressed. What runs on the device is inside, and no check sees it.

use super::protections::hardened;
use crate::Target;
use crate::elf::Elf;
use crate::finding::Finding;

/// Returns the finding for a packed executable. UPX writes no section headers, and its signature follows the program
/// headers after four bytes (UPX, src/conf.h: UPX_MAGIC_LE32, l_info). The stub at the start unpacks the program into
/// memory that is first writable and then executable.
pub(super) fn check(elf: &Elf<'_>, target: &Target<'_>) -> Option<Finding> {
    const SIGNATURE: &[u8] = b"UPX!";
    /// The bytes after the program headers in which the signature is looked for.
    const NEAR: usize = 64;
    let (segments, sections) = elf.counts();
    let end = 64 + segments * 56;
    let after = elf.data.get(end..elf.data.len().min(end + NEAR))?;
    let is_packed = sections == 0 && memchr::memmem::find(after, SIGNATURE).is_some();
    is_packed.then(|| {
        let found = "UPX has packed it: its libraries, its instructions and its allocator were not seen";
        let (certain, offers) = hardened(target);
        let remedy = "inspect the unpacked executable (upx -d), and deliver that one to hardened services";
        Finding::refused_if(certain, "packed", found, &offers, remedy)
    })
}
