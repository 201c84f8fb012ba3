//! Steering: packets follow a connection to its new host, while the address stays where it is.
//!
//! The old host A keeps the address. It sends the packets of exactly the connections that have left on to the new host B,
//! before its own routing or firewall sees them ([`redirect`], [`Steering`]). B delivers them to exactly those sockets
//! ([`Foreign`]), and answers the peer directly:
//!
//! ```text
//!                    ┌── A  192.0.2.1 ──┐
//!  peer ── router ───┤                  │ A steers what is for the connection
//!                    └── B  192.0.2.2 ◄─┘
//! ```
//!
//! No router takes part, no address moves, `ip_forward` stays off, and no process has to run: nftables and policy routing
//! do the work in the kernel. So everything here stays when its maker ends, is listed, and is removed by name.
//!
//! # Order
//! A move loses no packet where the steps follow each other like this:
//!
//! 1. B calls [`Foreign::deliver`], locks the connection and restores it.
//! 2. A calls [`redirect`]: from now on the lock of B holds what arrives.
//! 3. A lets go of the connection and sends B what its own lock has held.
//!
//! On the way home A calls [`stop`] in the place of step 2, or has it done by a [`Homecoming`]. Here `flow` is to leave:
//!
//! ```no_run
//! # fn example(flow: soccr::Flow) -> soccr::Result<()> {
//! use soccr::steer::{NextHop, redirect, stop};
//!
//! let b = NextHop::new("192.0.2.2".parse().unwrap())?; // asks for its Ethernet address, too
//! redirect(&[flow], &b)?;
//! // … and when it is back
//! stop(&[flow])?;
//! # Ok(())
//! # }
//! ```
//!
//! # Between networks
//! Where the hosts have no network in common, both make a [`Tunnel`] first; A then tells the peer what fits into it ([`narrow`]).
//! Where the network of B lets no foreign sources pass, B answers through A ([`Foreign::answer_through`], [`redirect_answers`]).
//!
//! # Limits
//! A keeps forwarding until the address moves; where A dies, the connections wait until another host has the address.
//! Of a fragmented IP packet only the first fragment is steered. Each steered packet has a TTL that is one less.
//!
//! # References
//! nft(8) (`fwd`, `socket transparent`), ip-rule(8), ip(7) (`IP_TRANSPARENT`).

mod adoption;
mod foreign;
mod homecoming;
mod narrow;
mod next_hop;
mod redirect;
mod steering;
mod transparent;
mod tunnel;

use std::io;
use std::net::IpAddr;

use soccr_netlink::{Family, Rtnetlink, Socket};

use crate::error::{Error, Result};

pub use adoption::adopt_address;
pub use foreign::{Foreign, Numbers, is_foreign};
pub use homecoming::Homecoming;
pub use narrow::narrow;
pub use next_hop::NextHop;
pub use redirect::{Steerer, redirect, redirect_answers, stop};
pub use steering::{Steered, Steering, Times};
pub(crate) use transparent::{admit, admit_transparent, forget_transparency, is_foreign_beside};
pub use tunnel::Tunnel;

fn index(route: &Rtnetlink, device: &str) -> Result<u32> {
    let advice = "see `ip link` for the devices of this network";
    route.index(device).map_err(|error| Error::system(format!("device {device}"), error).advise(advice))
}

fn with_route<T>(work: impl FnOnce(&mut Rtnetlink) -> Result<T>) -> Result<T> {
    let route = Rtnetlink::here().map_err(|error| Error::system("routing socket", error));
    route.and_then(|mut route| work(&mut route)).map_err(|error| error.at("steer"))
}

fn with_socket<T>(work: impl FnOnce(&mut Socket) -> Result<T>) -> Result<T> {
    let socket = Socket::open(Family::Netfilter).map_err(|error| Error::system("netfilter socket", error));
    socket.and_then(|mut socket| work(&mut socket)).map_err(|error| error.at("steer"))
}

fn system<T>(what: &'static str, result: io::Result<T>) -> Result<T> {
    result.map_err(|error| Error::system(what, error))
}

/// A number of 24 bits that belongs to these addresses: an FNV-1a hash.
fn number_of(addresses: &[IpAddr]) -> u32 {
    let octets = addresses.iter().flat_map(|address| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    });
    let hash =
        octets.fold(0x811c_9dc5_u32, |hash, octet| (hash ^ u32::from(octet)).wrapping_mul(0x0100_0193));
    (hash >> 24) ^ (hash & 0xff_ffff)
}

fn present(what: &'static str, result: io::Result<()>) -> Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => system(what, other),
    }
}

fn absent(what: &'static str, result: io::Result<()>) -> Result<()> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH | libc::ENODEV)) => {
            Ok(())
        }
        other => system(what, other),
    }
}
