//! Ready-made networks.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};

use crate::rtnetlink::{VethEnd, veth};
use crate::{Host, Line, Namespace, Rtnetlink, Shape, sysctl};

pub(crate) const ETHERNET_MTU: u32 = 1500;
pub(crate) const LINK: &str = "eth0";

/// Two hosts on one Ethernet:
///
/// ```text
///  a  192.0.2.1  2001:db8::1  fe80::1  ───  192.0.2.2  2001:db8::2  fe80::2  b
/// ```
#[derive(Debug)]
pub struct Pair {
    /// The one host.
    pub a: Host,
    /// The other.
    pub b: Host,
    /// What delays the packets between them, where that was asked for.
    pub line: Option<Line>,
}

impl Pair {
    /// Makes the hosts and a veth pair between them.
    ///
    /// # Errors
    /// The errors of [`Namespace::new`] and [`Rtnetlink`].
    pub fn new() -> io::Result<Self> {
        Self::build(None)
    }

    /// Makes the hosts and a line between them.
    ///
    /// # Errors
    /// The errors of [`new`](Self::new) and [`Line::new`].
    pub fn shaped(shape: &Shape) -> io::Result<Self> {
        Self::build(Some(shape))
    }

    fn build(shape: Option<&Shape>) -> io::Result<Self> {
        let (a, b) = (Namespace::new()?, Namespace::new()?);
        let line = connect([end(&a, LINK, 1), end(&b, LINK, 2)], shape)?;
        Ok(Self { a: host(a, HOSTS, 1)?, b: host(b, HOSTS, 2)?, line })
    }
}

/// The one or the other of two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Host `a`.
    A,
    /// Host `b`.
    B,
}

impl Side {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// A peer, and two hosts that share one address, between which a connection can move:
///
/// ```text
///                                                   ┌── 192.0.2.1  2001:db8::1  a
///  peer  198.51.100.1  2001:db8:1::1 ─── router ────┤
///                                                   └── 192.0.2.1  2001:db8::1  b
/// ```
///
/// The router has one route to the shared address; [`steer`](Self::steer) replaces it. Both hosts can always send.
/// All neighbours are known for good, so that no ARP delays a packet.
#[derive(Debug)]
pub struct Lab {
    /// The end that stays where it is.
    pub peer: Host,
    /// What lies between; it forwards.
    pub router: Namespace,
    /// The first host with the shared address. The router sends packets here in the beginning.
    pub a: Host,
    /// The second one.
    pub b: Host,
    /// What delays the packets between peer (side A) and router (side B), where that was asked for.
    pub line: Option<Line>,
    steering: Mutex<Rtnetlink>,
}

/// The router's links.
const TO_PEER: &str = "peer";
const TO_A: &str = "a";
const TO_B: &str = "b";

/// The networks, by the number that tells their addresses apart.
const HOSTS: u8 = 0;
const PEERS: u8 = 1;

impl Lab {
    /// Makes the namespaces and the veth pairs between them.
    ///
    /// # Errors
    /// The errors of [`Namespace::new`], [`Rtnetlink`] and [`sysctl`].
    pub fn new() -> io::Result<Self> {
        Self::build(None)
    }

    /// Makes the namespaces, with a line between peer and router. All links have its MTU.
    ///
    /// # Errors
    /// The errors of [`new`](Self::new) and [`Line::new`].
    pub fn shaped(shape: &Shape) -> io::Result<Self> {
        Self::build(Some(shape))
    }

    fn build(shape: Option<&Shape>) -> io::Result<Self> {
        let (peer, router) = (Namespace::new()?, Namespace::new()?);
        router.run(forward)?;
        let mtu = shape.map_or(ETHERNET_MTU, |shape| shape.mtu);
        let line = connect([end(&peer, LINK, 1), end(&router, TO_PEER, ROUTER)], shape)?;
        let mut control = router.rtnetlink()?;
        for (gateway, prefix) in gateways(PEERS, [24, 64]) {
            control.add_address(TO_PEER, gateway, prefix)?;
        }
        let peer = host(peer, PEERS, 1)?;
        attach(&mut control, &peer, TO_PEER, PEERS)?;
        let mut shared_host = |link: &str| {
            let host_namespace = Namespace::new()?;
            veth(&mut control, [end(&router, link, ROUTER), end(&host_namespace, LINK, 1)], mtu)?;
            // No network prefix: which link the shared network is on is for the steered route alone to say.
            for (gateway, prefix) in gateways(HOSTS, [32, 128]) {
                control.add_address(link, gateway, prefix)?;
            }
            let host = host(host_namespace, HOSTS, 1)?;
            attach(&mut control, &host, link, HOSTS)?;
            Ok::<_, io::Error>(host)
        };
        let (a, b) = (shared_host(TO_A)?, shared_host(TO_B)?);
        let lab = Self { peer, router, a, b, line, steering: Mutex::new(control) };
        lab.steer(Side::A)?;
        Ok(lab)
    }

    /// Sends packets for the shared address to this host from now on.
    ///
    /// # Errors
    /// The errors of [`Rtnetlink::route`].
    pub fn steer(&self, side: Side) -> io::Result<()> {
        let mut control = self.steering.lock().unwrap_or_else(PoisonError::into_inner);
        let index = control.index(if side == Side::A { TO_A } else { TO_B })?;
        control.routes(&[(self.a.v4.into(), 32), (self.a.v6.into(), 128)], index, None)
    }

    /// The host on this side.
    pub fn host(&self, side: Side) -> &Host {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }
}

/// The last byte of the addresses of a router.
const ROUTER: u8 = 254;

fn mac(last: u8) -> [u8; 6] {
    // Locally administered, so it cannot meet a real one.
    [2, 0, 0, 0, 0, last]
}

pub(crate) fn end<'a>(namespace: &'a Namespace, name: &'a str, number: u8) -> VethEnd<'a> {
    VethEnd { namespace, name, mac: mac(number) }
}

fn connect(ends: [VethEnd<'_>; 2], shape: Option<&Shape>) -> io::Result<Option<Line>> {
    match shape {
        Some(shape) => Line::new(ends, shape).map(Some),
        None => veth(&mut ends[0].namespace.rtnetlink()?, ends, ETHERNET_MTU).map(|()| None),
    }
}

fn v4(network: u8, number: u8) -> Ipv4Addr {
    // The prefixes that RFC 5737 and RFC 3849 reserve for documentation, and RFC 2544 for benchmarks.
    match network {
        HOSTS => [192, 0, 2, number].into(),
        PEERS => [198, 51, 100, number].into(),
        2 => [203, 0, 113, number].into(),
        _ => [198, 18, network, number].into(),
    }
}

fn v6(network: u8, number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, network.into(), 0, 0, 0, 0, number.into())
}

pub(crate) fn gateways(network: u8, prefixes: [u8; 2]) -> [(IpAddr, u8); 2] {
    [(v4(network, ROUTER).into(), prefixes[0]), (v6(network, ROUTER).into(), prefixes[1])]
}

/// Gives the link of `namespace` the addresses of host `number`.
pub(crate) fn host(namespace: Namespace, network: u8, number: u8) -> io::Result<Host> {
    let mut control = namespace.rtnetlink()?;
    let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, number.into());
    let scope = control.index(LINK)?;
    let host = Host { namespace, v4: v4(network, number), v6: v6(network, number), link_local, scope };
    for (address, prefix) in host.prefixes() {
        control.add_address(LINK, address, prefix)?;
    }
    Ok(host)
}

/// Makes the router and a host behind its `link` know each other.
fn attach(router: &mut Rtnetlink, host: &Host, link: &str, network: u8) -> io::Result<()> {
    let mut control = host.namespace.rtnetlink()?;
    for (gateway, everywhere) in [
        (v4(network, ROUTER).into(), IpAddr::from([0; 4])),
        (v6(network, ROUTER).into(), IpAddr::from([0; 16])),
    ] {
        control.neighbour(LINK, gateway, mac(ROUTER))?;
        control.route(everywhere, 0, LINK, Some(gateway))?;
    }
    router.neighbour(link, host.v4.into(), mac(1))?;
    router.neighbour(link, host.v6.into(), mac(1))
}

/// Makes a router of the calling thread's network.
pub(crate) fn forward() -> io::Result<()> {
    sysctl("net/ipv4/ip_forward", "1")?;
    sysctl("net/ipv6/conf/all/forwarding", "1")?;
    // A host that has lost the steered route may still send: its packets come from the "wrong" link.
    sysctl("net/ipv4/conf/all/rp_filter", "0")?;
    sysctl("net/ipv4/conf/default/rp_filter", "0")
}
