//! The table of a [`Locker`](super::Locker): gone when its socket is closed.

use std::collections::{HashMap, HashSet};
use std::io;

use soccr_netlink::{Batch, Socket};

use super::NEEDS;
use super::rule::Set;
use super::transaction::{self, CAPACITY, Kind, Log, Transaction, most_elements};
use crate::connection::Flow;
use crate::error::{Error, Result};

/// A table that the kernel removes when its socket is closed, and what is in it.
#[derive(Debug)]
pub(super) struct Table {
    socket: Socket,
    name: String,
    batch: Batch,
    /// How many connections go together, whatever is done to them. A chunk is always processed as a whole, so ENOENT for
    /// one connection means that all of them were unlocked.
    chunk: usize,
    /// What is in the set: each flow is one connection's, so that unlocking another one leaves it there.
    locked: HashSet<Flow>,
    /// Connections whose packets arrive with other addresses than their sockets have (NAT): both flows are locked.
    wires: HashMap<Flow, Flow>,
    /// How many flows are IPv6, IPv4.
    counts: [u32; 2],
}

/// How connections are unlocked: at once, or, where they have to catch up with their packets first, in two steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unlock {
    /// Both directions.
    Both,
    /// They receive, and are silent.
    Receive,
    /// They send as well.
    Send,
}

impl Table {
    /// Makes a table of this name in the namespace of the socket. Incoming packets are copied to the `group`.
    pub(super) fn create(mut socket: Socket, name: String, group: Option<u16>) -> Result<Self> {
        transaction::set_longest(&socket)?;
        let mut batch = Batch::new();
        let mut create = |long| {
            let mut transaction = Transaction::begin(&mut batch, &name);
            transaction.create(Kind::Owned(group.map(|group| Log { group, long })));
            transaction.commit(&mut socket)
        };
        // Kernels before 6.18 cannot look that far into a packet: ERANGE.
        create(true)
            .or_else(
                |error| if error.raw_os_error() == Some(libc::EPERM) { Err(error) } else { create(false) },
            )
            .map_err(|error| Error::system("nft add table", error).advise(NEEDS))?;
        // Moving a connection from set to set adds one element and deletes one, or two of each where it is translated.
        let chunk = (most_elements(&socket)? / 4).max(1);
        Ok(Self { socket, name, batch, chunk, locked: HashSet::new(), wires: HashMap::new(), counts: [0; 2] })
    }

    pub(super) fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Enters connections as locked, those that are translated with both flows, or none of them.
    pub(super) fn reserve(&mut self, flows: &[Flow], translated: &[(Flow, Flow)]) -> Result<()> {
        let wires = translated.iter().map(|(_, wire)| wire);
        let all: Vec<Flow> = flows.iter().chain(wires).copied().collect();
        for (index, flow) in all.iter().enumerate() {
            let refused = if self.counts[usize::from(flow.is_ipv4())] == CAPACITY {
                Error::refused("more than 65536 connections", "make another Locker for the rest")
            } else if !self.locked.insert(flow.on_the_wire()) {
                let what = format!("{} to {}, which is locked already", flow.local, flow.remote);
                Error::refused(what, "release the lock that it is in")
            } else {
                self.counts[usize::from(flow.is_ipv4())] += 1;
                continue;
            };
            self.leave(&all[..index]);
            return Err(refused);
        }
        self.wires.extend(translated.iter().map(|(flow, wire)| (flow.on_the_wire(), *wire)));
        Ok(())
    }

    /// Locks connections that have been entered: in one transaction, where the kernel lets us send one that long.
    /// Where that fails they are neither locked nor entered.
    pub(super) fn add(&mut self, flows: &[Flow]) -> Result<()> {
        let added = flows.chunks(self.chunk).try_for_each(|flows| {
            let flows = self.with_wires(flows);
            self.transact(|transaction| transaction.add(Set::Flows, &flows, None))
                .map_err(|error| Error::system("nft add element", error))
        });
        if added.is_err() {
            // Of several transactions the first ones may have succeeded.
            let _ = self.unlock(Unlock::Both, flows);
        }
        added
    }

    /// Unlocks connections. Where that fails for some, they stay entered, and all others are unlocked.
    ///
    /// # Errors
    /// The first one.
    pub(super) fn unlock(&mut self, how: Unlock, flows: &[Flow]) -> Result<()> {
        let mut outcome = Ok(());
        for flows in flows.chunks(self.chunk) {
            let both = self.with_wires(flows);
            let mut unlock = |how| {
                self.transact(|transaction| match how {
                    Unlock::Both => transaction.delete(Set::Flows, &both),
                    Unlock::Receive => {
                        transaction.add(Set::Silent, &both, None);
                        transaction.delete(Set::Flows, &both);
                    }
                    Unlock::Send => transaction.delete(Set::Silent, &both),
                })
            };
            // What is left locked stays silent: that is worth a second attempt.
            let unlocked = unlock(how).or_else(|_| unlock(how)).or_else(|error| match how {
                // Better with a gap than not at all.
                Unlock::Receive if !is_done(&error) => unlock(Unlock::Both),
                _ => Err(error),
            });
            match unlocked {
                // Otherwise they are not locked, or the answer to the first attempt was lost.
                Err(error) if !is_done(&error) => {
                    outcome = outcome.and(Err(Error::system("nft delete element", error)));
                }
                _ if how == Unlock::Receive => {}
                _ => self.forget(flows),
            }
        }
        outcome
    }

    /// Connections as their sockets know them, and as packets show them before they are translated.
    pub(super) fn with_wires(&self, flows: &[Flow]) -> Vec<Flow> {
        let wires = flows.iter().filter_map(|flow| self.wires.get(&flow.on_the_wire()));
        flows.iter().chain(wires).copied().collect()
    }

    fn forget(&mut self, flows: &[Flow]) {
        self.leave(&self.with_wires(flows));
        for flow in flows {
            self.wires.remove(&flow.on_the_wire());
        }
    }

    fn leave(&mut self, entered: &[Flow]) {
        for flow in entered {
            let removed = self.locked.remove(&flow.on_the_wire());
            self.counts[usize::from(flow.is_ipv4())] -= u32::from(removed);
        }
    }

    fn transact(&mut self, fill: impl FnOnce(&mut Transaction<'_>)) -> io::Result<()> {
        let mut transaction = Transaction::begin(&mut self.batch, &self.name);
        fill(&mut transaction);
        transaction.commit(&mut self.socket)
    }
}

/// The kernel says that nothing is left to do.
fn is_done(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EEXIST))
}
