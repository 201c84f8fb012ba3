//! One change of the sets for many connections.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use soccr_netlink::{Batch, Socket};

use super::rules::{ALIVE, END, Names, TO};
use super::{Steering, failed, reversed};
use crate::connection::Flow;
use crate::error::{Error, Result};
use crate::nftables::{self, Table, Transaction};

/// What is in the tables about one connection.
#[derive(Default)]
pub(super) struct Entry {
    pub(super) steered: bool,
    pub(super) alive: bool,
    pub(super) ends: bool,
}

impl Steering {
    /// Commits what `fill` writes about chunks of connections. A transaction without effect costs nothing; one that fails waits for
    /// an RCU grace period, which takes milliseconds.
    ///
    /// Kernels before 6.3 delete only what is there. It is looked up then, and again where somebody changes it meanwhile.
    pub(super) fn change(
        &self,
        socket: &mut Socket,
        ipv6: bool,
        flows: &[Flow],
        seem_new: bool,
        mut fill: impl FnMut(&mut Change<'_, '_>),
    ) -> Result<()> {
        /// Packets and other processes change the sets; not that often.
        const ATTEMPTS: usize = 32;
        /// The kernel collects what has expired once a second, and counts it until then.
        const COLLECTION: Duration = Duration::from_secs(2);
        static CAN_DESTROY: AtomicBool = AtomicBool::new(true);
        let (mut are_new, mut full_since) = (seem_new, None);
        if flows.is_empty() {
            return Ok(());
        }
        nftables::set_longest(socket)?;
        // Each connection may be in all three sets, and in the map twice; its answers in all three.
        let most = (nftables::most_elements(socket)? / 7).max(1);
        let (mut batch, name) = (Batch::new(), self.table());
        let (mut rest, mut at_once, mut attempts) = (flows, most, 0);
        while !rest.is_empty() {
            let (flows, behind) = rest.split_at(at_once.min(rest.len()));
            let known = match CAN_DESTROY.load(Ordering::Relaxed) {
                _ if are_new => Known::New,
                true => Known::Nothing,
                false => {
                    let all = [flows, &reversed(flows)].concat();
                    Known::Present(self.present(socket, ipv6, &all, &[TO, ALIVE, END]).map_err(failed)?)
                }
            };
            let mut transaction = Transaction::begin(&mut batch, Table::netdev(&name));
            fill(&mut Change { transaction: &mut transaction, ipv6, flows, known: &known });
            let Err(error) = transaction.commit(socket) else {
                (rest, attempts) = (behind, 0);
                continue;
            };
            attempts += 1;
            match (error.raw_os_error(), known) {
                _ if attempts == ATTEMPTS => return Err(Error::system("nft element", error)),
                (Some(libc::EEXIST), Known::New) => are_new = false,
                (Some(libc::EINVAL), Known::Nothing) => CAN_DESTROY.store(false, Ordering::Relaxed),
                // Of fewer connections, less changes meanwhile.
                (Some(libc::ENOENT | libc::EEXIST), Known::Present(_)) => at_once = flows.len().div_ceil(2),
                (Some(libc::ENFILE), _)
                    if full_since.get_or_insert_with(Instant::now).elapsed() < COLLECTION =>
                {
                    match self.make_room(socket, ipv6)? {
                        true => full_since = None,
                        false => std::thread::sleep(COLLECTION / 20),
                    }
                }
                _ => return Err(Error::system("nft element", error)),
            }
        }
        Ok(())
    }
}

/// What a transaction does about some connections of one family.
pub(super) struct Change<'a, 't> {
    pub(super) transaction: &'a mut Transaction<'t>,
    ipv6: bool,
    pub(super) flows: &'a [Flow],
    known: &'a Known,
}

/// What is known of some connections.
enum Known {
    Nothing,
    /// They are in no set, or the transaction fails.
    New,
    /// The sets that each is in.
    Present(HashMap<Flow, Entry>),
}

impl Change<'_, '_> {
    /// Takes out of a set those that are in it.
    pub(super) fn take_out(&mut self, set: Names, flows: &[Flow], is_in: fn(&Entry) -> bool) {
        let name = set.name(self.ipv6);
        match self.known {
            Known::Nothing => self.transaction.destroy(name, flows.iter()),
            Known::New => {}
            Known::Present(present) => {
                self.transaction.delete(name, flows.iter().filter(|flow| is_in(&present[*flow])));
            }
        }
    }

    /// Takes them out of all sets.
    pub(super) fn forget(&mut self, flows: &[Flow]) {
        self.take_out(TO, flows, |entry| entry.steered);
        self.take_out(ALIVE, flows, |entry| entry.alive);
        self.take_out(END, flows, |entry| entry.ends);
    }

    pub(super) fn have_alive(&mut self) {
        let name = ALIVE.name(self.ipv6);
        match self.known {
            Known::Nothing | Known::New => self.transaction.complete(name, self.flows.iter()),
            Known::Present(present) => {
                let missing = self.flows.iter().filter(|flow| !present[*flow].alive);
                self.transaction.add(name, missing, |_, _| ());
            }
        }
    }
}
