//! One handle for one socket: resuming one of two would break the other.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use soccr_core::Paused;

use crate::failure::{Failure, Result};

/// The sockets that have a handle in this process, by `SO_COOKIE`, whichever descriptor they are known by; and which of
/// their handles it is, by a number that no other handle of this process ever had.
static CLAIMED: Mutex<BTreeMap<u64, u64>> = Mutex::new(BTreeMap::new());
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A socket is paused by one handle, which holds this.
#[derive(Debug)]
pub(crate) struct Claim {
    cookie: u64,
    handle: u64,
}

impl Claim {
    /// Claims a socket for what `pause` makes of it; another thread that wants it waits so long. A handle that was left
    /// behind, whose socket somebody else has taken out of repair mode since, has lost it.
    pub(crate) fn with<T>(socket: BorrowedFd<'_>, pause: impl FnOnce() -> Result<T>) -> Result<(Self, T)> {
        let cookie = rustix::net::sockopt::socket_cookie(socket).map_err(|error| {
            Failure::system(format!("pause: SO_COOKIE: {error} — no socket, or closed"), error.raw_os_error())
        })?;
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        if claimed.contains_key(&cookie) && is_in_repair(socket) {
            return Err(Failure::refused(
                "pause: the socket has a handle already — resume or release that one first",
            ));
        }
        let paused = pause()?;
        let handle = NEXT.fetch_add(1, Ordering::Relaxed);
        claimed.insert(cookie, handle);
        Ok((Self { cookie, handle }, paused))
    }

    /// The descriptor is still that of the socket, which has not been claimed by another handle since.
    pub(crate) fn holds(&self, socket: BorrowedFd<'_>) -> bool {
        let is_same = rustix::net::sockopt::socket_cookie(socket).is_ok_and(|cookie| cookie == self.cookie);
        is_same
            && CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).get(&self.cookie) == Some(&self.handle)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        if claimed.get(&self.cookie) == Some(&self.handle) {
            claimed.remove(&self.cookie);
        }
    }
}

fn is_in_repair(socket: BorrowedFd<'_>) -> bool {
    // Only asks: the guard is given up at once.
    Paused::take_over(socket).map(Paused::leave_paused).is_ok()
}
