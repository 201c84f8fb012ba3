//! The table of the old host: its maps and sets, and the rules that forward and end.

use super::Times;
use crate::nftables::rule::{Direction, Expressions};
use crate::nftables::set::{CAPACITY, Set};
use crate::nftables::{Hook, Transaction};

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Marks, between the chains of one device, what is not steered. Nobody else ever sees it.
pub(in crate::steer) const NOT_STEERED: u32 = 0x50cd;

/// Destination unreachable ("fragmentation needed" is one of its codes), time exceeded.
pub(in crate::steer) const ICMP_ERRORS: [&[u8]; 2] = [&[3, 11], &[1, 2, 3]];

/// The parts of a table, of which there is one for each address family.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Names([&'static str; 2]);

pub(super) const TO: Names = Names(["to4", "to6"]);
pub(super) const ALIVE: Names = Names(["alive4", "alive6"]);
pub(super) const END: Names = Names(["end4", "end6"]);

impl Names {
    pub(super) fn name(self, ipv6: bool) -> &'static str {
        self.0[usize::from(ipv6)]
    }
}

/// The chains of a table, of which the second is none where packets arrive and leave by one device. They know devices by their
/// indices, and are named after these: a device that is made anew under the same name has another one.
pub(super) struct Chains {
    forward: String,
    back: Option<String>,
    egress: u32,
}

impl Chains {
    pub(super) fn new(ingress: u32, egress: u32) -> Self {
        let back = (ingress != egress).then(|| format!("back-{ingress}-{egress}"));
        Self { forward: format!("in-{ingress}-{egress}"), back, egress }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        [&self.forward].into_iter().chain(&self.back).map(String::as_str)
    }
}

pub(super) fn create_sets(transaction: &mut Transaction<'_>, times: Times) {
    transaction.create_table(false);
    for ipv6 in [false, true] {
        let set = Set { name: "", ipv6, size: Some(CAPACITY), timeout: false, map: false, dynamic: None };
        transaction.create_set(&Set { name: TO.name(ipv6), map: true, ..set });
        transaction.create_set(&Set { name: ALIVE.name(ipv6), dynamic: Some(times.idle), ..set });
        transaction.create_set(&Set { name: END.name(ipv6), dynamic: Some(times.closing), ..set });
    }
}

pub(super) fn create_chains(
    transaction: &mut Transaction<'_>,
    chains: &Chains,
    [ingress, egress]: [&str; 2],
    times: Times,
) {
    let hook = |device, priority| Hook { number: Hook::INGRESS, priority, device: Some(device) };
    let chain = chains.forward.as_str();
    transaction.create_chain(chain, hook(ingress, Hook::RAW));
    let back = chains.back.as_deref().map_or(chain, |back| {
        // Before a table that forwards what comes from there.
        transaction.create_chain(back, hook(egress, Hook::RAW - 1));
        back
    });
    // The mark stays for the chains of other tables at the same device.
    transaction.rule(chain, |rule| {
        rule.has_mark(NOT_STEERED);
        rule.accept();
    });
    let tcp = |rule: &mut Expressions<'_, '_>, ipv6, mask, flags| {
        rule.carries_ipv6(ipv6);
        rule.is_protocol(libc::IPPROTO_TCP);
        rule.has_tcp_flags(mask, flags);
        rule.load_key(ipv6, Direction::In);
    };
    let forward = |rule: &mut Expressions<'_, '_>, ipv6, ending, timeout| {
        rule.look_up(TO.name(ipv6));
        rule.has_key(ALIVE.name(ipv6));
        if ending {
            rule.keep_in(END.name(ipv6), timeout);
        }
        rule.keep_in(ALIVE.name(ipv6), timeout);
        rule.forward(chains.egress, ipv6);
    };
    // Nearly all packets, so they pass as few rules as can be.
    for ipv6 in [false, true] {
        transaction.rule(chain, |rule| {
            tcp(rule, ipv6, FIN | SYN | RST, 0);
            rule.lacks_key(END.name(ipv6));
            forward(rule, ipv6, false, None);
        });
    }
    for ipv6 in [false, true] {
        transaction.rule(back, |rule| {
            rule.carries_ipv6(ipv6);
            rule.is_protocol(libc::IPPROTO_TCP);
            rule.has_tcp_flags(RST, RST);
            rule.load_key(ipv6, Direction::Out);
            rule.look_up(TO.name(ipv6));
            rule.has_key(ALIVE.name(ipv6));
            rule.keep_in(END.name(ipv6), Some(times.reset));
            rule.keep_in(ALIVE.name(ipv6), Some(times.reset));
        });
    }
    for ipv6 in [false, true] {
        for (flag, timeout) in [(FIN, times.closing), (RST, times.reset)] {
            transaction.rule(chain, |rule| {
                tcp(rule, ipv6, flag, flag);
                forward(rule, ipv6, true, Some(timeout));
            });
        }
        // A peer that has ended the connection begins another one: with this host.
        transaction.rule(chain, |rule| {
            tcp(rule, ipv6, SYN | ACK, SYN);
            rule.has_key(END.name(ipv6));
            rule.take_out(END.name(ipv6));
            rule.take_out(ALIVE.name(ipv6));
            rule.accept();
        });
        transaction.rule(chain, |rule| {
            const ANY: u8 = 0;
            tcp(rule, ipv6, ANY, ANY);
            rule.has_key(END.name(ipv6));
            forward(rule, ipv6, false, Some(times.closing));
        });
        // The socket answers it.
        transaction.rule(chain, |rule| {
            tcp(rule, ipv6, SYN, SYN);
            forward(rule, ipv6, false, None);
        });
        for kind in ICMP_ERRORS[usize::from(ipv6)] {
            transaction.rule(chain, |rule| {
                rule.carries_ipv6(ipv6);
                rule.is_icmp(ipv6, *kind);
                rule.load_quoted_key(ipv6);
                forward(rule, ipv6, false, None);
            });
        }
    }
}
