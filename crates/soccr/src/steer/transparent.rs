//! Sockets with an address of another host: they are transparent while packets for it are delivered here, and no longer.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use soccr_netlink::Rtnetlink;

use super::{foreign, system};
use crate::error::Result;
use crate::settings::{Settings, Value};
use crate::sys::{namespace, sockopt};

/// One and the same option, under two names.
const TRANSPARENT: [&str; 2] = ["IP_TRANSPARENT", "IPV6_TRANSPARENT"];

/// Whether an address is not one of the host of a socket, in its network namespace.
pub(crate) fn is_foreign_beside(socket: BorrowedFd<'_>, address: IpAddr) -> Result<bool> {
    let route = namespace::open_beside(socket, Rtnetlink::here);
    system("routing socket", route).and_then(|mut route| foreign::is_foreign_to(&mut route, address))
}

/// Whether packets for an address of another host are delivered in the network namespace of a socket, by us.
fn is_delivered(socket: BorrowedFd<'_>, address: IpAddr) -> Result<bool> {
    let route = namespace::open_beside(socket, Rtnetlink::here);
    let list = system("routing socket", route).and_then(|mut route| foreign::list(&mut route))?;
    Ok(list.iter().any(|foreign| foreign.address() == address.to_canonical()))
}

/// Lets a socket have an address of another host, where packets for that are delivered here. Returns whether they are.
pub(crate) fn admit(socket: BorrowedFd<'_>, local: SocketAddr) -> Result<bool> {
    if !is_delivered(socket, local.ip())? {
        return Ok(false);
    }
    let (level, option, name) = if local.is_ipv4() {
        (libc::IPPROTO_IP, libc::IP_TRANSPARENT, TRANSPARENT[0])
    } else {
        (libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT, TRANSPARENT[1])
    };
    system(name, sockopt::set(socket, level, option, &1i32)).map(|()| true)
}

/// The same for a socket that is transparent for a reason of its application: it can have any address.
pub(crate) fn admit_transparent(
    socket: BorrowedFd<'_>,
    local: SocketAddr,
    settings: &Settings,
) -> Result<bool> {
    if is_transparent(settings) && is_foreign_beside(socket, local.ip())? {
        admit(socket, local)
    } else {
        Ok(false)
    }
}

/// Forgets that a saved socket was transparent where it had to be, because packets for another host's address are delivered here. That
/// tells nothing of what its application wants, and where the address is at home it must not be. A transparent proxy stays one.
pub(crate) fn forget_transparency(
    socket: BorrowedFd<'_>,
    local: SocketAddr,
    settings: &mut Settings,
) -> Result<()> {
    if is_transparent(settings) && is_delivered(socket, local.ip())? {
        TRANSPARENT.iter().for_each(|name| settings.forget(name));
    }
    Ok(())
}

fn is_transparent(settings: &Settings) -> bool {
    TRANSPARENT.iter().any(|name| settings.get(name) == Some(&Value::Number(1)))
}
