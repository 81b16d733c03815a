//! The workload of the planted fault `small-pages`: the same program with an allocator that was compiled for pages of
//! 4 KiB. Like jemalloc, this allocator ends the process at the first allocation if the kernel's pages are larger.

#[path = "main.rs"]
mod workload;

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{c_int, c_ulong};
use std::io;

/// The size of a page in bytes for which the allocator is compiled.
const PAGE: c_ulong = 4096;
/// The message by which `inspect` and people recognise jemalloc (src/pages.c, `pages_boot`).
const COMPLAINT: &[u8] = b"<jemalloc>: Unsupported system page size\n";
/// The number of the page size among glibc's settings (bits/confname.h).
const SC_PAGESIZE: c_int = 30;
const STDERR: c_int = 2;

unsafe extern "C" {
    /// POSIX declares the result as signed. jemalloc compares it as an unsigned number.
    fn sysconf(name: c_int) -> c_ulong;
    fn write(file: c_int, bytes: *const u8, count: usize) -> isize;
    fn abort() -> !;
}

struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

// SAFETY: the system's allocator gets every request as it is.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check_pages();
        // SAFETY: the caller's promises are those that the system's allocator wants.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block is of the system's allocator, and the layout is that of its allocation.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Ends the process if the kernel's pages are larger than [`PAGE`]. The function allocates nothing.
#[inline(never)]
fn check_pages() {
    // SAFETY: sysconf(3) has no preconditions, the pointer and the length are those of a constant, and abort(3) does not
    // return.
    unsafe {
        if sysconf(SC_PAGESIZE) > PAGE {
            write(STDERR, COMPLAINT.as_ptr(), COMPLAINT.len());
            abort();
        }
    }
}

fn main() -> io::Result<()> {
    workload::main()
}
