//! What went wrong: at which step, with which option, with which errno, and what to do about it.

use std::borrow::Cow;
use std::{fmt, io};

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a connection could not be paused, saved, restored, resumed or locked.
///
/// It prints as one line: `pause: TCP_REPAIR: EPERM — needs CAP_NET_ADMIN in …`.
#[derive(Debug)]
pub struct Error {
    step: &'static str,
    what: Cow<'static, str>,
    kind: Kind,
    remedy: Cow<'static, str>,
}

#[derive(Debug)]
enum Kind {
    Refused,
    /// Refused, and trying once more may help.
    Changed,
    Invalid,
    System(io::Error),
}

/// What an [`Error`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// It cannot be done with this connection, or did not come out as it should; the text says which. What was saved
    /// goes on, what was half restored is silent.
    Refused,
    /// The connection changed while it was looked at, and goes on: its traffic was not locked, or another process used it.
    Changed,
    /// The values given contradict each other.
    Invalid,
    /// The kernel refused: see [`Error::errno`].
    System,
}

impl Error {
    /// The kernel refused `what`, an option or a system call.
    pub(crate) fn system(what: impl Into<Cow<'static, str>>, error: impl Into<io::Error>) -> Self {
        let (what, error) = (what.into(), error.into());
        let remedy = remedy(&what, error.raw_os_error().unwrap_or(0));
        Self { step: "", what, kind: Kind::System(error), remedy: remedy.into() }
    }

    /// This process, not the kernel, has no memory for a queue.
    pub(crate) fn out_of_memory() -> Self {
        Self::system(OUR_MEMORY, rustix::io::Errno::NOMEM)
    }

    /// This library cannot carry it, and says why.
    pub(crate) fn refused(what: impl Into<Cow<'static, str>>, remedy: impl Into<Cow<'static, str>>) -> Self {
        Self { step: "", what: what.into(), kind: Kind::Refused, remedy: remedy.into() }
    }

    /// The connection was not the same before and after it was read.
    pub(crate) fn changed(what: &'static str, remedy: &'static str) -> Self {
        Self { kind: Kind::Changed, ..Self::refused(what, remedy) }
    }

    /// Reading once more may help.
    pub(crate) fn is_change(&self) -> bool {
        matches!(self.kind, Kind::Changed)
    }

    /// A value contradicts another one.
    pub(crate) fn invalid(what: &str) -> Self {
        let remedy = "the connection is damaged or was put together wrongly; nothing was changed".into();
        Self { step: "", what: what.to_owned().into(), kind: Kind::Invalid, remedy }
    }

    /// Names the step at which it happened, where none is named yet.
    pub(crate) fn at(mut self, step: &'static str) -> Self {
        if self.step.is_empty() {
            self.step = step;
        }
        self
    }

    /// Replaces the advice by better one.
    pub(crate) fn advise(mut self, remedy: impl Into<Cow<'static, str>>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self.kind {
            Kind::Refused => ErrorKind::Refused,
            Kind::Changed => ErrorKind::Changed,
            Kind::Invalid => ErrorKind::Invalid,
            Kind::System(_) => ErrorKind::System,
        }
    }

    /// The step that failed: `pause`, `save`, `restore`, `resume`, `lock` …
    pub fn step(&self) -> &'static str {
        self.step
    }

    /// The option, the system call or the value that it is about.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// The errno, where the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match &self.kind {
            Kind::System(error) => error.raw_os_error(),
            _ => None,
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> &str {
        &self.remedy
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.step.is_empty() {
            write!(f, "{}: ", self.step)?;
        }
        f.write_str(&self.what)?;
        if let Kind::System(error) = &self.kind {
            match error.raw_os_error().and_then(errno_name) {
                Some(name) => write!(f, ": {name}")?,
                None => write!(f, ": {error}")?,
            }
        }
        if !self.remedy.is_empty() {
            write!(f, " — {}", self.remedy)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            Kind::System(error) => Some(error),
            _ => None,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error.kind {
            Kind::System(source) => source.kind(),
            Kind::Refused => io::ErrorKind::Unsupported,
            Kind::Changed => io::ErrorKind::ResourceBusy,
            Kind::Invalid => io::ErrorKind::InvalidInput,
        };
        io::Error::new(kind, error)
    }
}

/// What a queue is read into.
const OUR_MEMORY: &str = "memory for a queue";

/// What helps against an errno, by experience.
fn remedy(what: &str, errno: i32) -> &'static str {
    match (what, errno) {
        ("bind", libc::EACCES) => {
            "the port is below net.ipv4.ip_unprivileged_port_start: needs CAP_NET_BIND_SERVICE in the network namespace's user \
             namespace"
        }
        ("ip_tables_names", libc::EACCES) => {
            "the kernel names the tables of iptables to root alone: run as root"
        }
        (_, libc::EPERM | libc::EACCES) => {
            "needs CAP_NET_ADMIN and CAP_NET_RAW in the network namespace's user namespace; \
             run as root or under `unshare -Urn`"
        }
        ("TCP_REPAIR", libc::ENOPROTOOPT) => {
            "the kernel has no TCP_REPAIR (CONFIG_CHECKPOINT_RESTORE), or this is no plain TCP socket"
        }
        ("connect", libc::EADDRNOTAVAIL) => {
            "another socket has the same pair of addresses: close or detach the old one first"
        }
        ("bind", libc::EADDRINUSE) => "another socket holds this port without SO_REUSEADDR",
        ("connect", libc::ENETUNREACH | libc::EHOSTUNREACH) => "there is no route to the peer from here",
        (what, libc::ENFILE) if what.starts_with("nft ") => {
            "a set holds 65,536 connections of one address family at most: `soccr steer --list` shows what is steered, and \
             `soccr steer --remove` ends it"
        }
        (_, libc::EMFILE | libc::ENFILE) => "too many open files: raise RLIMIT_NOFILE (`ulimit -n`)",
        (OUR_MEMORY, libc::ENOMEM) => {
            "this process gets no more memory: raise its limit (RLIMIT_AS, its control group), or free some"
        }
        ("conntrack", libc::ENOMEM) => {
            "the table of connection tracking may be full: raise net.netfilter.nf_conntrack_max"
        }
        (_, libc::ENOMEM | libc::ENOBUFS) => {
            "out of socket memory: see net.ipv4.tcp_mem and net.core.optmem_max"
        }
        (_, libc::EBADF) => "the descriptor is closed",
        (_, libc::ENOTSOCK) => "the descriptor is no socket",
        _ => "",
    }
}

/// The symbolic name of an errno that socket calls return.
fn errno_name(errno: i32) -> Option<&'static str> {
    macro_rules! names {
        ($($name:ident)*) => { match errno { $(libc::$name => Some(stringify!($name)),)* _ => None } };
    }
    names! {
        EPERM ENOENT ESRCH EINTR EIO EBADF EAGAIN ENOMEM EACCES EFAULT EBUSY EEXIST ENODEV EINVAL ENFILE EMFILE
        ENOSPC EPIPE ERANGE ENODATA EPROTO EOVERFLOW ENOTSOCK EDESTADDRREQ EMSGSIZE EPROTOTYPE ENOPROTOOPT
        EPROTONOSUPPORT EOPNOTSUPP EAFNOSUPPORT EADDRINUSE EADDRNOTAVAIL ENETDOWN ENETUNREACH ECONNABORTED
        ECONNRESET ENOBUFS EISCONN ENOTCONN ETIMEDOUT ECONNREFUSED EHOSTUNREACH EALREADY EINPROGRESS ENOSYS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_step_option_errno_and_remedy() {
        let error =
            Error::system("TCP_REPAIR", io::Error::from_raw_os_error(libc::EPERM)).at("pause").at("save");
        assert!(error.to_string().starts_with("pause: TCP_REPAIR: EPERM — needs CAP_NET_ADMIN"), "{error}");
        assert_eq!((error.errno(), error.kind()), (Some(libc::EPERM), ErrorKind::System));
        assert_eq!(io::Error::from(error).kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn memory_of_the_process_is_no_memory_of_sockets() {
        let ours = Error::out_of_memory();
        assert!(ours.errno() == Some(libc::ENOMEM) && ours.remedy().contains("RLIMIT_AS"), "{ours}");
        let of_sockets = Error::system("the send queue", rustix::io::Errno::NOMEM);
        assert!(of_sockets.remedy().contains("tcp_mem"), "{of_sockets}");
    }
}
