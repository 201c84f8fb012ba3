//! The keys of TCP MD5, which no socket option tells.

use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use super::{MD5, Settings, Value, md5};
use crate::diag::{Diag, Socket};
use crate::error::{Error, Result};
use crate::flow::Flow;

impl Settings {
    /// Adds the keys that `sock_diag(7)` tells. Most connections have none, and this costs as much as ten options.
    ///
    /// # Errors
    /// Refused where `sock_diag(7)` does not find the socket, or hides its keys; those of `sock_diag(7)`.
    pub(crate) fn read_keys(&mut self, fd: BorrowedFd<'_>, flow: Flow) -> Result<()> {
        // Whoever is not told the mark is not told the keys either.
        let keys = |socket: &Socket<'_>| socket.mark().map(|_| socket.md5_keys().map(<[u8]>::to_vec));
        match Diag::beside(fd)?.describe(fd, flow, keys)? {
            Some(Some(keys)) => self.set(MD5, Value::Secret(keys)),
            Some(None) => {}
            None => return Err(Error::system("sock_diag", rustix::io::Errno::PERM)),
        }
        Ok(())
    }

    /// The peer has another address from now on: its keys of TCP MD5 count for that.
    pub fn move_keys(&mut self, old: IpAddr, new: IpAddr) {
        if let Some((_, Value::Secret(keys))) = self.0.iter_mut().find(|(name, _)| name.as_str() == MD5) {
            md5::move_to(keys, old.to_canonical(), new.to_canonical());
        }
    }
}
