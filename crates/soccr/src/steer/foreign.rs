//! The new host: packets for an address that it does not have are delivered, to restored connections alone.
//!
//! ```text
//! ip route: local default dev lo table 20684
//! ip rule:  1000: to 192.0.2.1 fwmark 0x50cc lookup 20684       what the table below has marked
//!           1001: to 192.0.2.1 fwmark 0xc114 lookup 20684       segments that play the peer's
//!           1002: from 192.0.2.1 lookup 0x53……            where answers go back through the old host
//! table ip soccr-foreign-192.0.2.1 {
//!   chain in { type filter hook prerouting priority mangle
//!     ip daddr 192.0.2.1 meta l4proto tcp  socket transparent 1  meta mark set 0x50cc accept
//!     ip daddr 192.0.2.1 meta l4proto icmp socket transparent 1  meta mark set 0x50cc accept
//!     ip daddr 192.0.2.1 meta l4proto tcp  iif eth0 meta mark != 0xc114 drop   what the old host has sent
//!   }
//!   chain resets-192.0.2.1/2 { type filter hook output priority filter
//!     ip saddr 192.0.2.1 tcp flags rst  dup to 192.0.2.1 device eth0         the old host forgets the connection
//! } }
//! ```
//!
//! Packets may come from several hosts: from the one that has the address, and from others that have got connections from it. Each has the
//! last rule of `in` for its device, and a chain `resets` of its own, which is empty where the kernel cannot copy packets: its name tells
//! by which device the host is reached.
//!
//! The last rule of `in` drops what comes for a connection that is gone: otherwise the two hosts would send it back and forth.
//! What comes by other devices is none of its affair: this host may be a router on the way to the address. The
//! address is on no link, so that no ARP or neighbour discovery ever tells of it.

mod filter;

use std::net::IpAddr;

use soccr_netlink::{Batch, Family, Link, Packet, Policy, Rtnetlink, Socket};

use super::{NextHop, Steerer, absent, index, number_of, present, system, with_route, with_socket};
use crate::error::{Error, Result};
use crate::nftables::{self, Table, Transaction};
use crate::sys::MARK;

use filter::{CHAIN, resets};

const PREFIX: &str = "soccr-foreign-";

/// The maker of our routes and rules (`RTPROT_…`), by which they are told from those of others.
const OURS: u8 = 193;

/// The numbers that the delivery takes in this network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Numbers {
    /// The mark of packets that are delivered: 0x50cc.
    pub mark: u32,
    /// The routing table that delivers them: 20684.
    pub table: u32,
    /// The priority of the first of three rules: 1000.
    pub priority: u32,
    /// The routing table by which answers go back through the old host, where they do: one for each address. `None`: its number is
    /// made from the address, and begins with 0x53.
    pub answers: Option<u32>,
}

impl Default for Numbers {
    fn default() -> Self {
        Self { mark: 0x50cc, table: 0x50cc, priority: 1000, answers: None }
    }
}

/// An address of another host whose packets are delivered here, to the sockets that have been restored with it. It belongs
/// to no process.
///
/// In `nft list ruleset` it is the table `soccr-foreign-` and the address, with `-` for each colon; its routes and rules
/// have `proto 193`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreign {
    address: IpAddr,
    numbers: Numbers,
}

impl Foreign {
    /// Delivers packets for this address from now on, in the network namespace of the calling thread. What is there already
    /// stays.
    ///
    /// A connection with this local address can be [restored](crate::Connection::restore) then. Its socket is made
    /// transparent for that (`IP_TRANSPARENT`), and is not any more when the connection is restored where its address is.
    ///
    /// # Errors
    /// Refused: others use the mark or the table; nothing is changed then. `EPERM` without `CAP_NET_ADMIN`;
    /// `EOPNOTSUPP` or `ENOENT` where the kernel lacks policy routing or `CONFIG_NFT_SOCKET`.
    pub fn deliver(address: IpAddr, numbers: Numbers) -> Result<Self> {
        Self::deliver_from(address, numbers, None)
    }

    /// The same, where the host is known from which the packets come: the old one, as this one reaches it. It hears of connections that are
    /// reset here (nft `dup`, where the kernel has it), and forgets them; otherwise it would steer them for a day. TCP packets for the
    /// address that no restored connection takes are dropped only where they arrive by the device that leads there.
    ///
    /// # Errors
    /// The errors of [`deliver`](Self::deliver); `ENODEV` where there is no such device. Refused: that host is named by an address of
    /// another address family.
    pub fn deliver_from(address: IpAddr, numbers: Numbers, from: Option<&NextHop>) -> Result<Self> {
        Steerer::new()?.deliver(address, numbers, from)
    }

    pub(super) fn deliver_by(
        socket: &mut Socket,
        route: &mut Rtnetlink,
        address: IpAddr,
        numbers: Numbers,
        from: Option<&NextHop>,
    ) -> Result<Self> {
        let foreign = Self { address: address.to_canonical(), numbers };
        from.map_or(Ok(()), |from| foreign.is_reached_by(from))?;
        let known = foreign.check(route)?;
        let made = foreign.route(route).and_then(|()| foreign.filter(socket, route, from));
        if made.is_err() && !known {
            let _ = foreign.withdraw(route);
        }
        made.map(|()| foreign)
    }

    /// Looks whether packets of a peer that arrive by a device would be delivered.
    ///
    /// # Errors
    /// Refused: `rp_filter` would drop them, because packets to the peer leave by another device, or a rule of others comes before.
    pub fn check_arrival(&self, peer: IpAddr, device: &str) -> Result<()> {
        with_route(|route| {
            let link = Link::From(index(route, device)?);
            let packet = Packet {
                from: Some(peer.to_canonical()),
                link,
                mark: self.numbers.mark,
                ..Packet::to(self.address)
            };
            let what = format!("packets of {peer} that arrive by {device}");
            match route.way(packet) {
                Ok(way) if way.local => Ok(()),
                // Kernels before 6.14 say EXDEV.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EXDEV)) => {
                    Err(Error::refused(
                        format!("{what}: rp_filter would drop them"),
                        format!(
                            "allow them: `sysctl -w net.ipv4.conf.{device}.rp_filter=2`, or answer through the old host"
                        ),
                    ))
                }
                Err(error) => Err(Error::system("ip route get", error).advise("see `ip rule`")),
                Ok(_) => {
                    Err(Error::refused(format!("{what}: a rule of others leads them away"), "see `ip rule`"))
                }
            }
        })
    }

    /// Has what sockets with this address send go back through the old host, where the network between this one and the peers forbids
    /// foreign sources. That host has to [send it on](super::redirect_answers).
    ///
    /// # Errors
    /// Refused: others use the routing table, or the host is named by an address of another address family. `EPERM` without
    /// `CAP_NET_ADMIN`.
    pub fn answer_through(&self, hop: &NextHop) -> Result<()> {
        with_route(|route| {
            self.is_reached_by(hop)?;
            let link = index(route, hop.device())?;
            let (policy, ipv6) = (self.answering(), self.ipv6());
            if system("ip route", route.table_protocols(policy.table, ipv6))?.iter().any(|by| *by != OURS) {
                return Err(Error::refused(
                    format!("routing table {}, which has routes of others", policy.table),
                    "choose another number",
                ));
            }
            let added = route.add_policy(&policy, ipv6);
            let is_new = added.is_ok();
            present("ip rule", added)?;
            let routed = route.add_gateway_table(policy.table, hop.address(), link, OURS);
            if routed.is_err() && is_new {
                let _ = route.remove_policy(&policy, ipv6);
            }
            system("ip route", routed)
        })
    }

    /// Has what sockets with this address send go by the routes of this host again.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn answer_directly(&self) -> Result<()> {
        with_route(|route| {
            let (policy, ipv6) = (self.answering(), self.ipv6());
            absent("ip rule", route.remove_policy(&policy, ipv6))?;
            absent("ip route", route.remove_gateway_table(policy.table, ipv6, OURS))
        })
    }

    /// Through which host sockets with this address answer; `None`: directly. It holds for all of them.
    ///
    /// # Errors
    /// The errors of reading rules and routes.
    pub fn answers(&self) -> Result<Option<NextHop>> {
        with_route(|route| {
            let there = list(route)?.into_iter().find(|foreign| foreign.address == self.address);
            there.map_or(Ok(None), |there| there.answers_by(route))
        })
    }

    /// Whether the nftables table is there, without which nothing is delivered: `nft flush ruleset` removes it.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn is_complete(&self) -> Result<bool> {
        let name = self.table();
        with_socket(|socket| {
            system("nft list", nftables::has_chain(socket, Table::ip(&name, self.ipv6()), CHAIN))
        })
    }

    /// The addresses whose packets are delivered, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The errors of reading the rules.
    pub fn list() -> Result<Vec<Self>> {
        with_route(list)
    }

    /// The address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The numbers that it takes.
    pub fn numbers(&self) -> Numbers {
        self.numbers
    }

    /// Delivers packets for this address no more. Connections that have it stay silent from then on.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`.
    pub fn remove(&self) -> Result<()> {
        with_route(|route| self.withdraw(route))
    }

    fn is_reached_by(&self, hop: &NextHop) -> Result<()> {
        if hop.address().is_ipv6() == self.ipv6() {
            return Ok(());
        }
        let what = format!("packets for {}, whose host is reached as {}", self.address, hop.address());
        Err(Error::refused(what, "name it by an address of the same address family"))
    }

    fn ipv6(&self) -> bool {
        self.address.is_ipv6()
    }

    fn table(&self) -> String {
        format!("{PREFIX}{}", self.address.to_string().replace(':', "-"))
    }

    fn policies(&self) -> [Policy; 2] {
        let Numbers { mark, table, priority, .. } = self.numbers;
        let policy = Policy {
            priority,
            mark,
            mask: u32::MAX,
            to: Some(self.address),
            from: None,
            table,
            protocol: OURS,
        };
        // Without the address a played segment for one that is not foreign would be delivered twice.
        [policy, Policy { priority: priority + 1, mark: MARK, ..policy }]
    }

    /// By whom its sockets answer, where not directly.
    pub(super) fn answers_by(&self, route: &mut Rtnetlink) -> Result<Option<NextHop>> {
        let Some(table) = self.numbers.answers else { return Ok(None) };
        let Some((address, link)) = system("ip route", route.gateway_of_table(table, self.ipv6()))? else {
            return Ok(None);
        };
        let device = route.name(link).map_err(|error| Error::system("if_indextoname", error))?;
        Ok(Some(NextHop::known(address, &device)))
    }

    /// Whether it answers through one of these hosts, or tells it of resets.
    pub(super) fn depends_on(
        &self,
        socket: &mut Socket,
        route: &mut Rtnetlink,
        hops: &[NextHop],
    ) -> Result<bool> {
        let name = self.table();
        for hop in hops {
            let Ok(device) = route.index(hop.device()) else { continue };
            let chain = resets(hop, device);
            if system("nft list", nftables::has_chain(socket, Table::ip(&name, self.ipv6()), &chain))? {
                return Ok(true);
            }
        }
        Ok(self.answers_by(route)?.is_some_and(|hop| hops.contains(&hop)))
    }

    /// What its sockets send.
    fn answering(&self) -> Policy {
        let table = self.numbers.answers.unwrap_or(0x5300_0000 | number_of(&[self.address]));
        let priority = self.numbers.priority + 2;
        Policy { priority, mark: 0, mask: 0, to: None, from: Some(self.address), table, protocol: OURS }
    }

    /// Whether it is there already; refuses numbers that others use.
    fn check(&self, route: &mut Rtnetlink) -> Result<bool> {
        let Numbers { mark, table, priority, .. } = self.numbers;
        let policies = system("ip rule", route.policies(self.ipv6()))?;
        let (ours, others): (Vec<_>, Vec<_>) =
            policies.into_iter().partition(|policy| policy.protocol == OURS);
        for other in others {
            let takes = |mark| other.mask != 0 && mark & other.mask == other.mark;
            let what = if other.table == table {
                format!("routing table {table}")
            } else if takes(mark) && (other.mark == mark || other.priority <= priority) {
                format!("the mark {mark:#x}")
            } else if takes(MARK) && other.priority <= priority {
                format!("the mark {MARK:#x}")
            } else {
                continue;
            };
            return Err(Error::refused(
                format!("{what}, which the rule {} of others uses (`ip rule`)", other.priority),
                "choose other numbers, or a smaller priority than that of the rule",
            ));
        }
        let known = self.policies().iter().all(|policy| ours.contains(policy));
        if !known
            && system("ip route", route.table_protocols(table, self.ipv6()))?.iter().any(|by| *by != OURS)
        {
            return Err(Error::refused(
                format!("routing table {table}, which has routes of others"),
                "choose another number",
            ));
        }
        Ok(known)
    }

    /// The rules come first and go last: they tell what is here.
    fn route(&self, route: &mut Rtnetlink) -> Result<()> {
        for policy in self.policies() {
            present("ip rule", route.add_policy(&policy, self.ipv6()))?;
        }
        present("ip route", route.add_local_table(self.numbers.table, self.ipv6(), OURS))
    }

    fn withdraw(&self, route: &mut Rtnetlink) -> Result<()> {
        let (name, ipv6, table) = (self.table(), self.ipv6(), self.numbers.table);
        let mut batch = Batch::new();
        let mut transaction = Transaction::begin(&mut batch, Table::ip(&name, ipv6));
        transaction.remove();
        let mut socket = system("netfilter socket", Socket::open(Family::Netfilter))?;
        let mut outcome = absent("nft delete table", transaction.commit(&mut socket));
        let answers = self.answering();
        outcome = outcome.and(absent("ip route", route.remove_gateway_table(answers.table, ipv6, OURS)));
        if !is_used(route, table, ipv6, Some(self.address))? {
            outcome = outcome.and(absent("ip route", route.remove_local_table(table, ipv6, OURS)));
        }
        for policy in self.policies().iter().chain([&answers]) {
            outcome = outcome.and(absent("ip rule", route.remove_policy(policy, ipv6)));
        }
        // Somebody may have come in between.
        if is_used(route, table, ipv6, None)? {
            outcome = outcome.and(present("ip route", route.add_local_table(table, ipv6, OURS)));
        }
        outcome
    }
}

/// Whether rules of ours need the table, but for those of one address.
fn is_used(route: &mut Rtnetlink, table: u32, ipv6: bool, but: Option<IpAddr>) -> Result<bool> {
    let policies = system("ip rule", route.policies(ipv6))?;
    let needs = |policy: &Policy| {
        policy.protocol == OURS && policy.table == table && (but.is_none() || policy.to != but)
    };
    Ok(policies.iter().any(needs))
}

pub(super) fn list(route: &mut Rtnetlink) -> Result<Vec<Foreign>> {
    let mut list = Vec::new();
    for ipv6 in [false, true] {
        let policies = match route.policies(ipv6) {
            // Without IPv6, nothing of it can be here.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {
                continue;
            }
            other => system("ip rule", other)?,
        };
        let ours = || policies.iter().filter(|policy| policy.protocol == OURS);
        for Policy { priority, mark, to, table, .. } in ours() {
            if let (Some(address), true) = (*to, *mark != MARK) {
                let answers = ours().find(|policy| policy.from == *to).map(|policy| policy.table);
                let numbers = Numbers { mark: *mark, table: *table, priority: *priority, answers };
                list.push(Foreign { address, numbers });
            }
        }
    }
    Ok(list)
}

/// Whether an address is not one of this host, in the network namespace of the calling thread.
///
/// # Errors
/// The errors of asking for the route.
pub fn is_foreign(address: IpAddr) -> Result<bool> {
    with_route(|route| is_foreign_to(route, address))
}

pub(super) fn is_foreign_to(route: &mut Rtnetlink, address: IpAddr) -> Result<bool> {
    match route.way(Packet::to(address)) {
        Ok(way) => Ok(!way.local),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH)) => {
            Ok(true)
        }
        Err(error) => Err(Error::system("ip route get", error)),
    }
}
