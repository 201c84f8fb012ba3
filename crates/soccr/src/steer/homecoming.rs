//! Connections on their way home: their packets stay here for the time being.
//!
//! ```text
//! table netdev soccr-home-04711b2a { flags owner
//!   set flows4, flows6
//!   chain eth0 { type filter hook ingress device eth0 priority -301      # before the chains that steer
//!     KEY @flows4 meta mark set 0x50cd                                   # which those pass over
//!   }
//!   chain eth0/end { type filter hook ingress device eth0 priority -299  # behind them all
//!     meta mark 0x50cd meta mark set 0
//! } }
//! ```

use std::collections::{BTreeSet, HashSet};
use std::hash::{BuildHasher, RandomState};

use rustix::net::netdevice::name_to_index;
use soccr_netlink::{Batch, Family, Socket};

use super::redirect::stop_by;
use super::steering::{ICMP_ERRORS, NOT_STEERED, Steering};
use crate::connection::Flow;
use crate::error::{Error, Result};
use crate::lock::Locker;
use crate::nftables::rule::{Direction, Expressions};
use crate::nftables::set::{CAPACITY, Set};
use crate::nftables::{self, Hook, Table, Transaction};
use crate::sys::descriptor;
use crate::sys::signals::without_signals;

/// Steered connections that are about to come home. While they are [expected](Self::expect) their packets are not steered, but
/// reach this host: the lock that is on them.
///
/// It owns an nftables table, which the kernel removes when it is dropped or its process dies. Then the connections that have
/// not [arrived](Self::arrived) are steered again: they live on where they were. Drop it before the lock, so that no packet finds
/// neither lock nor steering; where the process dies, that is seen to.
#[derive(Debug)]
pub struct Homecoming {
    socket: Option<Socket>,
    table: String,
    is_made: bool,
    /// Those with a chain.
    devices: BTreeSet<String>,
    expected: HashSet<Flow>,
}

impl Homecoming {
    /// Of no connection yet, in the network namespace of the calling thread. They will be locked by `locker`.
    ///
    /// # Errors
    /// The errors of opening a netlink socket.
    pub fn new(locker: &Locker) -> Result<Self> {
        // A table vanishes with the port of its owner: no other socket may ever have it.
        let port = RandomState::new().hash_one(std::process::id()) as u32;
        let socket = Socket::open_at(Family::Netfilter, port)
            .map_err(|error| Error::system("netfilter socket", error).at("steer"))?;
        let socket =
            locker.with_descriptor(|other| socket.with_descriptor(|fd| descriptor::above(fd, other)));
        let table = format!("soccr-home-{port:08x}");
        let (devices, expected) = (BTreeSet::new(), HashSet::new());
        Ok(Self { socket: Some(socket), table, is_made: false, devices, expected })
    }

    /// Suspends the steering of those of the connections that are steered.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`. They are steered then as before.
    pub fn expect(&mut self, flows: &[Flow]) -> Result<()> {
        self.suspend(flows).map_err(|error| error.at("steer"))
    }

    /// These connections are home: their steering ends.
    ///
    /// # Errors
    /// The errors of [`stop`](super::stop).
    pub fn arrived(&mut self, flows: &[Flow]) -> Result<()> {
        let home = self.expected_of(flows);
        if home.is_empty() {
            return Ok(());
        }
        let ended = stop_by(self.socket(), &home).and_then(|_| self.forget(&home));
        ended.map_err(|error| error.at("steer"))
    }

    /// These connections stay where they are: they are steered again.
    ///
    /// # Errors
    /// The errors of deleting elements of a set.
    pub fn stay_away(&mut self, flows: &[Flow]) -> Result<()> {
        let away = self.expected_of(flows);
        // What is not steered again would draw a reset: that is worth a second attempt.
        let again = self.forget(&away).or_else(|_| self.forget(&away));
        again.map_err(|error| error.at("steer"))
    }

    fn expected_of(&self, flows: &[Flow]) -> Vec<Flow> {
        flows.iter().map(Flow::on_the_wire).filter(|flow| self.expected.contains(flow)).collect()
    }

    fn suspend(&mut self, flows: &[Flow]) -> Result<()> {
        let wanted: Vec<Flow> =
            flows.iter().map(Flow::on_the_wire).filter(|flow| !self.expected.contains(flow)).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let mut steered = HashSet::new();
        let mut devices = BTreeSet::new();
        for steering in Steering::list_by(self.socket())? {
            let found = steering.entered_by(self.socket(), &wanted)?;
            // It may be in the table of another device, too. By one that is gone nothing arrives.
            if !found.is_empty()
                && !self.devices.contains(steering.ingress())
                && name_to_index(self.socket(), steering.ingress()).is_ok()
            {
                devices.insert(steering.ingress().to_owned());
            }
            steered.extend(found);
        }
        if steered.is_empty() {
            return Ok(());
        }
        let flows: Vec<Flow> = steered.into_iter().collect();
        let is_first = !self.is_made;
        self.transact("nft add table netdev", |transaction| {
            if is_first {
                create(transaction);
            }
            devices.iter().for_each(|device| create_chain(transaction, device));
            for ipv6 in [false, true] {
                transaction.add(SETS[usize::from(ipv6)], of_family(&flows, ipv6), |_, _| ());
            }
        })?;
        self.is_made = true;
        self.devices.extend(devices);
        self.expected.extend(flows);
        Ok(())
    }

    fn forget(&mut self, flows: &[Flow]) -> Result<()> {
        if flows.is_empty() {
            return Ok(());
        }
        let forgotten = self.transact("nft delete element", |transaction| {
            for ipv6 in [false, true] {
                transaction.delete(SETS[usize::from(ipv6)], of_family(flows, ipv6));
            }
        });
        // Otherwise the answer to the first attempt was lost.
        forgotten.or_else(|error| if error.errno() == Some(libc::ENOENT) { Ok(()) } else { Err(error) })?;
        for flow in flows {
            self.expected.remove(flow);
        }
        Ok(())
    }

    fn socket(&mut self) -> &mut Socket {
        self.socket.as_mut().expect("it is there until the drop")
    }

    fn transact(&mut self, what: &'static str, fill: impl FnOnce(&mut Transaction<'_>)) -> Result<()> {
        nftables::set_longest(self.socket())?;
        let (mut batch, name) = (Batch::new(), self.table.clone());
        let mut transaction = Transaction::begin(&mut batch, Table::netdev(&name));
        fill(&mut transaction);
        transaction.commit(self.socket()).map_err(|error| Error::system(what, error))
    }
}

impl Drop for Homecoming {
    fn drop(&mut self) {
        // Whoever drops it may unlock these next: until they are steered again, their packets would draw resets. To close the socket
        // ends it too late, where a child that is being started has a copy of the descriptor.
        let away: Vec<Flow> = self.expected.iter().copied().collect();
        let _ = self.stay_away(&away);
        let socket = self.socket.take();
        if self.is_made {
            // The kernel takes milliseconds to remove a table.
            let named = std::thread::Builder::new().name("soccr-close".into());
            let _ = without_signals(|| named.spawn(move || drop(socket)));
        }
    }
}

const SETS: [&str; 2] = ["flows4", "flows6"];

fn of_family(flows: &[Flow], ipv6: bool) -> impl Iterator<Item = &Flow> {
    flows.iter().filter(move |flow| flow.is_ipv4() != ipv6)
}

fn create(transaction: &mut Transaction<'_>) {
    transaction.create_table(true);
    for ipv6 in [false, true] {
        let name = SETS[usize::from(ipv6)];
        let set = Set { name, ipv6, size: Some(CAPACITY), timeout: false, map: false, dynamic: None };
        transaction.create_set(&set);
    }
}

fn create_chain(transaction: &mut Transaction<'_>, device: &str) {
    let hook = Hook { number: Hook::INGRESS, priority: Hook::RAW - 1, device: Some(device) };
    transaction.create_chain(device, hook);
    let end = format!("{device}/end");
    transaction.create_chain(&end, Hook { priority: Hook::RAW + 1, ..hook });
    transaction.rule(&end, |rule| {
        rule.has_mark(NOT_STEERED);
        rule.mark(0);
    });
    for ipv6 in [false, true] {
        let mut rule = |write: &dyn Fn(&mut Expressions<'_, '_>)| {
            transaction.rule(device, |rule| {
                rule.carries_ipv6(ipv6);
                write(rule);
                rule.has_key(SETS[usize::from(ipv6)]);
                rule.mark(NOT_STEERED);
            });
        };
        rule(&|rule| {
            rule.is_protocol(libc::IPPROTO_TCP);
            rule.load_key(ipv6, Direction::In);
        });
        for kind in ICMP_ERRORS[usize::from(ipv6)] {
            rule(&|rule| {
                rule.is_icmp(ipv6, *kind);
                rule.load_quoted_key(ipv6);
            });
        }
    }
}
