//! The new host takes the address itself, when the old one is gone for good.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6};

use rustix::net::{AddressFamily, SendFlags, SocketType, bind, ipproto, sendto, socket, sockopt};

use super::{Foreign, foreign, index, system, with_route};
use crate::error::{Error, Result};
use crate::sys::raw::send_from_device;

/// Gives a device of this host an address, tells the network (gratuitous ARP, unsolicited neighbour advertisement), and ends
/// the [delivery](Foreign) of packets for it: from now on the host simply has it. The connections that were restored with it go
/// on, and new ones can come.
///
/// The old host must not have the address any more.
///
/// # Errors
/// `ENODEV` where there is no such device; `EEXIST` where it has the address; `EPERM` without `CAP_NET_ADMIN` and
/// `CAP_NET_RAW`. The packets are delivered then as before.
///
/// # References
/// RFC 5227 §3 (announcing an address), RFC 4861 §7.2.6 (unsolicited neighbour advertisements).
pub fn adopt_address(address: IpAddr, prefix: u8, device: &str) -> Result<()> {
    with_route(|route| {
        let foreign = foreign::list(route)?.into_iter().find(|foreign| foreign.address() == address);
        let through = foreign.map(|foreign| foreign.answers_by(route)).transpose()?.flatten();
        let link = index(route, device)?;
        let ethernet = system("ip link", route.ethernet_address(link))?;
        system("ip address add", route.add_address(device, address, prefix))?;
        // Where there are no Ethernet addresses, nobody has to be told.
        let told = ethernet.map_or(Ok(()), |ethernet| announce(link, ethernet, address));
        let adopted = told.and_then(|()| foreign.map_or(Ok(()), |foreign| foreign.remove()));
        if adopted.is_err() {
            if let Some(foreign) = foreign {
                let again = Foreign::deliver(address, foreign.numbers());
                let _ = again.and_then(|again| through.map_or(Ok(()), |hop| again.answer_through(&hop)));
            }
            let _ = route.remove_address(device, address, prefix);
        }
        adopted
    })
}

fn announce(link: u32, ethernet: [u8; 6], address: IpAddr) -> Result<()> {
    match address {
        IpAddr::V4(address) => {
            let sent = send_from_device(link, libc::ETH_P_ARP as u16, [0xff; 6], &arp(ethernet, address));
            system("gratuitous ARP", sent)
        }
        IpAddr::V6(address) => advertise(link, ethernet, address)
            .map_err(|errno| Error::system("neighbour advertisement", errno)),
    }
}

/// A request for one's own address.
fn arp(ethernet: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    const ETHERNET_AND_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
    const REQUEST: [u8; 2] = [0, 1];
    let own = address.octets();
    [&ETHERNET_AND_IPV4[..], &REQUEST, &ethernet, &own, &[0; 6], &own].concat()
}

fn advertise(link: u32, ethernet: [u8; 6], address: Ipv6Addr) -> rustix::io::Result<()> {
    const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    const OVERRIDE: u8 = 0x20;
    const TARGET_LINK_LAYER_ADDRESS: [u8; 2] = [2, 1];
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // The kernel writes the checksum.
    let header = [NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    let message = [&header[..], &address.octets(), &TARGET_LINK_LAYER_ADDRESS, &ethernet].concat();
    let socket = socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::ICMPV6))?;
    // Neighbours believe only advertisements that no router has forwarded.
    sockopt::set_ipv6_multicast_hops(&socket, 255)?;
    bind(&socket, &SocketAddrV6::new(address, 0, 0, link))?;
    sendto(&socket, &message, SendFlags::empty(), &SocketAddrV6::new(ALL_NODES, 0, 0, link))?;
    Ok(())
}
