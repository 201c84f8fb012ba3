//! Policy routing: rules that send marked packets to a table of their own.

use std::io;
use std::net::IpAddr;

use super::{REPLACE, RTA_DST, RTA_GATEWAY, RTA_OIF, RTM_NEWROUTE, Rtnetlink, address_of, family, octets};
use crate::{Batch, CREATE, DUMP, EXCLUSIVE, Message, REQUEST, attributes};

/// A rule of policy routing (`ip rule`): packets with a mark are routed by a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The order among the rules: the smallest comes first.
    pub priority: u32,
    /// The mark that the packets carry, under the mask.
    pub mark: u32,
    /// Zero: packets with any mark.
    pub mask: u32,
    /// The address that they are for; `None` for all, and for networks.
    pub to: Option<IpAddr>,
    /// The address that they are from; `None` for all, and for networks.
    pub from: Option<IpAddr>,
    /// The number of the table.
    pub table: u32,
    /// Who has made the rule (`RTPROT_…`).
    pub protocol: u8,
}

impl Rtnetlink {
    /// The rules of an address family, in their order.
    ///
    /// # Errors
    /// `EAFNOSUPPORT` where the kernel has no policy routing.
    pub fn policies(&mut self, ipv6: bool) -> io::Result<Vec<Policy>> {
        let mut batch = Batch::new();
        batch.message(GET_RULE, REQUEST | DUMP, |m| m.bytes(&header(family(any(ipv6)), 0, 0)));
        self.socket.dump_all(&batch, |policies, payload| policies.extend(parse(payload)))
    }

    /// Adds a rule for the address in it.
    ///
    /// # Errors
    /// `EEXIST` where there is the same one; `EPERM`.
    pub fn add_policy(&mut self, policy: &Policy, ipv6: bool) -> io::Result<()> {
        self.change(NEW_RULE, CREATE | EXCLUSIVE, |m| write(m, policy, ipv6))
    }

    /// Removes a rule.
    ///
    /// # Errors
    /// `ENOENT` where there is none like it; `EPERM`.
    pub fn remove_policy(&mut self, policy: &Policy, ipv6: bool) -> io::Result<()> {
        self.change(DELETE_RULE, 0, |m| write(m, policy, ipv6))
    }

    /// Makes a table deliver every packet to this host: `ip route add local default dev lo`.
    ///
    /// # Errors
    /// `EEXIST` where the table has a default route; `EPERM`.
    pub fn add_local_table(&mut self, table: u32, ipv6: bool, protocol: u8) -> io::Result<()> {
        let lo = self.index("lo")?;
        self.change(RTM_NEWROUTE, CREATE | EXCLUSIVE, |m| local_route(m, table, ipv6, protocol, lo))
    }

    /// Takes that route away again.
    ///
    /// # Errors
    /// `ESRCH` where there is none; `EPERM`.
    pub fn remove_local_table(&mut self, table: u32, ipv6: bool, protocol: u8) -> io::Result<()> {
        let lo = self.index("lo")?;
        self.change(DELETE_ROUTE, 0, |m| local_route(m, table, ipv6, protocol, lo))
    }

    /// Makes a table send every packet to a router on a link, whatever its default route was.
    ///
    /// # Errors
    /// `EHOSTUNREACH` or `ENETUNREACH` where the router is not on the link; `EPERM`.
    pub fn add_gateway_table(
        &mut self,
        table: u32,
        gateway: IpAddr,
        link: u32,
        protocol: u8,
    ) -> io::Result<()> {
        self.change(RTM_NEWROUTE, CREATE | REPLACE, |m| {
            default_route(m, table, gateway.is_ipv6(), protocol, [SCOPE_UNIVERSE, TYPE_UNICAST]);
            m.u32(RTA_OIF, link);
            m.attribute(RTA_GATEWAY, &octets(gateway));
        })
    }

    /// Takes that route away again.
    ///
    /// # Errors
    /// `ESRCH` where there is none; `EPERM`.
    pub fn remove_gateway_table(&mut self, table: u32, ipv6: bool, protocol: u8) -> io::Result<()> {
        self.change(DELETE_ROUTE, 0, |m| {
            default_route(m, table, ipv6, protocol, [SCOPE_UNIVERSE, TYPE_UNICAST]);
        })
    }

    /// The router and the link of the default route of a table.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub fn gateway_of_table(&mut self, table: u32, ipv6: bool) -> io::Result<Option<(IpAddr, u32)>> {
        let routes = self.routes_of_table(table, ipv6, |_, rest| {
            let find = |kind| attributes(rest).find(|attribute| attribute.0 == kind).map(|found| found.1);
            Some((address_of(find(RTA_GATEWAY)?)?, u32_of(find(RTA_OIF)?)?))
        })?;
        Ok(routes.into_iter().flatten().next())
    }

    /// Who has made the routes of a table (`RTPROT_…`), one entry for each route.
    ///
    /// # Errors
    /// The errors of the kernel.
    pub fn table_protocols(&mut self, table: u32, ipv6: bool) -> io::Result<Vec<u8>> {
        self.routes_of_table(table, ipv6, |header, _| header[5])
    }

    fn routes_of_table<T>(
        &mut self,
        table: u32,
        ipv6: bool,
        mut read: impl FnMut(&[u8], &[u8]) -> T,
    ) -> io::Result<Vec<T>> {
        let mut batch = Batch::new();
        batch.message(GET_ROUTE, REQUEST | DUMP, |m| {
            let mut header = [0; 12];
            header[0] = family(any(ipv6));
            m.bytes(&header);
        });
        self.socket.dump_all(&batch, |routes, payload| {
            let Some((header, rest)) = payload.split_at_checked(12) else { return };
            let number =
                attributes(rest).find(|attribute| attribute.0 == RTA_TABLE).and_then(|a| u32_of(a.1));
            if number.unwrap_or(header[4].into()) == table {
                routes.push(read(header, rest));
            }
        })
    }
}

fn any(ipv6: bool) -> IpAddr {
    if ipv6 { [0; 16].into() } else { [0; 4].into() }
}

/// `struct fib_rule_hdr`.
fn header(family: u8, to_length: u8, from_length: u8) -> [u8; 12] {
    [family, to_length, from_length, 0, 0, 0, 0, TO_TABLE, 0, 0, 0, 0]
}

fn write(m: &mut Message<'_>, policy: &Policy, ipv6: bool) {
    let length = |address: Option<IpAddr>| address.map_or(0, |address| 8 * octets(address).len() as u8);
    m.bytes(&header(family(any(ipv6)), length(policy.to), length(policy.from)));
    for (kind, address) in [(FRA_DST, policy.to), (FRA_SRC, policy.from)] {
        if let Some(address) = address {
            m.attribute(kind, &octets(address));
        }
    }
    m.u32(FRA_PRIORITY, policy.priority);
    m.u32(FRA_FWMARK, policy.mark);
    m.u32(FRA_FWMASK, policy.mask);
    m.u32(FRA_TABLE, policy.table);
    m.attribute(FRA_PROTOCOL, &[policy.protocol]);
}

fn parse(payload: &[u8]) -> Option<Policy> {
    let (header, rest) = payload.split_at_checked(12)?;
    let table = header[4].into();
    let mut policy = Policy { priority: 0, mark: 0, mask: 0, to: None, from: None, table, protocol: 0 };
    for (kind, value) in attributes(rest) {
        match (kind, u32_of(value)) {
            (FRA_PRIORITY, Some(number)) => policy.priority = number,
            (FRA_FWMARK, Some(number)) => policy.mark = number,
            (FRA_FWMASK, Some(number)) => policy.mask = number,
            (FRA_TABLE, Some(number)) => policy.table = number,
            (FRA_PROTOCOL, _) => policy.protocol = *value.first()?,
            (FRA_DST, _) if usize::from(header[1]) == 8 * value.len() => policy.to = address_of(value),
            (FRA_SRC, _) if usize::from(header[2]) == 8 * value.len() => policy.from = address_of(value),
            _ => {}
        }
    }
    Some(policy)
}

fn local_route(m: &mut Message<'_>, table: u32, ipv6: bool, protocol: u8, lo: u32) {
    default_route(m, table, ipv6, protocol, [SCOPE_HOST, TYPE_LOCAL]);
    m.u32(RTA_OIF, lo);
}

fn default_route(m: &mut Message<'_>, table: u32, ipv6: bool, protocol: u8, [scope, kind]: [u8; 2]) {
    m.bytes(&[family(any(ipv6)), 0, 0, 0, 0, protocol, scope, kind, 0, 0, 0, 0]);
    m.attribute(RTA_DST, &octets(any(ipv6)));
    m.u32(RTA_TABLE, table);
}

fn u32_of(value: &[u8]) -> Option<u32> {
    value.try_into().map(u32::from_ne_bytes).ok()
}

// linux/rtnetlink.h, linux/fib_rules.h
const DELETE_ROUTE: u16 = 25;
const GET_ROUTE: u16 = 26;
const NEW_RULE: u16 = 32;
const DELETE_RULE: u16 = 33;
const GET_RULE: u16 = 34;
const RTA_TABLE: u16 = 15;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_HOST: u8 = 254;
const TYPE_UNICAST: u8 = 1;
const TYPE_LOCAL: u8 = 2;
const TO_TABLE: u8 = 1;
const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;
