//! Hosts with addresses of their own on one Ethernet.

use std::io;
use std::net::IpAddr;

use crate::rtnetlink::{bridge, enslave, veth};
use crate::topology::{ETHERNET_MTU, LINK, end, forward, gateways, host};
use crate::{Host, Namespace, Rtnetlink, sysctl};

/// A peer behind a router, and hosts that are told apart by their addresses:
///
/// ```text
///                                                   ┌── 192.0.2.1  2001:db8::1  hosts[0]
///  peer  198.51.100.1  2001:db8:1::1 ─── router ────┼── 192.0.2.2  2001:db8::2  hosts[1]
///                                                   └── 192.0.2.3  2001:db8::3  hosts[2]
/// ```
///
/// or that have networks of their own, whose packets the router need not take under another's address:
///
/// ```text
///                                                   ┌── 192.0.2.1    2001:db8::1    hosts[0]
///  peer  198.51.100.1  2001:db8:1::1 ─── router ────┼── 203.0.113.2  2001:db8:2::2  hosts[1]
///                                                   └── 198.18.3.3   2001:db8:3::3  hosts[2]
/// ```
///
/// Neighbours find each other by ARP and neighbour discovery.
#[derive(Debug)]
pub struct Lan {
    /// The end that stays where it is, on the router's link `peer`.
    pub peer: Host,
    /// What lies between; it forwards.
    pub router: Namespace,
    /// The hosts, on the router's bridge `lan`, or on its links `host1` to `host3`.
    pub hosts: [Host; 3],
}

impl Lan {
    /// All hosts on one Ethernet.
    ///
    /// # Errors
    /// The errors of [`Namespace::new`] and [`Rtnetlink`].
    pub fn new() -> io::Result<Self> {
        Self::build(false)
    }

    /// Each host in a network of its own. The router is not strict about sources yet, see [`be_strict`](Self::be_strict).
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn routed() -> io::Result<Self> {
        Self::build(true)
    }

    /// Has the router drop what comes from a source that it would not reach by the same link (RFC 3704): for IPv4 by `rp_filter=1`.
    ///
    /// # Errors
    /// Those of [`sysctl`].
    pub fn be_strict(&self) -> io::Result<()> {
        self.router.run(|| sysctl("net/ipv4/conf/all/rp_filter", "1"))
    }

    fn build(routed: bool) -> io::Result<Self> {
        const LAN: &str = "lan";
        let router = Namespace::new()?;
        router.run(forward)?;
        let mut control = router.rtnetlink()?;
        if !routed {
            bridge(&mut control, LAN)?;
        }
        let mut attach = |link: &str, namespace: Namespace, number: u8, network: u8, own: bool| {
            veth(
                &mut control,
                [end(&router, link, 100 + number), end(&namespace, LINK, number)],
                ETHERNET_MTU,
            )?;
            let mut holder = link;
            if !own {
                enslave(&mut control, link, LAN)?;
                holder = LAN;
            }
            // The router asks for IPv6 neighbours from its link-local address.
            let link_local = (IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 254]), 64);
            for (gateway, prefix) in gateways(network, [24, 64]).into_iter().chain([link_local]) {
                match control.add_address(holder, gateway, prefix) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    other => other?,
                }
            }
            let host = host(namespace, network, number)?;
            let mut inside = host.namespace.rtnetlink()?;
            for (gateway, _) in gateways(network, [0, 0]) {
                default_route(&mut inside, gateway)?;
            }
            Ok::<_, io::Error>(host)
        };
        let peer = attach("peer", Namespace::new()?, 1, 1, true)?;
        let mut make = |number: u8| {
            let network = if routed && number > 1 { number } else { 0 };
            attach(&format!("host{number}"), Namespace::new()?, number, network, routed)
        };
        let hosts = [make(1)?, make(2)?, make(3)?];
        Ok(Self { peer, router, hosts })
    }
}

fn default_route(control: &mut Rtnetlink, gateway: IpAddr) -> io::Result<()> {
    let everywhere = if gateway.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
    control.route(everywhere, 0, LINK, Some(gateway))
}
