//! Hosts with addresses of their own on one Ethernet.

use std::io;
use std::net::IpAddr;

use crate::rtnetlink::{bridge, enslave, veth};
use crate::topology::{ETHERNET_MTU, LINK, end, forward, gateways, host};
use crate::{Host, Namespace, Rtnetlink};

/// A peer behind a router, and hosts that are told apart by their addresses:
///
/// ```text
///                                                   ┌── 192.0.2.1  2001:db8::1  hosts[0]
///  peer  198.51.100.1  2001:db8:1::1 ─── router ────┼── 192.0.2.2  2001:db8::2  hosts[1]
///                                                   └── 192.0.2.3  2001:db8::3  hosts[2]
/// ```
///
/// Neighbours find each other by ARP and neighbour discovery.
#[derive(Debug)]
pub struct Lan {
    /// The end that stays where it is, on the router's link `peer`.
    pub peer: Host,
    /// What lies between; it forwards.
    pub router: Namespace,
    /// The hosts, on the router's bridge `lan`.
    pub hosts: [Host; 3],
}

impl Lan {
    /// All hosts on one Ethernet.
    ///
    /// # Errors
    /// The errors of [`Namespace::new`] and [`Rtnetlink`].
    pub fn new() -> io::Result<Self> {
        const LAN: &str = "lan";
        let router = Namespace::new()?;
        router.run(forward)?;
        let mut control = router.rtnetlink()?;
        bridge(&mut control, LAN)?;
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
        let mut make = |number: u8| attach(&format!("host{number}"), Namespace::new()?, number, 0, false);
        let hosts = [make(1)?, make(2)?, make(3)?];
        Ok(Self { peer, router, hosts })
    }
}

fn default_route(control: &mut Rtnetlink, gateway: IpAddr) -> io::Result<()> {
    let everywhere = if gateway.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
    control.route(everywhere, 0, LINK, Some(gateway))
}
