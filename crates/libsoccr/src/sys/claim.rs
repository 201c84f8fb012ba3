//! One handle for one socket: resuming one of two would break the other.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use crate::failure::{Failure, Result};

/// The sockets that have a handle in this process, by `SO_COOKIE`: whichever descriptor they are known by.
static CLAIMED: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());

/// A socket is paused by one handle, which holds this.
#[derive(Debug)]
pub(crate) struct Claim(u64);

impl Claim {
    pub(crate) fn new(socket: BorrowedFd<'_>) -> Result<Self> {
        let cookie = rustix::net::sockopt::socket_cookie(socket)
            .map_err(|error| Failure::new(format!("pause: SO_COOKIE: {error} — no socket, or closed")))?;
        if CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).insert(cookie) {
            return Ok(Self(cookie));
        }
        Err(Failure::new("pause: the socket has a handle already — resume or release that one first"))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}
