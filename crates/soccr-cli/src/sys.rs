//! The system calls that no library wraps safely: the only place for `unsafe` in this crate.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::ioctl::{Getter, Opcode, ioctl};
use rustix::process::{Resource, Rlimit, setrlimit};

/// `struct tcp_info`, as long as the kernel makes it (`TCP_INFO`).
pub(crate) fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut info = vec![0; 512];
    let mut length = info.len() as libc::socklen_t;
    let (into, size) = (info.as_mut_ptr().cast(), &mut length);
    // SAFETY: the kernel writes at most `length` bytes into the buffer, which is as long, and says how many.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, into, size) };
    check(result.into())?;
    info.truncate(length as usize);
    Ok(info)
}

/// Sets an option of a socket that is an `int`.
pub(crate) fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    number: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let (from, length) = ((&raw const value).cast(), size_of_val(&value) as libc::socklen_t);
    // SAFETY: the kernel reads an int.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, number, from, length) };
    check(result.into())
}

/// Whether the next byte to be read is an urgent one (`SIOCATMARK`).
pub(crate) fn is_at_mark(socket: BorrowedFd<'_>) -> rustix::io::Result<bool> {
    const SIOCATMARK: Opcode = 0x8905;
    // SAFETY: the kernel writes an int.
    let answer = unsafe { ioctl(socket, Getter::<SIOCATMARK, libc::c_int>::new())? };
    Ok(answer != 0)
}

/// How much of what was sent waits at the other end of a UNIX socket, with what the kernel adds (`SIOCOUTQ`).
pub(crate) fn unread(socket: BorrowedFd<'_>) -> rustix::io::Result<libc::c_int> {
    const SIOCOUTQ: Opcode = libc::TIOCOUTQ as Opcode;
    // SAFETY: the kernel writes an int.
    unsafe { ioctl(socket, Getter::<SIOCOUTQ, libc::c_int>::new()) }
}

/// The time of day where this command runs, such as 15:04:31.
pub(crate) fn time_of_day(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs() as _;
    let mut parts = MaybeUninit::<libc::tm>::uninit();
    // SAFETY: both pointers are valid for the call; where it says that it has succeeded, the parts are written.
    match unsafe { libc::localtime_r(&seconds, parts.as_mut_ptr()).as_ref() } {
        Some(tm) => format!("{:02}:{:02}:{:02}", tm.tm_hour, tm.tm_min, tm.tm_sec),
        None => format!("{seconds} s after 1970"),
    }
}

/// Gives descriptors the numbers from `first` on, where the program expects them; none of them may have such a number yet. Call
/// it right before the program is executed.
pub(crate) fn place(fds: &[impl AsRawFd], first: RawFd) -> io::Result<()> {
    // SAFETY: this thread gets numbers of its own, so that other threads, which may still use or close whatever had the
    // numbers in question, are not concerned; the caller uses none of them any longer.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FILES) }?;
    for (fd, number) in fds.iter().zip(first..) {
        // SAFETY: as above.
        check(unsafe { libc::dup2(fd.as_raw_fd(), number) }.into())?;
    }
    Ok(())
}

/// A socket that the program that started this one left open for it under this number.
pub(crate) fn inherited_socket(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: the borrow ends with this call, and does nothing where the number is not in use.
    let fd = unsafe { BorrowedFd::borrow_raw(Some(number).filter(|number| *number > 2)?) };
    rustix::net::sockopt::socket_domain(fd).ok()?;
    // A duplicate, so that it does not matter whether anything else of this program uses the number.
    let socket = rustix::io::fcntl_dupfd_cloexec(fd, 3).ok()?;
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).ok()?;
    Some(socket)
}

/// Sets the limit on descriptors for a program just before it is executed: descriptors that are open already stay.
pub(crate) fn limit_descriptors(command: &mut Command, limit: Rlimit) {
    // SAFETY: between fork and exec it makes one system call, and allocates nothing.
    unsafe { command.pre_exec(move || Ok(setrlimit(Resource::Nofile, limit)?)) };
}

/// Signals by which people and service managers end a process.
pub(crate) const ENDING: [libc::c_int; 3] = [libc::SIGHUP, libc::SIGINT, libc::SIGTERM];

/// Signals by which a terminal ends or stops all programs of a command line.
pub(crate) const TERMINAL: [libc::c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP];

/// Signals by which a terminal stops a process.
pub(crate) const STOPPING: [libc::c_int; 3] = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];

/// What a signal does: the default, nothing, or the address of a handler.
pub(crate) type Disposition = libc::sighandler_t;

/// Ignores a signal from now on; returns what it did before.
pub(crate) fn ignore(signal: libc::c_int) -> Disposition {
    // SAFETY: no handler is installed.
    unsafe { libc::signal(signal, libc::SIG_IGN) }
}

/// The descriptor that [`catch`] writes to.
static BELL: AtomicI32 = AtomicI32::new(-1);

extern "C" fn ring(_: libc::c_int) {
    // SAFETY: write(2) may be called by a signal handler, which must leave errno as it was.
    unsafe {
        let errno = *libc::__errno_location();
        libc::write(BELL.load(Ordering::Relaxed), b"!".as_ptr().cast(), 1);
        *libc::__errno_location() = errno;
    }
}

/// Makes a signal write a byte to this descriptor from now on, unless it is ignored; returns what it did before.
pub(crate) fn catch(signal: libc::c_int, bell: BorrowedFd<'_>) -> Disposition {
    BELL.store(bell.as_raw_fd(), Ordering::Relaxed);
    // SAFETY: the handler makes one system call that signal handlers may make.
    let before = unsafe { libc::signal(signal, ring as extern "C" fn(libc::c_int) as Disposition) };
    if before == libc::SIG_IGN {
        ignore(signal);
    }
    before
}

/// What a signal does.
pub(crate) fn disposition(signal: libc::c_int) -> Disposition {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: nothing is changed, and the kernel writes one structure. Zeroes are a valid one.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction
    }
}

/// Sets what signals do to a program just before it is executed.
pub(crate) fn set_signals(command: &mut Command, dispositions: Vec<(libc::c_int, Disposition)>) {
    let set = move || {
        dispositions.iter().for_each(|(signal, disposition)| heed(*signal, *disposition));
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls, and allocates nothing.
    unsafe { command.pre_exec(set) };
}

/// The child that ends with this process, or 0.
static CHILD: AtomicI32 = AtomicI32::new(0);

extern "C" fn end_both(signal: libc::c_int) {
    // SAFETY: all three may be called by a signal handler. The signal is blocked until it returns; then it ends this process.
    unsafe {
        if let child @ 1.. = CHILD.load(Ordering::Relaxed) {
            libc::kill(child, libc::SIGTERM);
        }
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Starts a child. From then on a signal that ends this process also ends the child, by SIGTERM.
pub(crate) fn spawn_to_end_with_us(command: &mut Command) -> io::Result<Child> {
    let (mut ending, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: the set is initialized before it is read, and the kernel writes the other one.
    let before: libc::sigset_t = unsafe {
        libc::sigemptyset(ending.as_mut_ptr());
        for signal in ENDING {
            libc::sigaddset(ending.as_mut_ptr(), signal);
        }
        // A signal that comes meanwhile waits until it can end both.
        libc::pthread_sigmask(libc::SIG_BLOCK, ending.as_ptr(), before.as_mut_ptr());
        before.assume_init()
    };
    let restore = move || {
        // SAFETY: the set is a copy of the one that was in force.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
        Ok(())
    };
    // SAFETY: between fork and exec it makes one system call, and allocates nothing.
    unsafe { command.pre_exec(restore) };
    let spawned = command.spawn();
    if let Ok(child) = &spawned {
        CHILD.store(child.id() as i32, Ordering::Relaxed);
        let handler = end_both as extern "C" fn(libc::c_int) as Disposition;
        let heeded = ENDING.into_iter().filter(|signal| disposition(*signal) == libc::SIG_DFL);
        heeded.for_each(|signal| heed(signal, handler));
    }
    restore()?;
    spawned
}

/// The child may have ended: its number may be another process's soon.
pub(crate) fn end_alone() {
    CHILD.store(0, Ordering::Relaxed);
}

/// Restores what a signal did before.
pub(crate) fn heed(signal: libc::c_int, before: Disposition) {
    // SAFETY: the disposition is one that the signal had.
    unsafe { libc::signal(signal, before) };
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
