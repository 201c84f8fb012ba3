//! System calls of a thread that wait for another one's decision (`seccomp_unotify(2)`).

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};

use super::{Call, check};

/// Asks before each of certain system calls of the thread that made it (`seccomp_unotify(2)`).
#[derive(Debug)]
pub struct Supervisor {
    listener: OwnedFd,
}

impl Supervisor {
    /// From now on the calling thread, and the threads it starts, wait in each of these `calls` for [`decide`](Self::decide).
    ///
    /// # Errors
    /// The errors of `seccomp(2)`: `EBUSY` where the thread has a supervisor already.
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
        let listener = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
                &raw const program,
            )
        };
        if listener < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self { listener: unsafe { OwnedFd::from_raw_fd(listener as i32) } })
    }

    /// Waits for the next call, which goes on or fails with the errno of `decision`. `None`: the thread has ended.
    ///
    /// # Errors
    /// The errors of `poll(2)` and `ioctl(2)`.
    pub fn decide(&self, decision: impl FnOnce(Call) -> Option<i32>) -> io::Result<Option<()>> {
        let mut polled = [PollFd::new(&self.listener, PollFlags::IN)];
        poll(&mut polled, None)?;
        if !polled[0].revents().contains(PollFlags::IN) {
            return Ok(None);
        }
        let fd = self.listener.as_raw_fd();
        // SAFETY: integers only; the kernel demands zeroes.
        let mut notice: libc::seccomp_notif = unsafe { zeroed() };
        // SAFETY: the ioctl fills in this structure.
        check(unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut notice) })?;
        let call = Call { number: notice.data.nr.into(), arguments: notice.data.args };
        let mut answer = libc::seccomp_notif_resp { id: notice.id, val: 0, error: 0, flags: 0 };
        match decision(call) {
            Some(errno) => answer.error = -errno,
            None => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        }
        // SAFETY: the ioctl reads this structure.
        check(unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) })?;
        Ok(Some(()))
    }
}
