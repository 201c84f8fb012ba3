//! The socket that had the connection before: it still has its options, but for those that it lost when it was disconnected.

use std::net::SocketAddr;

use super::Restore;
use crate::error::{Error, Result};
use crate::settings::{Settings, Stage};

/// The options of a socket that gets its connection back.
#[derive(Debug)]
pub(super) struct Again {
    settings: Settings,
    local: SocketAddr,
    /// Those of them that were in the way of segments that play the peer's.
    taken_off: Settings,
}

impl Restore<'_> {
    /// Step 1, too, on the socket that had the connection before, with these options and this address: takes off what would drop the
    /// segments that play the peer's (a filter, MD5 keys, a least TTL) until [`finish`](Self::finish), and sets again what the socket
    /// has lost since.
    pub fn again(mut self, settings: &Settings, local: SocketAddr) -> Self {
        let taken_off = settings.unblock(self.fd, local);
        self.again = Some(Again { settings: settings.clone(), local, taken_off });
        self
    }

    /// Step 3, behind the connect.
    pub(super) fn set_again_in_repair(&self) {
        if let Some(Again { settings, local, .. }) = &self.again {
            settings.apply(self.fd, Stage::InRepair, *local, &mut Vec::new());
        }
    }

    /// Step 6, behind everything that is injected. What the socket had all the time may not be for this user to set; what was taken off
    /// must be there again.
    pub(super) fn set_again(&self) -> Result<()> {
        let Some(Again { settings, local, taken_off }) = &self.again else { return Ok(()) };
        let mut skipped = Vec::new();
        for stage in [Stage::Injected, Stage::Last] {
            settings.apply(self.fd, stage, *local, &mut skipped);
        }
        match skipped.into_iter().find(|skipped| taken_off.get(&skipped.name).is_some()) {
            Some(skipped) => Err(Error::system(skipped.name, skipped.error)),
            None => Ok(()),
        }
    }
}
