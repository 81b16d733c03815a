//! Decides about each connection of a guest that reaches the internet. QEMU makes the guest's connections, and Landlock
//! does not distinguish addresses. Therefore a seccomp filter stops QEMU in connect(2) and sendto(2) until the
//! supervisor has read the destination from QEMU's memory (seccomp_unotify(2), Linux 5.5).
//!
//! QEMU itself is trusted: it could replace the address after the decision. The filter does not stop sendmsg(2), which
//! libslirp does not use for the guest's packets.
//!
//! libslirp 4.7 corrupts its memory if connect(2) fails at once with ECONNREFUSED while packets wait, because the
//! kernel never does that for its sockets. A connection is therefore refused with EACCES.
//!
//! A process may open QEMU's memory if it is an ancestor of QEMU (`ptrace_scope` 1 of the kernel's Yama). A machine may
//! outlive its ancestor, which therefore opens the memory for a process that lives as long as QEMU (`vm supervise`).

use std::fs::File;
use std::io::{self, Error};
use std::mem::{offset_of, size_of};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};
use rustix::process::Pid;
use xtask_core::limits;

use crate::background;

/// The port of a name server.
const DNS: u16 = 53;
/// The file with the addresses of the name servers (resolv.conf(5)), to which QEMU sends the guest's questions.
const RESOLVER: &str = "/etc/resolv.conf";

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e; // AUDIT_ARCH_X86_64
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7; // AUDIT_ARCH_AARCH64

/// Installs the filter in this thread, and so in the processes that this thread starts. Returns the file descriptor of
/// the notifications, without which the stopped calls fail (ENOSYS).
///
/// # Errors
/// Returns an error if the kernel has no such filters, or if this process already runs under one.
pub(super) fn stop_connections() -> Result<OwnedFd> {
    rustix::thread::set_no_new_privs(true).context("renounce new privileges")?;
    let mut filter = filter()?;
    let program = libc::sock_fprog { len: filter.len().try_into()?, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which is valid during the call. The result is a new file descriptor.
    unsafe {
        let listener = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        );
        let listener = i32::try_from(listener)?;
        if listener < 0 {
            return Err(Error::last_os_error()).context("install a seccomp filter with notifications");
        }
        Ok(OwnedFd::from_raw_fd(listener))
    }
}

/// Returns the program of the filter (classic BPF, Linux, Documentation/userspace-api/seccomp_filter.rst).
fn filter() -> Result<Vec<libc::sock_filter>> {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    // The fifth argument of sendto(2) is the address. It is zero for a socket that is connected.
    let address = offset_of!(libc::seccomp_data, args) + 4 * size_of::<u64>();
    let step = |code: u32, k: u32, (jt, jf): (u8, u8)| -> Result<libc::sock_filter> {
        Ok(libc::sock_filter { code: code.try_into()?, jt, jf, k })
    };
    [
        step(LOAD, offset_of!(libc::seccomp_data, arch).try_into()?, (0, 0)),
        step(IF_EQUAL, ARCHITECTURE, (0, 7)),
        step(LOAD, offset_of!(libc::seccomp_data, nr).try_into()?, (0, 0)),
        step(IF_EQUAL, libc::SYS_connect.try_into()?, (6, 0)),
        step(IF_EQUAL, libc::SYS_sendto.try_into()?, (0, 4)),
        step(LOAD, address.try_into()?, (0, 0)),
        step(IF_EQUAL, 0, (0, 3)),
        step(LOAD, (address + size_of::<u32>()).try_into()?, (0, 0)),
        step(IF_EQUAL, 0, (0, 1)),
        step(RETURN, libc::SECCOMP_RET_ALLOW, (0, 0)),
        step(RETURN, libc::SECCOMP_RET_USER_NOTIF, (0, 0)),
    ]
    .into_iter()
    .collect()
}

/// The ioctls of the notifications (seccomp_unotify(2)).
const GROUP: u8 = b'!';
const RECEIVE: Opcode = opcode::read_write::<libc::seccomp_notif>(GROUP, 0);
const SEND: Opcode = opcode::read_write::<libc::seccomp_notif_resp>(GROUP, 1);
const IS_VALID: Opcode = opcode::write::<u64>(GROUP, 2);

/// The services that a guest may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Policy {
    /// The TCP ports of 127.0.0.1.
    pub(super) ports: Vec<u16>,
    /// True if the guest may use other hosts, and the name servers on this host's loopback.
    pub(super) others: bool,
}

impl Policy {
    fn allows(&self, destination: SocketAddr, call: Call) -> bool {
        let (ip, port) = (destination.ip().to_canonical(), destination.port());
        let is_own = call == Call::Connect && ip == Ipv4Addr::LOCALHOST && self.ports.contains(&port);
        let is_here = ip.is_loopback() || ip.is_unspecified();
        is_own || self.others && (!is_here || port == DNS && name_servers().contains(&ip))
    }
}

/// The call in which QEMU is stopped. QEMU sends each datagram with sendto(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Connect,
    SendTo,
}

/// Returns the addresses of the host's name servers.
fn name_servers() -> Vec<IpAddr> {
    let text = std::fs::read_to_string(RESOLVER).unwrap_or_default();
    parse_name_servers(&text).collect()
}

fn parse_name_servers(text: &str) -> impl Iterator<Item = IpAddr> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        words.next().filter(|word| *word == "nameserver").and(words.next())?.parse().ok()
    })
}

/// The file from which the memory of a stopped process is read.
enum Memory {
    /// The file in procfs of the process that is stopped: QEMU, or this process while libvirt starts QEMU.
    OfStopped,
    /// The file of this QEMU. Threads of libvirt in the process that has started QEMU can be stopped, too.
    OfQemu(Pid, File),
}

impl Memory {
    /// Reads the destination of the call. Returns `None` if it is no address of the internet protocols, or if the call
    /// is not QEMU's.
    fn destination(&self, notification: &libc::seccomp_notif) -> io::Result<Option<(SocketAddr, Call)>> {
        let [_, connect_address, connect_length, _, address, length] = notification.data.args;
        let (call, address, length) = if i64::from(notification.data.nr) == libc::SYS_connect {
            (Call::Connect, connect_address, connect_length)
        } else {
            (Call::SendTo, address, length)
        };
        let opened;
        let file = match self {
            Self::OfQemu(qemu, file) => {
                let thread = format!("/proc/{}/task/{}", qemu.as_raw_nonzero(), notification.pid);
                if !Path::new(&thread).exists() {
                    return Ok(None);
                }
                file
            }
            Self::OfStopped => {
                opened = File::open(format!("/proc/{}/mem", notification.pid))?;
                &opened
            }
        };
        let mut bytes = [0; size_of::<libc::sockaddr_in6>()];
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len());
        file.read_exact_at(&mut bytes[..length], address)?;
        Ok(parse(&bytes[..length]).map(|destination| (destination, call)))
    }
}

/// Parses an address as connect(2) takes it (ip(7), ipv6(7)).
fn parse(address: &[u8]) -> Option<SocketAddr> {
    let (family, rest) = address.split_first_chunk()?;
    let (port, rest) = rest.split_first_chunk()?;
    let port = u16::from_be_bytes(*port);
    match i32::from(u16::from_ne_bytes(*family)) {
        libc::AF_INET => Some((*rest.first_chunk::<4>()?, port).into()),
        // The flow information is in front of the address.
        libc::AF_INET6 => Some((*rest.get(4..)?.first_chunk::<16>()?, port).into()),
        _ => None,
    }
}

/// Answers one notification.
fn answer(listener: BorrowedFd<'_>, memory: &Memory, policy: &Policy) -> rustix::io::Result<()> {
    // SAFETY: the type is plain data, and the kernel requires zeroes.
    let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the opcode and the type belong together.
    unsafe { ioctl(listener, Updater::<RECEIVE, _>::new(&mut notification)) }?;
    let destination = memory.destination(&notification);
    // The thread may have ended meanwhile, and its id may belong to another process.
    // SAFETY: as above.
    unsafe { ioctl(listener, Setter::<IS_VALID, _>::new(notification.id)) }?;
    let is_allowed = match destination {
        Ok(destination) => destination.is_none_or(|(destination, call)| policy.allows(destination, call)),
        Err(_) => false,
    };
    let (error, flags) =
        if is_allowed { (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32) } else { (-libc::EACCES, 0) };
    let mut response = libc::seccomp_notif_resp { id: notification.id, val: 0, error, flags };
    // SAFETY: as above.
    unsafe { ioctl(listener, Updater::<SEND, _>::new(&mut response)) }?;
    Ok(())
}

/// Answers all notifications until `is_over`, or until the last process under the filter has ended.
fn serve(listener: BorrowedFd<'_>, memory: &Memory, policy: &Policy, is_over: Option<&AtomicBool>) {
    let pause = Timespec { tv_sec: 0, tv_nsec: limits::CHILD_POLL.subsec_nanos().into() };
    let pause = is_over.map(|_| &pause);
    while !is_over.is_some_and(|is_over| is_over.load(Ordering::Relaxed)) {
        let mut polled = [PollFd::from_borrowed_fd(listener, PollFlags::IN)];
        let waited = poll(&mut polled, pause);
        let events = polled[0].revents();
        if waited.is_err() || !events.contains(PollFlags::IN) {
            if events.intersects(PollFlags::HUP | PollFlags::ERR) {
                return;
            }
            continue;
        }
        // The descriptor is of another kind. After other errors, the stopped thread has ended or got a signal.
        if let Err(Errno::NOTTY | Errno::BADF | Errno::INVAL) = answer(listener, memory, policy) {
            return;
        }
    }
}

/// The supervisor of this process's threads and children while libvirt starts QEMU.
pub(super) struct Supervisor {
    listener: Arc<OwnedFd>,
    policy: Policy,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Supervisor {
    /// Starts to answer the notifications.
    pub(super) fn start(listener: OwnedFd, policy: Policy) -> Self {
        let listener = Arc::new(listener);
        let is_over = Arc::new(AtomicBool::new(false));
        let (of_thread, policy_of_thread, is_over_of_thread) =
            (Arc::clone(&listener), policy.clone(), Arc::clone(&is_over));
        let thread = std::thread::spawn(move || {
            serve(of_thread.as_fd(), &Memory::OfStopped, &policy_of_thread, Some(&is_over_of_thread));
        });
        Self { listener, policy, is_over, thread: Some(thread) }
    }

    /// Starts a process that answers the notifications of a QEMU until this QEMU ends.
    pub(super) fn hand_over(mut self, qemu: Pid) -> Result<()> {
        let path = format!("/proc/{}/mem", qemu.as_raw_nonzero());
        let memory = File::open(&path).with_context(|| format!("open QEMU's memory {path}"))?;
        self.end();
        let ports = self.policy.ports.iter().map(u16::to_string);
        let listener = self.listener.try_clone().context("duplicate the descriptor of the notifications")?;
        let mut command = Command::new("/proc/self/exe");
        command.args(["vm", "supervise", "--qemu", &qemu.as_raw_nonzero().to_string()]).args(ports);
        command.args(self.policy.others.then_some("--others"));
        command.stdin(Stdio::from(listener)).stdout(Stdio::from(memory));
        background::start(&mut command).context("start the supervisor of the machine's connections")
    }

    fn end(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the supervisor does not panic");
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.end();
    }
}

/// Runs `vm supervise`, the process that [`Supervisor::hand_over`] starts: its standard input is the descriptor of the
/// notifications, and its standard output is QEMU's memory. Ends with QEMU and with the process that has started QEMU.
pub(crate) fn run(qemu: i32, ports: &[u16], others: bool) -> Result<()> {
    background::detach()?;
    let qemu = Pid::from_raw(qemu).context("the pid of QEMU is 0")?;
    let memory = std::io::stdout().as_fd().try_clone_to_owned().context("take QEMU's memory")?;
    let policy = Policy { ports: ports.to_vec(), others };
    serve(std::io::stdin().as_fd(), &Memory::OfQemu(qemu, memory.into()), &policy, None);
    Ok(())
}

#[cfg(test)]
mod tests;
