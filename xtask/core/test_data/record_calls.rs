//! A library that prints the calls with which a program replaces files, and the sizes of the files at that time. A test
//! preloads it after a planted library, and so sees the calls that reach the C library.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::transmute;

const NEXT: *mut c_void = -1_isize as *mut c_void;
const O_CREAT: c_int = 0o100;

unsafe extern "C" {
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// Returns the last part of a path.
fn name(path: *const c_char) -> String {
    let path = unsafe { CStr::from_ptr(path) }.to_string_lossy().into_owned();
    path.rsplit('/').next().unwrap_or_default().to_owned()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    if flags & O_CREAT != 0 {
        eprintln!("open {}", name(path));
    }
    type Open = unsafe extern "C" fn(*const c_char, c_int, c_uint) -> c_int;
    unsafe { transmute::<*mut c_void, Open>(dlsym(NEXT, c"open64".as_ptr()))(path, flags, mode) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    eprintln!("rename {} {}", name(from), name(to));
    type Rename = unsafe extern "C" fn(*const c_char, *const c_char) -> c_int;
    unsafe { transmute::<*mut c_void, Rename>(dlsym(NEXT, c"rename".as_ptr()))(from, to) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fsync(file: c_int) -> c_int {
    let path = std::fs::read_link(format!("/proc/self/fd/{file}")).unwrap();
    let name = path.file_name().unwrap().display();
    match std::fs::metadata(&path).unwrap() {
        entry if entry.is_dir() => eprintln!("sync the directory"),
        entry => eprintln!("sync {name} of {} bytes", entry.len()),
    }
    type Sync = unsafe extern "C" fn(c_int) -> c_int;
    unsafe { transmute::<*mut c_void, Sync>(dlsym(NEXT, c"fsync".as_ptr()))(file) }
}
