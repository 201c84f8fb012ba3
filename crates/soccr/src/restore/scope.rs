//! A link-local address needs an interface. Its number differs between hosts, so it is found by its name.

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use rustix::net::netdevice::name_to_index;

use crate::connection::Flow;
use crate::error::{Error, Result};
use crate::settings::{Settings, Value};

/// The connection with the number that its interface has in the network namespace of the socket. A socket with link-local addresses
/// is bound to it; without settings the number is taken as it is.
///
/// # Errors
/// `ENODEV` where no interface has this name: the one with that number is another.
pub(super) fn scoped_here(fd: BorrowedFd<'_>, mut flow: Flow, settings: &Settings) -> Result<Flow> {
    let Some(Value::Bytes(name)) = settings.get("SO_BINDTODEVICE") else { return Ok(flow) };
    let name = String::from_utf8_lossy(name);
    let name = name.trim_end_matches('\0');
    for end in [&mut flow.local, &mut flow.remote] {
        if let SocketAddr::V6(end) = end
            && end.ip().is_unicast_link_local()
        {
            let index = name_to_index(fd, name).map_err(|errno| {
                Error::system("SIOCGIFINDEX", errno).advise(format!(
                    "the connection has link-local addresses of the link {name}: give one here this name, and the address"
                ))
            })?;
            end.set_scope_id(index);
        }
    }
    Ok(flow)
}
