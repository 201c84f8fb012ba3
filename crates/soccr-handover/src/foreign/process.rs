//! Processes and their sockets, by `/proc` and pidfds.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags, RawDir, fstat, open, openat, readlinkat_raw};
use rustix::io::Errno;
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
            Errno::SRCH => no_process(pid),
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
        self.duplicate(fd).map_err(|error| Self::refused(fd, error))
    }

    /// The same; nothing where it has closed that, or has ended.
    pub(super) fn descriptor_if_open(&self, fd: RawFd) -> Result<Option<OwnedFd>> {
        match self.duplicate(fd) {
            Ok(duplicate) => Ok(Some(duplicate)),
            Err(Errno::BADF | Errno::SRCH) => Ok(None),
            Err(_) if has_ended(self.pid) => Ok(None),
            Err(error) => Err(Self::refused(fd, error)),
        }
    }

    fn refused(fd: RawFd, error: Errno) -> Error {
        match error {
            Errno::BADF => Error::system(format!("it has no descriptor {fd}")),
            Errno::PERM => Error::new(
                ErrorKind::NoPermission,
                "pidfd_getfd: EPERM — needs CAP_SYS_PTRACE over the process: run as root, or as the user that it \
                 belongs to where the sysctl kernel.yama.ptrace_scope is 0",
            ),
            error => Error::of(ErrorKind::System, "pidfd_getfd", error),
        }
    }
}

fn no_process(pid: Pid) -> Error {
    Error::system(format!("pid {pid}: there is no such process"))
}

/// Nothing where a process has ended, or may not be looked into. Any other error says nothing about it.
fn unless_hidden<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH | libc::EACCES | libc::EPERM) => Ok(None),
            _ => Err(error),
        },
    }
}

/// A file of a process as text; nothing where there is no such process. Its name, which is in many of them, may be any bytes: the kernel
/// cuts it within a character.
fn read(pid: Pid, file: &str) -> io::Result<Option<String>> {
    let bytes = unless_hidden(std::fs::read(format!("/proc/{pid}/{file}")))?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// A line of `/proc/PID/status`; nothing where there is no such process.
fn status(pid: Pid, field: &str) -> io::Result<Option<String>> {
    let status = read(pid, "status")?;
    let find = |line: &str| Some(line.strip_prefix(field)?.strip_prefix(':')?.trim().to_owned());
    Ok(status.and_then(|status| status.lines().find_map(find)))
}

/// Checks that the process exists and that we may look into it; the error says why not.
pub fn look_into(pid: Pid) -> Result<()> {
    let process = status(pid, "Tgid").with_context(|| format!("pid {pid}: its status"))?;
    let Some(process) = process else { return Err(no_process(pid)) };
    if process != pid.to_string() {
        return Err(Error::system(format!("pid {pid}: it is a thread: name its process, {process}")));
    }
    if has_ended(pid) {
        let what = format!("pid {pid}: it has ended (a zombie), and has no descriptors any more");
        return Err(Error::system(what));
    }
    directory(&format!("/proc/{pid}/fd")).map(drop).map_err(|error| unseen(pid, error))
}

/// Why its descriptors cannot be seen.
fn unseen(pid: Pid, error: io::Error) -> Error {
    if error.raw_os_error() == Some(libc::EACCES) {
        let advice = "its descriptors cannot be seen — needs CAP_SYS_PTRACE over the process: run as root";
        return Error::new(ErrorKind::NoPermission, format!("pid {pid}: {advice}"));
    }
    Error::of(ErrorKind::System, format!("pid {pid}: its descriptors"), error)
}

/// Who traces a process, as `pid 4711 (gdb)`.
pub fn tracer(pid: Pid) -> Option<String> {
    let tracer = status(pid, "TracerPid").ok()??.parse().ok().and_then(Pid::from_raw)?;
    Some(format!("pid {tracer} ({})", name(tracer).unwrap_or_default()))
}

/// The parent of a process; none where that is not visible.
pub(super) fn parent(pid: Pid) -> io::Result<Option<Pid>> {
    Ok(status(pid, "PPid")?.and_then(|parent| parent.parse().ok()).and_then(Pid::from_raw))
}

/// The descendants of a process.
pub fn descendants(pid: Pid) -> Result<Vec<Pid>> {
    let mut family = vec![pid];
    for process in all()? {
        let parent = parent(process).with_context(|| format!("pid {process}: its status"))?;
        // Parents mostly have smaller numbers: then they have been found already.
        if parent.is_some_and(|parent| family.contains(&parent)) {
            family.push(process);
        }
    }
    family.remove(0);
    Ok(family)
}

/// The command name of a process, with U+FFFD for what is no UTF-8; empty where it is gone.
pub fn name(pid: Pid) -> io::Result<String> {
    let name = read(pid, "comm")?;
    Ok(name.map_or(String::new(), |name| name.trim_end().into()))
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
    read(thread, "stat").is_ok_and(|stat| {
        stat.is_none_or(|stat| {
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']))
        })
    })
}

/// Shows the sockets among the descriptors of a process: descriptor and inode. None where it has ended.
///
/// # Errors
/// We may not look into it.
pub fn sockets(pid: Pid, each: impl FnMut(RawFd, u64)) -> Result<()> {
    match read_sockets(pid, each) {
        // The kernel hides the descriptors of a zombie, though it has none.
        Err(_) if has_ended(pid) => Ok(()),
        shown => shown.map_err(|error| unseen(pid, error)),
    }
}

fn read_sockets(pid: Pid, mut each: impl FnMut(RawFd, u64)) -> io::Result<()> {
    let directory = directory(&format!("/proc/{pid}/fd"))?;
    let mut target = [0; 32];
    let mut failed = None;
    entries(directory.as_fd(), |name| {
        // Only the directory itself has no number.
        let Some(fd) = number(name.to_bytes()) else { return };
        let length = match readlinkat_raw(&directory, name, &mut target[..]) {
            Ok(length) => length,
            // The descriptor was closed meanwhile.
            Err(Errno::NOENT) => return,
            Err(error) => return failed = Some(error),
        };
        let inode = target[..length].strip_prefix(b"socket:[").and_then(|rest| rest.strip_suffix(b"]"));
        if let Some(inode) = inode.and_then(number) {
            each(fd as RawFd, inode);
        }
    })?;
    failed.map_or(Ok(()), |error| Err(error.into()))
}

/// The same; none where the process has ended, or may not be looked into.
pub fn visible_sockets(pid: Pid, each: impl FnMut(RawFd, u64)) -> Result<()> {
    unless_hidden(read_sockets(pid, each)).map(drop).map_err(|error| unseen(pid, error))
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
pub fn holders(processes: &[Pid]) -> Result<HashMap<u64, Vec<Holder>>> {
    let mut holders: HashMap<u64, Vec<Holder>> = HashMap::new();
    for pid in processes {
        visible_sockets(*pid, |fd, inode| holders.entry(inode).or_default().push(Holder { pid: *pid, fd }))?;
    }
    Ok(holders)
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
    /// Those of them that a process has been seen to have.
    used: HashSet<u64>,
    /// The processes that have been looked into.
    seen: HashSet<Pid>,
    processes: Vec<Pid>,
}

impl Sharing {
    /// Looks for the processes that share any of these sockets, other than this one.
    pub fn find(inodes: &[u64]) -> Result<Self> {
        let inodes = inodes.iter().copied().collect();
        let mut sharing = Self { inodes, used: HashSet::new(), seen: HashSet::new(), processes: Vec::new() };
        sharing.look_again()?;
        Ok(sharing)
    }

    /// Looks into processes that have started since, and tells whether any of them has a socket of interest: a child inherits sockets.
    pub fn look_again(&mut self) -> Result<bool> {
        let before = self.processes.len();
        self.seen.insert(rustix::process::getpid());
        for pid in all()? {
            if self.seen.contains(&pid) {
                continue;
            }
            let mut shares = false;
            // A process that has ended, or that we may not look into, counts as having none of the sockets.
            visible_sockets(pid, |_, inode| {
                if self.inodes.contains(&inode) {
                    self.used.insert(inode);
                    shares = true;
                }
            })?;
            self.seen.insert(pid);
            if shares {
                self.processes.push(pid);
            }
        }
        Ok(self.processes.len() > before)
    }

    /// Whether a process has this socket now, other than `ours`. One that none was ever seen to have counts as it did before.
    pub(super) fn still_has(&self, wanted: u64, ours: &[Pid]) -> Result<bool> {
        if !self.used.contains(&wanted) {
            return Ok(true);
        }
        // Any other process may have been given it.
        for pid in self.processes.iter().copied().chain(all()?).filter(|pid| !ours.contains(pid)) {
            let mut has = false;
            visible_sockets(pid, |_, inode| has |= inode == wanted)?;
            if has {
                return Ok(true);
            }
        }
        Ok(false)
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
