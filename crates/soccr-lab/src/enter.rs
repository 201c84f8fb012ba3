//! How a process gets a private network.

use std::{fmt, fs, io};

use crate::Rtnetlink;
use crate::sys::{Unshare, unshare};

/// Leaves the network of this machine for an empty one, in which this process may do everything.
///
/// Must be called before the process starts its first thread. A process with `CAP_SYS_ADMIN` gets a network namespace
/// alone and keeps its user namespace, since some rights (loading BPF) exist only in the initial one. Any other gets a
/// user namespace too, in which it is root and has every capability over the network. `lo` is up afterwards.
///
/// # Errors
/// [`Unavailable`] where the kernel, a container's seccomp filter or a security module forbids it.
pub fn enter() -> Result<(), Unavailable> {
    match unshare(Unshare::Network) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => become_root_of_a_namespace()?,
        other => other.map_err(|error| Unavailable::new("unshare(CLONE_NEWNET)", error))?,
    }
    let lo_up = || Rtnetlink::here()?.up("lo");
    lo_up().map_err(|error| Unavailable::new("setting lo up", error))
}

fn become_root_of_a_namespace() -> Result<(), Unavailable> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    unshare(Unshare::UserAndNetwork)
        .map_err(|error| Unavailable::new("unshare(CLONE_NEWUSER | CLONE_NEWNET)", error))?;
    // setgroups must be denied before an unprivileged process may map a group (user_namespaces(7)).
    for (file, content) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ] {
        fs::write(file, content).map_err(|error| Unavailable::new(file, error))?;
    }
    Ok(())
}

/// No private network can be had here: which step failed, why, and what to do.
#[derive(Debug)]
pub struct Unavailable {
    step: &'static str,
    source: io::Error,
}

impl Unavailable {
    fn new(step: &'static str, source: io::Error) -> Self {
        Self { step, source }
    }

    fn remedy(&self) -> &'static str {
        match self.source.raw_os_error() {
            Some(libc::EINVAL) => "call enter() before the first thread starts",
            Some(libc::EPERM | libc::EACCES) => {
                "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, \
                 kernel.apparmor_restrict_unprivileged_userns=0; in a container: its seccomp profile) or be root"
            }
            Some(libc::ENOSPC) => "raise the sysctls user.max_user_namespaces and user.max_net_namespaces",
            _ => "a kernel with CONFIG_USER_NS and CONFIG_NET_NS is needed",
        }
    }
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no private network: {}: {}; {}", self.step, self.source, self.remedy())
    }
}

// Its text includes the cause already: with a `source`, programs that print all causes would print this one twice.
impl std::error::Error for Unavailable {}
