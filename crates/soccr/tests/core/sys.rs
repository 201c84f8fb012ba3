//! The system calls that the tests need and no library wraps safely: the only `unsafe` here.
#![allow(unsafe_code)]

use std::io;
use std::mem::{MaybeUninit, size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// The funnel from −1 to errno.
fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Reads a socket option into `value`; returns how many bytes the kernel wrote.
pub fn get_option(fd: impl AsFd, level: i32, name: i32, value: &mut [u8]) -> io::Result<usize> {
    let mut length = value.len() as libc::socklen_t;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes, the size of `value`.
    check(unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast(), &mut length) }.into())?;
    Ok(length as usize)
}

/// Writes a socket option.
pub fn set_option(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let (fd, length) = (fd.as_fd().as_raw_fd(), value.len() as libc::socklen_t);
    // SAFETY: `value` is readable for `length` bytes.
    check(unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), length) }.into())?;
    Ok(())
}

/// Memory for a queue, as a program gives it that is not written in Rust.
pub struct Memory(pub Vec<u8>);

impl AsMut<[MaybeUninit<u8>]> for Memory {
    fn as_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: the same memory; the library writes bytes alone, none that is not initialized.
        unsafe { &mut *(&raw mut self.0[..] as *mut [MaybeUninit<u8>]) }
    }
}

/// Asks for the signals of a socket, and ignores them.
pub fn ask_for_signals(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    const F_SETSIG: i32 = 10;
    // SAFETY: the calls take numbers and touch no memory of ours.
    let results = unsafe {
        libc::signal(libc::SIGURG, libc::SIG_IGN);
        [
            libc::fcntl(fd, F_SETSIG, libc::SIGURG),
            libc::fcntl(fd, libc::F_SETOWN, libc::getpid()),
            libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC),
        ]
    };
    results.iter().try_for_each(|result| check(i64::from(*result)).map(drop))
}

/// Drops every segment that arrives for this socket, before the kernel has looked at it, or none.
pub fn set_deaf(fd: impl AsFd, deaf: bool) -> io::Result<()> {
    if !deaf {
        return set_option(fd, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0i32.to_ne_bytes());
    }
    let mut drop_all = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut drop_all };
    let length = size_of::<libc::sock_fprog>() as libc::socklen_t;
    let (fd, level, name) = (fd.as_fd().as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER);
    // SAFETY: `program` points to one instruction, and outlives the call, which copies it.
    let result = unsafe { libc::setsockopt(fd, level, name, (&raw const program).cast(), length) };
    check(result.into())?;
    Ok(())
}

/// A system call that a supervised thread is about to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub number: i64,
    pub args: [u64; 6],
}

/// Asks before each of certain system calls of the thread that made it (`seccomp_unotify(2)`).
#[derive(Debug)]
pub struct Supervisor {
    listener: OwnedFd,
}

impl Supervisor {
    /// From now on the calling thread, and the threads it starts, wait in each of these `calls` for [`Self::decide`].
    pub fn of_this_thread(calls: &[i64]) -> io::Result<Self> {
        rustix::thread::set_no_new_privs(true)?;
        let instruction = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        // The number of the call is the first word of `struct seccomp_data`.
        let mut program = vec![instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
        for call in calls {
            program.push(instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, *call as u32));
            program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_USER_NOTIF));
        }
        program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
        let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: `program` points to `len` instructions, which outlive the call.
        let listener = check(unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
                &raw const program,
            )
        })?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self { listener: unsafe { OwnedFd::from_raw_fd(listener as i32) } })
    }

    /// Waits for the next call, which goes on or fails with the errno of `decision`. `None`: the thread has ended.
    pub fn decide(&self, decision: impl FnOnce(Call) -> Option<i32>) -> io::Result<Option<()>> {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut polled = [PollFd::new(&self.listener, PollFlags::IN)];
        poll(&mut polled, None)?;
        if !polled[0].revents().contains(PollFlags::IN) {
            return Ok(None);
        }
        let fd = self.listener.as_raw_fd();
        // SAFETY: integers only; the kernel demands zeroes.
        let mut notice: libc::seccomp_notif = unsafe { zeroed() };
        // SAFETY: the ioctl fills in this structure.
        check(unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut notice) }.into())?;
        let call = Call { number: notice.data.nr.into(), args: notice.data.args };
        let mut answer = libc::seccomp_notif_resp { id: notice.id, val: 0, error: 0, flags: 0 };
        match decision(call) {
            Some(errno) => answer.error = -errno,
            None => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        }
        // SAFETY: the ioctl reads this structure.
        check(unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) }.into())?;
        Ok(Some(()))
    }
}
