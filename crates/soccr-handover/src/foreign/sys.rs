//! The system calls that no library wraps safely: the only place for `unsafe` in this crate.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Pid;

/// The network namespace of a socket (`SIOCGSKNS`).
pub(crate) fn namespace_of_socket(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const SIOCGSKNS: libc::Ioctl = 0x894c;
    descriptor_by_ioctl(socket, SIOCGSKNS)
}

/// The user namespace that owns a namespace (`NS_GET_USERNS`).
pub(crate) fn owner_of_namespace(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    descriptor_by_ioctl(namespace, NS_GET_USERNS)
}

fn descriptor_by_ioctl(fd: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<OwnedFd> {
    // SAFETY: neither of the two ioctls takes an argument.
    let new = unsafe { libc::ioctl(fd.as_raw_fd(), request) };
    if new < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// `fork(2)`, for a process of one thread: `None` in the child.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    let threads = std::fs::read_dir("/proc/self/task")?.collect::<io::Result<Vec<_>>>()?;
    if threads.len() > 1 {
        return Err(io::Error::other("this process has started threads already"));
    }
    // SAFETY: with a single thread, nobody holds a lock that would stay locked in the child.
    let pid = unsafe { libc::fork() };
    check(pid.into())?;
    Ok(Pid::from_raw(pid))
}

/// Ignores a signal from now on.
pub(crate) fn ignore(signal: libc::c_int) {
    // SAFETY: no handler is installed.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// `PTRACE_SEIZE`: this thread becomes the tracer of a thread, which goes on running.
pub(crate) fn seize(thread: Pid) -> io::Result<()> {
    ptrace(libc::PTRACE_SEIZE, thread, 0)
}

/// `PTRACE_INTERRUPT`: the thread stops soon.
pub(crate) fn interrupt(thread: Pid) -> io::Result<()> {
    ptrace(libc::PTRACE_INTERRUPT, thread, 0)
}

/// `PTRACE_DETACH`: a stopped thread goes on, and gets the signal, if not 0.
pub(crate) fn detach(thread: Pid, signal: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_DETACH, thread, signal)
}

/// The C libraries do not agree on the sign of a request.
#[cfg(target_env = "musl")]
type Request = libc::c_int;
#[cfg(not(target_env = "musl"))]
type Request = libc::c_uint;

fn ptrace(request: Request, thread: Pid, data: i32) -> io::Result<()> {
    let (address, data) = (std::ptr::null_mut::<libc::c_void>(), data as usize as *mut libc::c_void);
    // SAFETY: none of the three requests reads or writes memory of this process.
    check(unsafe { libc::ptrace(request, thread.as_raw_pid(), address, data) })
}

/// The system calls that fail with EINTR when their thread is stopped, though no signal has arrived (see signal(7)). close(2) is
/// not among them: it cannot be made twice.
#[cfg(target_arch = "x86_64")]
const INTERRUPTED: [libc::c_long; 21] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_io_uring_enter,
    libc::SYS_io_getevents,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    // With SO_RCVTIMEO or SO_SNDTIMEO.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
];

/// Where the stop made the system call of a thread fail with EINTR, the kernel makes the call again when the thread goes on
/// (`ERESTARTNOHAND`), unless a signal handler runs first. Its time limit begins anew.
#[cfg(target_arch = "x86_64")]
pub(crate) fn make_call_again(thread: Pid) -> io::Result<()> {
    const ERESTARTNOHAND: i64 = 514;
    let thread = thread.as_raw_pid();
    let (address, mut registers) =
        (std::ptr::null_mut::<libc::c_void>(), std::mem::MaybeUninit::<libc::user_regs_struct>::uninit());
    // SAFETY: the kernel writes this structure.
    check(unsafe { libc::ptrace(libc::PTRACE_GETREGS, thread, address, registers.as_mut_ptr()) })?;
    // SAFETY: it is written; any bits are a value of it.
    let mut registers = unsafe { registers.assume_init() };
    let failed = registers.rax as i64 == -i64::from(libc::EINTR);
    if !failed || !INTERRUPTED.contains(&(registers.orig_rax as libc::c_long)) {
        return Ok(());
    }
    registers.rax = -ERESTARTNOHAND as u64;
    // SAFETY: the kernel reads this structure.
    check(unsafe { libc::ptrace(libc::PTRACE_SETREGS, thread, address, &raw const registers) })
}

/// Other architectures do not show what would be needed.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn make_call_again(_: Pid) -> io::Result<()> {
    Ok(())
}

/// The status of a traced thread that has changed since it was asked for last.
pub(crate) fn status(thread: Pid) -> io::Result<Option<i32>> {
    let mut status = 0;
    // SAFETY: the kernel writes one int.
    let result = unsafe { libc::waitpid(thread.as_raw_pid(), &mut status, libc::__WALL | libc::WNOHANG) };
    check(result.into())?;
    Ok((result != 0).then_some(status))
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
