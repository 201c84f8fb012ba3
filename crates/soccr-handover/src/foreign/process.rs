//! Processes and their sockets, by `/proc` and pidfds.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags, RawDir, fstat, open, openat, readlinkat_raw};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::sys;
use crate::error::{Context, Error, ErrorKind, Result};

/// A process, which cannot be confused with a later one of the same number.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Process {
    /// The process that has this number now (`pidfd_open(2)`).
    ///
    /// # Errors
    /// There is no such process.
    pub fn open(pid: Pid) -> Result<Self> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| match error {
            rustix::io::Errno::SRCH => no_process(pid),
            error => Error::of(ErrorKind::System, format!("pid {pid}: pidfd_open"), error),
        })?;
        Ok(Self { pid, pidfd })
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// A duplicate of one of its descriptors; what the kernel says, where there is none.
    pub fn duplicate(&self, fd: RawFd) -> rustix::io::Result<OwnedFd> {
        pidfd_getfd(&self.pidfd, fd, PidfdGetfdFlags::empty())
    }

    /// A duplicate of one of its descriptors.
    pub fn descriptor(&self, fd: RawFd) -> Result<OwnedFd> {
        self.duplicate(fd).map_err(|error| match error {
            rustix::io::Errno::BADF => Error::system(format!("it has no descriptor {fd}")),
            rustix::io::Errno::PERM => Error::new(
                ErrorKind::NoPermission,
                "pidfd_getfd: EPERM — needs CAP_SYS_PTRACE over the process: run as root, or as the user that it \
                 belongs to where the sysctl kernel.yama.ptrace_scope is 0",
            ),
            error => Error::of(ErrorKind::System, "pidfd_getfd", error),
        })
    }
}

fn no_process(pid: Pid) -> Error {
    Error::system(format!("pid {pid}: there is no such process"))
}

/// A line of `/proc/PID/status`.
fn status(pid: Pid, field: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| Some(line.strip_prefix(field)?.strip_prefix(':')?.trim().to_owned()))
}

/// Checks that the process exists and that we may look into it; the error says why not.
pub fn look_into(pid: Pid) -> Result<()> {
    let Some(process) = status(pid, "Tgid") else { return Err(no_process(pid)) };
    if process != pid.to_string() {
        return Err(Error::system(format!("pid {pid}: it is a thread: name its process, {process}")));
    }
    if has_ended(pid) {
        let what = format!("pid {pid}: it has ended (a zombie), and has no descriptors any more");
        return Err(Error::system(what));
    }
    match directory(&format!("/proc/{pid}/fd")) {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            let advice =
                "its descriptors cannot be seen — needs CAP_SYS_PTRACE over the process: run as root";
            Err(Error::new(ErrorKind::NoPermission, format!("pid {pid}: {advice}")))
        }
        looked => looked.map(drop).with_context(|| format!("pid {pid}: its descriptors")),
    }
}

/// Who traces a process, as `pid 4711 (gdb)`.
pub fn tracer(pid: Pid) -> Option<String> {
    let tracer = status(pid, "TracerPid")?.parse().ok().and_then(Pid::from_raw)?;
    Some(format!("pid {tracer} ({})", name(tracer)))
}

/// The descendants of a process.
pub fn descendants(pid: Pid) -> Result<Vec<Pid>> {
    let mut family = vec![pid];
    for process in all()? {
        let parent = status(process, "PPid").and_then(|parent| parent.parse().ok()).and_then(Pid::from_raw);
        // Parents mostly have smaller numbers: then they have been found already.
        if parent.is_some_and(|parent| family.contains(&parent)) {
            family.push(process);
        }
    }
    family.remove(0);
    Ok(family)
}

/// The command name of a process; empty where it is gone.
pub fn name(pid: Pid) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).map_or(String::new(), |name| name.trim_end().into())
}

/// The inode of a socket, by which `/proc/PID/fd` and `sock_diag` name it.
pub fn inode(socket: impl AsFd) -> Result<u64> {
    Ok(fstat(socket).context("fstat")?.st_ino)
}

/// All processes, as far as they are visible.
pub fn all() -> Result<Vec<Pid>> {
    numbers("/proc").map(|numbers| numbers.into_iter().filter_map(Pid::from_raw).collect()).context("/proc")
}

/// The threads of a process; none where it has ended.
pub fn threads(pid: Pid) -> io::Result<Vec<Pid>> {
    match numbers(&format!("/proc/{pid}/task")) {
        Ok(numbers) => Ok(numbers.into_iter().filter_map(Pid::from_raw).collect()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Whether a thread has ended, possibly as a zombie.
pub fn has_ended(thread: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{thread}/stat")).map_or(true, |stat| {
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']))
    })
}

/// Shows the sockets among the descriptors of a process: descriptor and inode.
pub fn sockets(pid: Pid, mut each: impl FnMut(RawFd, u64)) -> io::Result<()> {
    let directory = directory(&format!("/proc/{pid}/fd"))?;
    let mut target = [0; 32];
    entries(directory.as_fd(), |name| {
        // The descriptor was closed meanwhile, or its name is too long for a socket's.
        let Ok(length) = readlinkat_raw(&directory, name, &mut target[..]) else { return };
        let inode = target[..length].strip_prefix(b"socket:[").and_then(|rest| rest.strip_suffix(b"]"));
        if let (Some(inode), Some(fd)) = (inode.and_then(number), number(name.to_bytes())) {
            each(fd as RawFd, inode);
        }
    })
}

/// Who has a socket open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The process.
    pub pid: Pid,
    /// The number of its descriptor.
    pub fd: RawFd,
}

/// The sockets of processes, by inode. Processes that may not be looked into are left out.
pub fn holders(processes: &[Pid]) -> HashMap<u64, Vec<Holder>> {
    let mut holders: HashMap<u64, Vec<Holder>> = HashMap::new();
    for pid in processes {
        let _ = sockets(*pid, |fd, inode| holders.entry(inode).or_default().push(Holder { pid: *pid, fd }));
    }
    holders
}

/// `fork(2)`: `None` in the child.
///
/// # Errors
/// This process has started a thread.
pub fn fork() -> io::Result<Option<Pid>> {
    sys::fork()
}

/// The processes that share sockets.
#[derive(Debug)]
pub struct Sharing {
    inodes: HashSet<u64>,
    /// The processes that have been looked into.
    seen: HashSet<Pid>,
    processes: Vec<Pid>,
}

impl Sharing {
    /// Looks for the processes that share any of these sockets, other than this one.
    pub fn find(inodes: &[u64]) -> Result<Self> {
        let inodes = inodes.iter().copied().collect();
        let mut sharing = Self { inodes, seen: HashSet::new(), processes: Vec::new() };
        sharing.look_again()?;
        Ok(sharing)
    }

    /// Looks into processes that have started since, and tells whether any of them has a socket of interest: a child inherits sockets.
    pub fn look_again(&mut self) -> Result<bool> {
        let before = self.processes.len();
        self.seen.insert(rustix::process::getpid());
        for pid in all()? {
            if !self.seen.insert(pid) {
                continue;
            }
            let mut shares = false;
            // A process that has ended, or that we may not look into, counts as having none of the sockets.
            let _ = sockets(pid, |_, inode| shares |= self.inodes.contains(&inode));
            if shares {
                self.processes.push(pid);
            }
        }
        Ok(self.processes.len() > before)
    }

    /// The processes found by now.
    pub fn processes(&self) -> &[Pid] {
        &self.processes
    }
}

fn numbers(path: &str) -> io::Result<Vec<i32>> {
    let directory = directory(path)?;
    let mut numbers = Vec::new();
    entries(directory.as_fd(), |name| numbers.extend(number(name.to_bytes()).map(|number| number as i32)))?;
    Ok(numbers)
}

fn directory(path: &str) -> io::Result<OwnedFd> {
    Ok(open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

fn entries(directory: BorrowedFd<'_>, mut each: impl FnMut(&std::ffi::CStr)) -> io::Result<()> {
    // RawDir moves the position of its descriptor: one of its own.
    let reader =
        openat(directory, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut buffer = Vec::with_capacity(32 << 10);
    let mut entries = RawDir::new(reader, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        each(entry?.file_name());
    }
    Ok(())
}

fn number(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}
