//! One handle for one socket: resuming one of two would break the other.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use soccr_core::Paused;

use crate::failure::{Failure, Result};

/// The sockets that have a handle in this process, by `SO_COOKIE`, whichever descriptor they are known by; and which of
/// their handles it is.
static CLAIMED: Mutex<BTreeMap<u64, u64>> = Mutex::new(BTreeMap::new());

/// A socket is paused by one handle, which holds this.
#[derive(Debug)]
pub(crate) struct Claim {
    cookie: u64,
    generation: u64,
}

impl Claim {
    /// Claims a socket. A handle that was left behind, whose socket somebody else has taken out of repair mode since,
    /// has lost it.
    pub(crate) fn new(socket: BorrowedFd<'_>) -> Result<Self> {
        let cookie = rustix::net::sockopt::socket_cookie(socket).map_err(|error| {
            Failure::system(format!("pause: SO_COOKIE: {error} — no socket, or closed"), error.raw_os_error())
        })?;
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = match claimed.get(&cookie) {
            None => 0,
            Some(generation) if !is_in_repair(socket) => generation + 1,
            Some(_) => {
                return Err(Failure::refused(
                    "pause: the socket has a handle already — resume or release that one first",
                ));
            }
        };
        claimed.insert(cookie, generation);
        Ok(Self { cookie, generation })
    }

    /// The descriptor is still that of the socket, which has not been claimed by another handle since.
    pub(crate) fn holds(&self, socket: BorrowedFd<'_>) -> bool {
        let is_same = rustix::net::sockopt::socket_cookie(socket).is_ok_and(|cookie| cookie == self.cookie);
        is_same
            && CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).get(&self.cookie)
                == Some(&self.generation)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        if claimed.get(&self.cookie) == Some(&self.generation) {
            claimed.remove(&self.cookie);
        }
    }
}

fn is_in_repair(socket: BorrowedFd<'_>) -> bool {
    // Only asks: the guard is given up at once.
    Paused::take_over(socket).map(Paused::leave_paused).is_ok()
}
