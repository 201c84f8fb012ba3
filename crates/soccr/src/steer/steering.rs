//! The old host: packets of connections that have left are sent on.
//!
//! ```text
//! table netdev soccr-steer-eth0/eth1 {          # what arrives by eth0 and leaves by eth1; these are the sets for IPv4
//!   map to4    { ipv4_addr . inet_service . ipv4_addr . inet_service : ipv4_addr }    # remote, local : next hop
//!   set alive4 { …; flags dynamic,timeout; timeout 1d; counter }   # steered as long as it is in both
//!   set end4   { …; flags dynamic,timeout }                        # the peer has sent a FIN or an RST
//!   chain in-2-3 { type filter hook ingress device eth0 priority -300                      # the indices of the devices
//!     meta mark 0x50cd       accept                                                                   # see homecoming.rs
//!     no fin, syn, rst       KEY not @end4, KEY @to4, @alive4   update @alive4                fwd        # nearly all packets
//!     tcp flags fin          KEY @to4, @alive4   update @end4, @alive4 { KEY timeout 1h }  fwd
//!     tcp flags rst          KEY @to4, @alive4   update @end4, @alive4 { KEY timeout 1m }  fwd
//!     tcp flags syn, not ack KEY @end4           delete @end4, @alive4                     accept
//!     KEY @end4              KEY @to4, @alive4   update @alive4 { KEY timeout 1h }         fwd
//!     tcp flags syn          KEY @to4, @alive4   update @alive4                            fwd
//!     icmp errors            KEY of the packet that they quote, the same
//!   }
//!   chain back-2-3 { type filter hook ingress device eth1 priority -301     # part of the other, where there is one device
//!     tcp flags rst          KEY the other way round @to4, @alive4   update @end4, @alive4 { KEY timeout 1m }
//! } }
//! ```
//!
//! The chain `back` sees the RSTs of the new host: a copy of each (see foreign.rs), or the answers, if they come this way.
//!
//! Rules change the sets and never the map: a packet that is under way while its connection is taken out may bring it
//! back into `alive`, which has no effect by itself. So what ends by itself stays in the map, until that is full.

mod change;
mod room;
mod rules;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use soccr_netlink::{Batch, Message, Rtnetlink, Socket};

use super::{absent, index, with_route, with_socket};
use crate::connection::Flow;
use crate::error::{Error, Result};
use crate::nftables::set::{self, ELEMENT_EXPIRATION, ELEMENT_TIMEOUT};
use crate::nftables::{self, Table, Transaction, milliseconds, value};

use change::Entry;
use rules::{ALIVE, Chains, END, Names, TO, create_chains, create_sets};
pub(super) use rules::{ICMP_ERRORS, NOT_STEERED};

const PREFIX: &str = "soccr-steer-";

/// After how long without a packet steering ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Times {
    /// Of a connection: 24 hours. The old host resets a connection that is silent for longer: it has no socket for it.
    pub idle: Duration,
    /// After a FIN of the peer, which may still wait for an answer: one hour.
    pub closing: Duration,
    /// After an RST of the peer or of the new host: one minute. Not at once, because anybody can forge one that the socket
    /// ignores, and what is under way shall not be reset. Sequence numbers are not checked: a SYN behind it ends the steering at once, also
    /// a forged one.
    pub reset: Duration,
}

impl Default for Times {
    fn default() -> Self {
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        Self { idle: minutes(24 * 60), closing: minutes(60), reset: minutes(1) }
    }
}

/// Packets that arrive by one device and leave by another, or by the same. It belongs to no process.
///
/// In `nft list ruleset` it is the table `soccr-steer-` and the two devices. The device of arrival keeps it when it goes
/// down and up. When one of the devices is removed, nothing is steered any more: until there is one of the same name, and the steering is
/// [opened](Self::open) again, or something [redirected](super::redirect) by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steering {
    ingress: String,
    egress: String,
}

/// A connection that is steered.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Steered {
    /// The connection, seen from the host that had it.
    pub flow: Flow,
    /// To where its packets go.
    pub next_hop: IpAddr,
    /// How many have been steered: one for each that arrives, which may be several segments joined (GRO).
    pub packets: u64,
    /// Their length, with all headers.
    pub bytes: u64,
    /// For how long none has come.
    pub idle: Duration,
    /// The steering ends when none comes for this time.
    pub remaining: Duration,
    /// The peer has sent a FIN, or one of the two an RST.
    pub closing: bool,
}

impl Steering {
    /// The steering between two devices of the network namespace of the calling thread; makes it where there is none.
    /// Where there is one, its times stay. Where one of its devices has been made anew since then, all that was steered is steered again,
    /// and ends after the given times, but for `idle`.
    ///
    /// # Errors
    /// `ENODEV` where there is no such device; `EPERM` without `CAP_NET_ADMIN`; `EOPNOTSUPP` or `ENOENT` where the
    /// kernel lacks `CONFIG_NFT_FWD_NETDEV`.
    pub fn open(ingress: &str, egress: &str, times: Times) -> Result<Self> {
        with_socket(|socket| with_route(|route| Self::open_by(socket, route, ingress, egress, times)))
    }

    pub(super) fn open_by(
        socket: &mut Socket,
        route: &Rtnetlink,
        ingress: &str,
        egress: &str,
        times: Times,
    ) -> Result<Self> {
        /// Others may make it, or remove it, at the same time.
        const ATTEMPTS: usize = 4;
        let steering = Self { ingress: ingress.to_owned(), egress: egress.to_owned() };
        let chains = Chains::new(index(route, ingress)?, index(route, egress)?);
        let mut outcome = Ok(());
        for _ in 0..ATTEMPTS {
            if steering.has(socket, &chains).map_err(failed)? {
                return Ok(steering);
            }
            outcome = steering.make(socket, &chains, times);
            match outcome.as_ref().map_err(io::Error::raw_os_error) {
                // Somebody else was quicker.
                Err(Some(libc::EEXIST | libc::ENOENT)) => {}
                _ => break,
            }
        }
        outcome.map(|()| steering).map_err(|error| Error::system("nft add table netdev", error).advise(NEEDS))
    }

    fn has(&self, socket: &mut Socket, chains: &Chains) -> io::Result<bool> {
        let name = self.table();
        for chain in chains.names() {
            if !nftables::has_chain(socket, Table::netdev(&name), chain)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Makes the table, or, where there is one, the chains anew: those of a device that was removed are gone or lead nowhere, and the
    /// sets are as they were.
    fn make(&self, socket: &mut Socket, chains: &Chains, times: Times) -> io::Result<()> {
        let name = self.table();
        let table = Table::netdev(&name);
        let is_there = nftables::names(socket, nftables::Family::Netdev)?.contains(&name);
        let old = if is_there { nftables::chains(socket, table)? } else { Vec::new() };
        let mut batch = Batch::new();
        let mut transaction = Transaction::begin(&mut batch, table);
        match is_there {
            true => old.iter().for_each(|chain| transaction.delete_chain(chain)),
            false => create_sets(&mut transaction, times),
        }
        create_chains(&mut transaction, chains, [&self.ingress, &self.egress], times);
        transaction.commit(socket)
    }

    /// Everything that steers, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn list() -> Result<Vec<Self>> {
        with_socket(Self::list_by)
    }

    pub(super) fn list_by(socket: &mut Socket) -> Result<Vec<Self>> {
        let names = nftables::names(socket, nftables::Family::Netdev).map_err(failed)?;
        let devices = names.iter().filter_map(|name| name.strip_prefix(PREFIX)?.split_once('/'));
        let steering =
            |(ingress, egress): (&str, &str)| Self { ingress: ingress.to_owned(), egress: egress.to_owned() };
        Ok(devices.map(steering).collect())
    }

    /// The device by which packets arrive.
    pub fn ingress(&self) -> &str {
        &self.ingress
    }

    /// The device by which they leave.
    pub fn egress(&self) -> &str {
        &self.egress
    }

    /// Steers connections to a next hop from now on, whatever they were steered to before: all of them in one transaction,
    /// where the kernel lets us send one that long.
    ///
    /// # Errors
    /// Refused: the next hop has another address family than a connection. `ENFILE` for more than 65536 connections of
    /// one family that have not ended, two seconds later.
    pub fn steer(&self, flows: &[Flow], next_hop: IpAddr) -> Result<()> {
        with_socket(|socket| self.steer_by(socket, &distinct(flows), next_hop, false))
    }

    /// Of [`distinct`] connections. Can also end the steering of their answers, in the same transaction: all of it happens, or nothing.
    pub(super) fn steer_by(
        &self,
        socket: &mut Socket,
        flows: &[Flow],
        next_hop: IpAddr,
        ends_answers: bool,
    ) -> Result<()> {
        /// For fewer it costs more to ask than it saves.
        const MANY: usize = 16;
        if let Some(flow) = flows.iter().find(|flow| flow.is_ipv4() != next_hop.is_ipv4()) {
            return Err(Error::refused(
                format!("{} to {}, steered to {next_hop}", flow.remote, flow.local),
                "name a next hop of the same address family",
            )
            .at("steer"));
        }
        let ipv6 = next_hop.is_ipv6();
        // Where the first is not steered, none is, as a rule: nothing has to be taken out, which takes half of the time.
        let seem_new = flows.len() >= MANY
            && !self.present(socket, ipv6, &flows[..1], &[TO]).map_err(failed)?[&flows[0]].steered;
        self.change(socket, ipv6, flows, seem_new, |change| {
            let flows = change.flows;
            change.take_out(TO, flows, |entry| entry.steered);
            change.take_out(END, flows, |entry| entry.ends);
            let write = |element: &mut Message<'_>, _: &Flow| set::write_address(element, next_hop);
            change.transaction.add(TO.name(ipv6), flows.iter(), write);
            change.have_alive();
            if ends_answers {
                change.forget(&reversed(flows));
            }
        })
    }

    /// Ends the steering of connections. Others are passed over. Returns how many were steered.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn stop(&self, flows: &[Flow]) -> Result<usize> {
        with_socket(|socket| {
            let stopped = self.count_by(socket, flows);
            self.forget_by(socket, flows).and(stopped)
        })
    }

    /// How many of the connections are steered.
    pub(super) fn count_by(&self, socket: &mut Socket, flows: &[Flow]) -> Result<usize> {
        let mut steered = 0;
        for ipv6 in [false, true] {
            let flows = of_family(flows, ipv6);
            if !flows.is_empty() {
                let present = self.present(socket, ipv6, &flows, &[TO, ALIVE]).map_err(failed)?;
                steered += flows.iter().filter(|flow| present[*flow].steered && present[*flow].alive).count();
            }
        }
        Ok(steered)
    }

    /// Those of the connections that are in the map: all that are steered, and maybe some whose steering has ended by itself. Packets do
    /// not change that meanwhile.
    pub(super) fn entered_by(&self, socket: &mut Socket, flows: &[Flow]) -> Result<Vec<Flow>> {
        let mut entered = Vec::new();
        for ipv6 in [false, true] {
            let present = self.present(socket, ipv6, &of_family(flows, ipv6), &[TO]).map_err(failed)?;
            entered.extend(present.into_iter().filter(|(_, entry)| entry.steered).map(|(flow, _)| flow));
        }
        Ok(entered)
    }

    /// Ends the steering of those of the connections that are steered.
    pub(super) fn forget_by(&self, socket: &mut Socket, flows: &[Flow]) -> Result<()> {
        for ipv6 in [false, true] {
            self.change(socket, ipv6, &of_family(flows, ipv6), false, |change| {
                change.forget(change.flows);
            })?;
        }
        Ok(())
    }

    /// The connections that are steered.
    ///
    /// # Errors
    /// `ENOENT` where it has been removed; `EPERM` without `CAP_NET_ADMIN`.
    pub fn contents(&self) -> Result<Vec<Steered>> {
        with_socket(|socket| self.contents_by(socket))
    }

    pub(super) fn contents_by(&self, socket: &mut Socket) -> Result<Vec<Steered>> {
        let mut contents = Vec::new();
        for ipv6 in [false, true] {
            contents.extend(self.contents_of(socket, ipv6).map_err(failed)?);
        }
        Ok(contents)
    }

    /// Ends the steering of everything between these two devices.
    ///
    /// # Errors
    /// `ENOENT` where it has been removed already; `EPERM` without `CAP_NET_ADMIN`.
    pub fn remove(&self) -> Result<()> {
        with_socket(|socket| self.remove_by(socket))
    }

    pub(super) fn remove_by(&self, socket: &mut Socket) -> Result<()> {
        let (mut batch, name) = (Batch::new(), self.table());
        let mut transaction = Transaction::begin(&mut batch, Table::netdev(&name));
        transaction.remove();
        transaction.commit(socket).map_err(|error| Error::system("nft delete table netdev", error))
    }

    /// Removes the table if nothing is steered. Returns whether it is gone.
    pub(super) fn remove_unused_by(&self, socket: &mut Socket) -> Result<bool> {
        if !self.contents_by(socket)?.is_empty() {
            return Ok(false);
        }
        // What has ended by itself is still in the map.
        for ipv6 in [false, true] {
            self.make_room(socket, ipv6)?;
        }
        let (mut batch, name) = (Batch::new(), self.table());
        let table = Table::netdev(&name);
        let chains = nftables::chains(socket, table).map_err(failed)?;
        let mut transaction = Transaction::begin(&mut batch, table);
        let chains: Vec<&str> = chains.iter().map(String::as_str).collect();
        // Of the other sets, nothing counts that is not in the map.
        transaction.remove_empty(&chains, [false, true].map(|ipv6| TO.name(ipv6)));
        match transaction.commit(socket) {
            // Something is steered by now.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            removed => absent("nft delete table netdev", removed).map(|()| true),
        }
    }

    fn table(&self) -> String {
        format!("{PREFIX}{}/{}", self.ingress, self.egress)
    }

    /// Which of these connections are in the sets.
    fn present(
        &self,
        socket: &mut Socket,
        ipv6: bool,
        flows: &[Flow],
        sets: &[Names],
    ) -> io::Result<HashMap<Flow, Entry>> {
        let name = self.table();
        let table = Table::netdev(&name);
        let mut present: HashMap<Flow, Entry> = flows.iter().map(|flow| (*flow, Entry::default())).collect();
        for set in sets {
            for flow in nftables::present(socket, table, set.name(ipv6), flows)? {
                if let Some(entry) = present.get_mut(&flow) {
                    entry.steered |= *set == TO;
                    entry.alive |= *set == ALIVE;
                    entry.ends |= *set == END;
                }
            }
        }
        Ok(present)
    }

    fn contents_of(&self, socket: &mut Socket, ipv6: bool) -> io::Result<Vec<Steered>> {
        let name = self.table();
        let table = Table::netdev(&name);
        let whole = nftables::set_timeout(socket, table, ALIVE.name(ipv6))?.unwrap_or_default();
        let closing = nftables::set_timeout(socket, table, END.name(ipv6))?.unwrap_or_default();
        let ends: HashMap<Flow, Duration> =
            nftables::contents(socket, table, END.name(ipv6), |flow, element| {
                (flow, time(element, ELEMENT_TIMEOUT).unwrap_or(closing))
            })?
            .into_iter()
            .collect();
        let alive: HashMap<_, _> = nftables::contents(socket, table, ALIVE.name(ipv6), |flow, element| {
            let left = time(element, ELEMENT_EXPIRATION).unwrap_or_default();
            (flow, (left, set::read_counter(element).unwrap_or_default()))
        })?
        .into_iter()
        .collect();
        let contents = nftables::contents(socket, table, TO.name(ipv6), |flow, element| {
            let (remaining, counter) = *alive.get(&flow)?;
            // Each packet is counted when it is looked up, and when it prolongs the time.
            let [packets, bytes] = counter.map(|twice| twice / 2);
            let ends = ends.get(&flow);
            let idle = ends.unwrap_or(&whole).saturating_sub(remaining);
            let next_hop = set::read_address(element)?;
            Some(Steered { flow, next_hop, packets, bytes, idle, remaining, closing: ends.is_some() })
        })?;
        Ok(contents.into_iter().flatten().collect())
    }
}

/// The answers to these connections.
pub(super) fn reversed(flows: &[Flow]) -> Vec<Flow> {
    flows.iter().map(Flow::reversed).collect()
}

/// Each connection once, by its addresses on the wire.
pub(super) fn distinct(flows: &[Flow]) -> Vec<Flow> {
    let mut known = HashSet::with_capacity(flows.len());
    flows.iter().map(Flow::on_the_wire).filter(|flow| known.insert(*flow)).collect()
}

fn of_family(flows: &[Flow], ipv6: bool) -> Vec<Flow> {
    let mut flows = distinct(flows);
    flows.retain(|flow| flow.is_ipv4() != ipv6);
    flows
}

fn time(element: &[u8], kind: u16) -> Option<Duration> {
    value(element, kind).and_then(milliseconds)
}

fn failed(error: io::Error) -> Error {
    Error::system("nft list", error)
}

const NEEDS: &str = "needs nftables with CONFIG_NFT_FWD_NETDEV and CONFIG_NF_TABLES_NETDEV; CAP_NET_ADMIN, as root or \
                     under `unshare -Urn`";
