//! The network namespace that the command line names, and what is local there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use soccr_handover::foreign::{namespace, process::look_into};

use crate::pid::parse_pid;

/// Moves this process into the network namespace that the command line names: a path, or the number of a process.
pub(crate) fn enter(name: Option<&str>) -> Result<()> {
    let Some(name) = name else { return Ok(()) };
    let path = match name.bytes().all(|byte| byte.is_ascii_digit()) {
        true => {
            look_into(parse_pid(name).map_err(|error| anyhow!("pid {name}: {error}"))?)?;
            format!("/proc/{name}/ns/net")
        }
        // As ip-netns(8) names them.
        false if !name.contains('/') => format!("/run/netns/{name}"),
        false => name.to_owned(),
    };
    namespace::enter(Path::new(&path)).with_context(|| format!("network namespace {name}"))
}

/// Whether packets to this address stay on this host: the kernel would send them from the same address.
pub(crate) fn is_local(address: SocketAddr) -> bool {
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let source = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(address)?;
        socket.local_addr()
    };
    let canonical = address.ip().to_canonical();
    canonical.is_loopback() || source().is_ok_and(|source| source.ip().to_canonical() == canonical)
}
