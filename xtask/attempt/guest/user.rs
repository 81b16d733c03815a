//! The user of a container: changes the process that becomes the program to a user and its groups.

use std::ffi::{c_int, c_long, c_ulong, c_void};
use std::io;

use crate::wire::User;

/// prctl(2).
const PR_SET_KEEPCAPS: c_int = 8;
const PR_CAP_AMBIENT: c_int = 47;
const PR_CAP_AMBIENT_RAISE: c_ulong = 2;
/// capabilities(7): CAP_DAC_OVERRIDE and CAP_FOWNER. The files of a container lose their owners when its archive is
/// unpacked, so its user could neither write to its own files nor change their permissions.
const KEPT: [c_ulong; 2] = [1, 3];
/// capset(2): the structure for 64 capabilities, and the number of the system call.
const VERSION_3: u32 = 0x2008_0522;
#[cfg(target_arch = "aarch64")]
const SYS_CAPSET: c_long = 91;
#[cfg(target_arch = "x86_64")]
const SYS_CAPSET: c_long = 126;

unsafe extern "C" {
    fn prctl(operation: c_int, ...) -> c_int;
    fn setgroups(count: usize, groups: *const u32) -> c_int;
    fn setgid(group: u32) -> c_int;
    fn setuid(user: u32) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

/// Changes this process to a user. This makes system calls only, so it may run between fork and exec.
pub(crate) fn become_user(user: &User) -> io::Result<()> {
    let nothing: c_ulong = 0;
    // SAFETY: the groups live until the call returns; the other calls have no pointer.
    unsafe {
        check(prctl(PR_SET_KEEPCAPS, 1 as c_ulong, nothing, nothing, nothing))?;
        check(setgroups(user.groups.len(), user.groups.as_ptr()))?;
        check(setgid(user.group))?;
        check(setuid(user.id))?;
    }
    if user.id == 0 {
        return Ok(());
    }
    let mask = KEPT.iter().fold(0, |mask, bit| mask | 1_u32 << bit);
    // The effective, the permitted and the inheritable capabilities; first 0 to 31, then 32 to 63.
    let (header, data) = ([VERSION_3, 0], [mask, mask, mask, 0, 0, 0]);
    // SAFETY: both structures have the layout of capset(2), and live until the call returns.
    let result =
        unsafe { syscall(SYS_CAPSET, header.as_ptr().cast::<c_void>(), data.as_ptr().cast::<c_void>()) };
    check(result as c_int)?;
    for bit in KEPT {
        // SAFETY: the call has no pointer.
        check(unsafe { prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, bit, nothing, nothing) })?;
    }
    Ok(())
}

fn check(result: c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
