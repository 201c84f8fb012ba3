//! The system calls that are made to fail, and how each of them can.

use libc::{
    EACCES, EADDRINUSE, EADDRNOTAVAIL, EAGAIN, ECANCELED, EINTR, EINVAL, EIO, EMFILE, ENFILE, ENOBUFS,
    ENOENT, ENOMEM, ENOSPC, ENOTCONN, EOPNOTSUPP, EPERM,
};
use soccr_lab::{Call, Entry};

/// Its number, its name, and errors that the kernel has for it.
const FALLIBLE: &[(i64, &str, &[i32])] = &[
    (libc::SYS_read, "read", &[EIO, EINTR]),
    (libc::SYS_write, "write", &[EIO, EINTR, ENOSPC]),
    (libc::SYS_writev, "writev", &[EIO, EINTR, ENOSPC]),
    (libc::SYS_pwritev2, "pwritev2", &[EIO, EINTR, EAGAIN, EOPNOTSUPP]),
    (libc::SYS_open, "open", &[EMFILE, EACCES, EIO]),
    (libc::SYS_openat, "openat", &[EMFILE, ENOMEM, EIO]),
    (libc::SYS_fstat, "fstat", &[ENOMEM]),
    (libc::SYS_newfstatat, "newfstatat", &[ENOMEM, EACCES]),
    (libc::SYS_statx, "statx", &[ENOMEM, EACCES]),
    (libc::SYS_access, "access", &[EIO]),
    (libc::SYS_faccessat, "faccessat", &[EIO]),
    (libc::SYS_lseek, "lseek", &[EIO]),
    (libc::SYS_ftruncate, "ftruncate", &[EIO]),
    (libc::SYS_fsync, "fsync", &[EIO, ENOSPC, EINTR]),
    (libc::SYS_fdatasync, "fdatasync", &[EIO, ENOSPC]),
    (libc::SYS_rename, "rename", &[EIO, ENOSPC]),
    (libc::SYS_renameat2, "renameat2", &[EIO, ENOSPC, EINVAL]),
    (libc::SYS_unlink, "unlink", &[EIO, EPERM]),
    (libc::SYS_fchmod, "fchmod", &[EPERM]),
    (libc::SYS_getdents64, "getdents64", &[ENOMEM]),
    (libc::SYS_readlink, "readlink", &[ENOMEM]),
    (libc::SYS_readlinkat, "readlinkat", &[ENOMEM, EACCES]),
    (libc::SYS_getcwd, "getcwd", &[ENOENT]),
    (libc::SYS_fcntl, "fcntl", &[EMFILE, ENOMEM]),
    (libc::SYS_dup, "dup", &[EMFILE]),
    (libc::SYS_dup2, "dup2", &[EMFILE]),
    (libc::SYS_dup3, "dup3", &[EMFILE]),
    (libc::SYS_pipe2, "pipe2", &[EMFILE, ENFILE]),
    (libc::SYS_memfd_create, "memfd_create", &[EMFILE, ENOMEM]),
    (libc::SYS_poll, "poll", &[ENOMEM, EINTR]),
    (libc::SYS_ppoll, "ppoll", &[ENOMEM, EINTR]),
    (libc::SYS_timerfd_create, "timerfd_create", &[EMFILE]),
    (libc::SYS_timerfd_settime, "timerfd_settime", &[ECANCELED]),
    (libc::SYS_ioctl, "ioctl", &[ENOMEM, EPERM]),
    (libc::SYS_socket, "socket", &[EMFILE, ENOBUFS, EACCES]),
    (libc::SYS_socketpair, "socketpair", &[EMFILE, ENFILE]),
    (libc::SYS_bind, "bind", &[ENOMEM, EADDRINUSE]),
    (libc::SYS_connect, "connect", &[ENOMEM, EADDRNOTAVAIL]),
    (libc::SYS_listen, "listen", &[EADDRINUSE]),
    (libc::SYS_accept4, "accept4", &[EMFILE, EINTR, ENOBUFS]),
    (libc::SYS_shutdown, "shutdown", &[ENOTCONN]),
    (libc::SYS_getsockname, "getsockname", &[ENOBUFS]),
    (libc::SYS_getpeername, "getpeername", &[ENOBUFS]),
    (libc::SYS_getsockopt, "getsockopt", &[ENOMEM, ENOBUFS, EPERM]),
    (libc::SYS_setsockopt, "setsockopt", &[ENOMEM, EPERM, ENOBUFS]),
    (libc::SYS_sendto, "sendto", &[ENOBUFS, ENOMEM, EINTR, EPERM]),
    (libc::SYS_sendmsg, "sendmsg", &[ENOBUFS, ENOMEM, EINTR]),
    (libc::SYS_recvfrom, "recvfrom", &[ENOMEM, ENOBUFS, EINTR]),
    (libc::SYS_recvmsg, "recvmsg", &[ENOMEM, ENOBUFS, EINTR]),
    (libc::SYS_fork, "fork", &[EAGAIN, ENOMEM]),
    (libc::SYS_vfork, "vfork", &[EAGAIN, ENOMEM]),
    (libc::SYS_clone, "clone", &[EAGAIN, ENOMEM]),
    (libc::SYS_clone3, "clone3", &[EAGAIN, ENOMEM]),
    (libc::SYS_execve, "execve", &[ENOMEM, EACCES, EIO]),
    (libc::SYS_wait4, "wait4", &[EINTR]),
    (libc::SYS_waitid, "waitid", &[EINTR]),
    (libc::SYS_ptrace, "ptrace", &[EPERM, EIO]),
    (libc::SYS_pidfd_open, "pidfd_open", &[EMFILE, ENOMEM]),
    (libc::SYS_pidfd_getfd, "pidfd_getfd", &[EMFILE, EPERM]),
    (libc::SYS_pidfd_send_signal, "pidfd_send_signal", &[EPERM]),
    (libc::SYS_setns, "setns", &[EPERM, ENOMEM]),
    (libc::SYS_unshare, "unshare", &[EPERM, ENOMEM]),
    (libc::SYS_setsid, "setsid", &[EPERM]),
    (libc::SYS_prctl, "prctl", &[EPERM]),
    (libc::SYS_prlimit64, "prlimit64", &[EPERM]),
    (libc::SYS_bpf, "bpf", &[EPERM, ENOMEM]),
];

/// The calls that a signal may interrupt. Whoever makes them makes them again.
const INTERRUPTIBLE: [i64; 14] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwritev2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_fsync,
];

pub fn is_interruptible(call: &Call) -> bool {
    INTERRUPTIBLE.contains(&call.number)
}

/// The name of a call that can fail, and its errors.
fn fallible(number: i64) -> Option<(&'static str, &'static [i32])> {
    FALLIBLE.iter().find(|(of, ..)| *of == number).map(|(_, name, errnos)| (*name, *errnos))
}

/// Where in a command a call is: calls of one site differ in little.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    lineage: Vec<usize>,
    number: i64,
    /// What tells apart what is done, such as the option that is set.
    what: [u64; 2],
}

impl Site {
    /// `None` where it cannot fail.
    pub fn of(entry: &Entry<'_>) -> Option<Self> {
        let number = entry.call.number;
        let arguments = entry.call.arguments;
        fallible(number)?;
        if number == libc::SYS_prlimit64 && arguments[2] == 0 {
            // To ask for a limit of one's own always works.
            return None;
        }
        let what = match number {
            libc::SYS_getsockopt | libc::SYS_setsockopt => [arguments[1], arguments[2]],
            libc::SYS_ioctl | libc::SYS_fcntl => [arguments[1], 0],
            libc::SYS_ptrace | libc::SYS_prctl | libc::SYS_bpf => [arguments[0], 0],
            libc::SYS_socket => [arguments[0], arguments[2]],
            libc::SYS_read | libc::SYS_write | libc::SYS_fsync => [arguments[0], 0],
            _ => [0; 2],
        };
        Some(Self { lineage: entry.lineage.to_vec(), number, what })
    }

    /// The errors of this call.
    pub fn errnos(&self) -> &'static [i32] {
        fallible(self.number).expect("it can fail").1
    }

    /// It says something on standard error.
    pub fn is_message(&self) -> bool {
        self.number == libc::SYS_write && self.what[0] == 2
    }
}

impl std::fmt::Display for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let who = match self.lineage[..] {
            [] => "command",
            [0] => "first child",
            [1] => "second child",
            [1, 0] => "its child",
            _ => "another process",
        };
        let name = fallible(self.number).expect("it can fail").0;
        write!(f, "{name}({}, {}) of the {who}", self.what[0], self.what[1])
    }
}
