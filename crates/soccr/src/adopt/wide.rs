//! Room for a long queue: the receive buffer of a listener, which its connections inherit, is large for a moment.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::buffers;
use crate::connection::{Buffers, Connection};
use crate::error::Result;

/// A receive buffer for the queue of a connection, and no larger: the peer fills what it gets, and each move would make it larger
/// still. One that the application has fixed is as it was.
pub(super) fn room_for(connection: &Connection) -> u32 {
    /// What the last segment may waste.
    const REST: u32 = 16 << 10;
    let queue = connection.control.inq_len;
    // A segment of ours takes 33,024 bytes for 32,000.
    let room = queue + queue / 31 + REST;
    let fixed = connection.buffers.filter(|buffers| buffers.lock & buffers::RECEIVE_LOCK != 0);
    room.max(fixed.map_or(0, |buffers| buffers.receive))
}

/// Duplicates of listeners, looked for once in all processes: that takes a second where there are many descriptors. As long as it is
/// there, a server that closes its listener leaves it open.
#[derive(Debug, Default)]
pub(super) struct Listeners(HashMap<u32, Option<Rc<OwnedFd>>>);

impl Listeners {
    fn of(&mut self, inodes: &[u32]) -> Vec<Rc<OwnedFd>> {
        let unknown: Vec<u32> = inodes.iter().copied().filter(|inode| !self.0.contains_key(inode)).collect();
        if !unknown.is_empty() {
            self.0.extend(unknown.iter().map(|inode| (*inode, None)));
            self.0.extend(find(&unknown).into_iter().map(|(inode, found)| (inode, Some(Rc::new(found)))));
        }
        inodes.iter().filter_map(|inode| self.0.get(inode)?.clone()).collect()
    }
}

/// Listeners with large buffers. Dropping it gives them their own back.
#[derive(Debug)]
pub(super) struct Wide(Vec<(Rc<OwnedFd>, Buffers)>);

impl Wide {
    /// Gives the sockets with these inode numbers, in whatever processes have them, receive buffers of at least `receive` bytes. What
    /// belongs to nobody whom we may look at stays as it is: the queue then enters as the server reads.
    pub(super) fn new(listeners: &mut Listeners, inodes: &[u32], receive: u32) -> Self {
        let widen = |listener: Rc<OwnedFd>| -> Result<(Rc<OwnedFd>, Buffers)> {
            let before = buffers::read(listener.as_fd())?.buffers;
            let receive = receive.max(before.receive);
            buffers::write(listener.as_fd(), before, Buffers { receive, ..before })?;
            Ok((listener, before))
        };
        Self(listeners.of(inodes).into_iter().filter_map(|listener| widen(listener).ok()).collect())
    }
}

impl Drop for Wide {
    fn drop(&mut self) {
        for (listener, before) in &self.0 {
            // There is nobody left to tell, and a listener works with any buffer.
            if let Ok(now) = buffers::read(listener.as_fd()) {
                let _ = buffers::write(listener.as_fd(), now.buffers, *before);
            }
        }
    }
}

/// Duplicates of the sockets, each once (`pidfd_getfd(2)`).
fn find(inodes: &[u32]) -> Vec<(u32, OwnedFd)> {
    let mut wanted: Vec<(u32, String)> =
        inodes.iter().map(|inode| (*inode, format!("socket:[{inode}]"))).collect();
    let mut found = Vec::new();
    let names = |path: String| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
    };
    for pid in names("/proc".into()) {
        for fd in names(format!("/proc/{pid}/fd")) {
            let Ok(target) = fs::read_link(format!("/proc/{pid}/fd/{fd}")) else { continue };
            let Some(place) = wanted.iter().position(|(_, name)| target.as_os_str() == name.as_str()) else {
                continue;
            };
            let duplicate = Pid::from_raw(pid)
                .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
                .and_then(|process| pidfd_getfd(process, fd, PidfdGetfdFlags::empty()).ok());
            if let Some(duplicate) = duplicate {
                found.push((wanted.swap_remove(place).0, duplicate));
            }
            if wanted.is_empty() {
                return found;
            }
        }
    }
    found
}
