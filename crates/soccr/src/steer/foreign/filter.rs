//! The table of the new host: what delivers, and what belongs to each host from which packets come.

use std::io;

use soccr_netlink::{Batch, Rtnetlink, Socket};

use super::Foreign;
use crate::error::{Error, Result};
use crate::nftables::{self, Hook, Table, Transaction};
use crate::segment::flags;
use crate::steer::{NextHop, index, system};
use crate::sys::MARK;

impl Foreign {
    /// The indices of the devices by which its packets come, as far as they are known. Some may be gone.
    pub(in crate::steer) fn arrivals(&self, socket: &mut Socket) -> Result<Vec<u32>> {
        let name = self.table();
        let chains = system("nft list", nftables::chains(socket, Table::ip(&name, self.ipv6())))?;
        Ok(chains.iter().filter_map(|chain| device_of(chain)).collect())
    }

    /// Adds what belongs to one host from which packets come to what is there for others.
    pub(super) fn filter(
        &self,
        socket: &mut Socket,
        route: &Rtnetlink,
        from: Option<&NextHop>,
    ) -> Result<()> {
        /// Others may add theirs at the same time.
        const ATTEMPTS: usize = 4;
        let hop = from.map(|hop| Ok((hop, index(route, hop.device())?))).transpose()?;
        let mut made = Ok(());
        for _ in 0..ATTEMPTS {
            made = self.complete(socket, route, hop);
            if !matches!(&made, Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENOENT)))
            {
                break;
            }
        }
        let needs = "needs nftables with CONFIG_NFT_SOCKET; CAP_NET_ADMIN, as root or under `unshare -Urn`";
        made.map_err(|error| Error::system("nft add table", error).advise(needs))
    }

    fn complete(
        &self,
        socket: &mut Socket,
        route: &Rtnetlink,
        hop: Option<(&NextHop, u32)>,
    ) -> io::Result<()> {
        let name = self.table();
        let table = Table::ip(&name, self.ipv6());
        let is_there = nftables::has_chain(socket, table, CHAIN)?;
        let wanted = hop.map(|(hop, device)| resets(hop, device));
        if is_there && wanted.map_or(Ok(true), |wanted| nftables::has_chain(socket, table, &wanted))? {
            return Ok(());
        }
        let mut made = Ok(());
        // Not every kernel can copy packets. What is missing may also be a chain that somebody else has just deleted, once.
        for copies in [true, true, false] {
            made = self.create(socket, route, is_there, hop, copies);
            if !matches!(&made, Err(error) if hop.is_some() && is_missing(error)) {
                break;
            }
        }
        made
    }

    fn create(
        &self,
        socket: &mut Socket,
        route: &Rtnetlink,
        is_there: bool,
        hop: Option<(&NextHop, u32)>,
        copies: bool,
    ) -> io::Result<()> {
        let name = self.table();
        let table = Table::ip(&name, self.ipv6());
        let old = nftables::chains(socket, table)?;
        let mut batch = Batch::new();
        let mut transaction = Transaction::begin(&mut batch, table);
        if is_there {
            let is_gone =
                |chain: &&String| device_of(chain).is_some_and(|device| route.name(device).is_err());
            old.iter().filter(is_gone).for_each(|chain| transaction.delete_chain(chain));
        } else {
            match nftables::names(socket, table.family)?.contains(&name) {
                true => transaction.replace_table(),
                false => transaction.create_table(false),
            }
            self.deliver_to_sockets(&mut transaction);
        }
        transaction.rule(CHAIN, |rule| {
            rule.is_to(self.address);
            rule.is_protocol(libc::IPPROTO_TCP);
            if let Some((_, device)) = hop {
                rule.arrives_by(device);
            }
            rule.lacks_mark(MARK);
            rule.drop();
        });
        if let Some((hop, device)) = hop {
            let hook = Hook { number: Hook::OUTPUT, priority: Hook::FILTER, device: None };
            let chain = resets(hop, device);
            transaction.create_chain(&chain, hook);
            if copies {
                transaction.rule(&chain, |rule| {
                    rule.is_from(self.address);
                    rule.is_protocol(libc::IPPROTO_TCP);
                    rule.has_tcp_flags(flags::RST, flags::RST);
                    rule.copy_to(hop.address(), device);
                });
            }
        }
        transaction.commit(socket)
    }

    fn deliver_to_sockets(&self, transaction: &mut Transaction<'_>) {
        let hook = Hook { number: Hook::PREROUTING, priority: Hook::MANGLE, device: None };
        transaction.create_chain(CHAIN, hook);
        let icmp = if self.ipv6() { libc::IPPROTO_ICMPV6 } else { libc::IPPROTO_ICMP };
        for protocol in [libc::IPPROTO_TCP, icmp] {
            transaction.rule(CHAIN, |rule| {
                rule.is_to(self.address);
                rule.is_protocol(protocol);
                rule.is_for_transparent_socket();
                rule.mark(self.numbers.mark);
                rule.accept();
            });
        }
    }
}

pub(super) const CHAIN: &str = "in";
const RESETS: &str = "resets-";

/// The chain that copies resets to a host. Its name tells to which: `:` does not go into one. The device is named by its index, because it
/// may be made anew under the same name.
pub(super) fn resets(hop: &NextHop, device: u32) -> String {
    format!("{RESETS}{}/{device}", hop.address()).replace(':', "-")
}

/// The index of the device in such a name.
fn device_of(chain: &str) -> Option<u32> {
    chain.strip_prefix(RESETS)?.rsplit_once('/')?.1.parse().ok()
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP))
}
