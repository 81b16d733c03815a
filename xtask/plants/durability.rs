//! The library of the planted faults in which the agent's state file is written wrongly. The loader puts it before the C
//! library (LD_PRELOAD), so that it gets the agent's calls of open(2), fsync(2) and rename(2). Calls for other files pass
//! unchanged. It is one file and uses only core and the C library. Therefore `rustc` makes a small library of it without
//! any crate.
//!
//! `IOT_PLANT` names the fault, and `IOT_PLANT_STATE` is the path of the state file. The agent writes its state to a file
//! with the extension `new`, syncs it, renames it to this path and syncs the directory.

#![no_std]

use core::ffi::{CStr, c_char, c_int, c_uint, c_void};
use core::mem::transmute;

/// The handle with which dlsym(3) searches the libraries after this one (RTLD_NEXT).
const NEXT: *mut c_void = -1_isize as *mut c_void;
/// The longest path of Linux, with its final zero (PATH_MAX).
const LONGEST: usize = 4096;

#[link(name = "c")]
unsafe extern "C" {
    fn abort() -> !;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn getenv(name: *const c_char) -> *const c_char;
    fn readlink(path: *const c_char, buffer: *mut u8, size: usize) -> isize;
}

type Open = unsafe extern "C" fn(*const c_char, c_int, c_uint) -> c_int;
type Rename = unsafe extern "C" fn(*const c_char, *const c_char) -> c_int;
type Sync = unsafe extern "C" fn(c_int) -> c_int;

/// The values of `IOT_PLANT`.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    StateWithoutSync,
    DirectoryWithoutSync,
    RenamedBeforeWritten,
    TruncatedInPlace,
}

struct Plant {
    fault: Fault,
    /// The path of the state file.
    state: &'static CStr,
}

impl Plant {
    fn read() -> Option<Self> {
        let fault = match variable(c"IOT_PLANT")?.to_bytes() {
            b"state-without-sync" => Fault::StateWithoutSync,
            b"directory-without-sync" => Fault::DirectoryWithoutSync,
            b"renamed-before-written" => Fault::RenamedBeforeWritten,
            b"truncated-in-place" => Fault::TruncatedInPlace,
            _ => return None,
        };
        Some(Self { fault, state: variable(c"IOT_PLANT_STATE")? })
    }

    /// Returns whether `path` is that of the file beside the state, for a fault that writes no file beside it.
    fn replaces(&self, path: *const c_char) -> bool {
        // SAFETY: the caller of open(2) or rename(2) passes a string.
        let path = unsafe { CStr::from_ptr(path) }.to_bytes();
        matches!(self.fault, Fault::RenamedBeforeWritten | Fault::TruncatedInPlace)
            && path.strip_suffix(b".new") == Some(self.state.to_bytes())
    }

    /// Returns whether the sync of this file must do nothing.
    fn omits_sync(&self, path: &[u8]) -> bool {
        let Some(rest) = path.strip_prefix(self.state.to_bytes()) else {
            let directory = self.state.to_bytes().rsplitn(2, |byte| *byte == b'/').nth(1);
            return self.fault == Fault::DirectoryWithoutSync && directory == Some(path);
        };
        self.fault == Fault::StateWithoutSync && !rest.contains(&b'/')
    }
}

fn variable(name: &CStr) -> Option<&'static CStr> {
    // SAFETY: the agent does not change its environment.
    unsafe {
        let value = getenv(name.as_ptr());
        (!value.is_null()).then(|| CStr::from_ptr(value))
    }
}

/// Writes the path of an open file to `buffer`, and returns it.
fn path_of(file: c_int, buffer: &mut [u8; LONGEST]) -> &[u8] {
    let mut link = *b"/proc/self/fd/\0\0\0\0\0\0\0\0\0\0\0";
    let (mut digits, mut rest) = ([0; 10], file.unsigned_abs());
    let mut count = 0;
    while count == 0 || rest > 0 {
        digits[count] = b'0' + (rest % 10) as u8;
        (count, rest) = (count + 1, rest / 10);
    }
    for (at, digit) in digits[..count].iter().rev().enumerate() {
        link[b"/proc/self/fd/".len() + at] = *digit;
    }
    // SAFETY: the link ends with a zero, and the size is that of the buffer.
    let length = unsafe { readlink(link.as_ptr().cast(), buffer.as_mut_ptr(), LONGEST) };
    &buffer[..usize::try_from(length).unwrap_or(0)]
}

/// Returns the function of this name in the libraries after this one.
fn next(name: &CStr) -> *mut c_void {
    // SAFETY: the name is a string. The C library has each function that this library replaces.
    unsafe { dlsym(NEXT, name.as_ptr()) }
}

/// open(2) of a program for large files. In the C library, the last argument is variadic, and is passed in the same way.
#[unsafe(no_mangle)]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    // SAFETY: the functions have these types, and the arguments are the caller's.
    unsafe {
        let open = transmute::<*mut c_void, Open>(next(c"open64"));
        let Some(plant) = Plant::read().filter(|plant| plant.replaces(path)) else {
            return open(path, flags, mode);
        };
        let in_place = plant.fault == Fault::TruncatedInPlace;
        let file = open(if in_place { plant.state.as_ptr() } else { path }, flags, mode);
        if file >= 0 {
            if !in_place {
                transmute::<*mut c_void, Rename>(next(c"rename"))(path, plant.state.as_ptr());
            }
            // Any other process may sync the file system at this moment. This sync makes the moment a certain one.
            transmute::<*mut c_void, Sync>(next(c"fsync"))(file);
        }
        file
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    if Plant::read().is_some_and(|plant| plant.replaces(from)) {
        return 0;
    }
    // SAFETY: the function has this type, and the arguments are the caller's.
    unsafe { transmute::<*mut c_void, Rename>(next(c"rename"))(from, to) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fsync(file: c_int) -> c_int {
    // SAFETY: the function has this type, and the argument is the caller's.
    omitted(file).unwrap_or_else(|| unsafe { transmute::<*mut c_void, Sync>(next(c"fsync"))(file) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fdatasync(file: c_int) -> c_int {
    // SAFETY: the function has this type, and the argument is the caller's.
    omitted(file).unwrap_or_else(|| unsafe { transmute::<*mut c_void, Sync>(next(c"fdatasync"))(file) })
}

/// Returns the result of a sync that must do nothing.
fn omitted(file: c_int) -> Option<c_int> {
    let plant = Plant::read()?;
    plant.omits_sync(path_of(file, &mut [0; LONGEST])).then_some(0)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: abort(3) has no preconditions.
    unsafe { abort() }
}
