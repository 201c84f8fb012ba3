//! Room in a full map.

use std::collections::HashSet;

use soccr_netlink::{Batch, Socket};

use super::rules::{ALIVE, Names, TO};
use super::{Steering, failed};
use crate::connection::Flow;
use crate::error::{Error, Result};
use crate::nftables::{self, Table, Transaction};

impl Steering {
    /// Takes out of the map what has left the other sets by itself: it has no effect any more. Returns whether there was something.
    pub(super) fn make_room(&self, socket: &mut Socket, ipv6: bool) -> Result<bool> {
        /// As many as are in `alive` for the moment, which may be nearly full.
        const AT_ONCE: usize = 1024;
        let (mut batch, name) = (Batch::new(), self.table());
        let table = Table::netdev(&name);
        let mut read =
            |set: Names| nftables::contents(socket, table, set.name(ipv6), |flow, _| flow).map_err(failed);
        let alive: HashSet<Flow> = read(ALIVE)?.into_iter().collect();
        let ended: Vec<Flow> = read(TO)?.into_iter().filter(|flow| !alive.contains(flow)).collect();
        let mut made_room = false;
        for ended in ended.chunks(AT_ONCE.min(nftables::most_elements(socket)? / 3).max(1)) {
            let mut transaction = Transaction::begin(&mut batch, table);
            transaction.delete(TO.name(ipv6), ended.iter());
            // Fails if one of them is steered by now.
            transaction.add(ALIVE.name(ipv6), ended.iter(), |_, _| ());
            transaction.delete(ALIVE.name(ipv6), ended.iter());
            match transaction.commit(socket) {
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENOENT | libc::ENFILE)) => {}
                outcome => {
                    outcome.map_err(|error| Error::system("nft delete element", error))?;
                    made_room = true;
                }
            }
        }
        Ok(made_room)
    }
}
