//! Filters for connections and their processes, the same for `list`, `save` and `send`.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// A filter that is not given lets everything pass.
#[derive(clap::Args, Debug)]
pub(crate) struct Matching {
    /// Only those with this port at either end; may be repeated
    #[arg(long, value_name = "PORT")]
    port: Vec<u16>,
    /// Only connections to this address or network (such as 192.0.2.0/24); may be repeated
    #[arg(long, value_name = "ADDRESS")]
    peer: Vec<Network>,
    /// Only those of processes with this name (`/proc/PID/comm`); may be repeated
    #[arg(long, value_name = "NAME")]
    name: Vec<OsString>,
}

impl Matching {
    pub(crate) fn wants(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        let has = |port: &u16| local.port() == *port || remote.port() == *port;
        (self.port.is_empty() || self.port.iter().any(has))
            && (self.peer.is_empty()
                || remote.port() != 0 && self.peer.iter().any(|peer| peer.contains(remote)))
    }

    /// No process name is given.
    pub(crate) fn wants_all_names(&self) -> bool {
        self.name.is_empty()
    }

    /// `name` has U+FFFD for what is no UTF-8, as `list` shows it: so may the one that is given, or be the bytes themselves.
    pub(crate) fn wants_name(&self, name: &str) -> bool {
        self.name.iter().any(|wanted| wanted.to_string_lossy() == name)
    }

    /// Whether ports or peers are given.
    pub(crate) fn is_any(&self) -> bool {
        !self.port.is_empty() || !self.peer.is_empty()
    }
}

/// An address, and how many of its first bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    bits: u32,
}

impl Network {
    fn contains(self, end: SocketAddr) -> bool {
        let differing = match (self.address, end.ip().to_canonical()) {
            (IpAddr::V4(ours), IpAddr::V4(theirs)) => u128::from(ours.to_bits() ^ theirs.to_bits()) << 96,
            (IpAddr::V6(ours), IpAddr::V6(theirs)) => ours.to_bits() ^ theirs.to_bits(),
            _ => return false,
        };
        differing.leading_zeros() >= self.bits
    }
}

impl FromStr for Network {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, bits) =
            text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.parse().map_err(|_| "ADDRESS, or ADDRESS/BITS")?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Some(most), |bits| bits.parse().ok()).filter(|bits| *bits <= most);
        Ok(Self { address: address.to_canonical(), bits: bits.ok_or("too many bits, or no number")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_what_begins_like_them() {
        for (network, end, contained) in [
            ("192.0.2.1", "192.0.2.1:7", true),
            ("192.0.2.1", "192.0.2.2:7", false),
            ("192.0.2.0/25", "192.0.2.127:7", true),
            ("192.0.2.0/25", "192.0.2.128:7", false),
            ("0.0.0.0/0", "192.0.2.1:7", true),
            ("0.0.0.0/0", "[2001:db8::1]:7", false),
            ("192.0.2.0/24", "[::ffff:192.0.2.1]:7", true),
            ("2001:db8::/32", "[2001:db8::1]:7", true),
            ("2001:db8::/32", "[2001:db9::1]:7", false),
            ("::/0", "[2001:db9::1]:7", true),
        ] {
            let found = network.parse::<Network>().unwrap().contains(end.parse().unwrap());
            assert_eq!(found, contained, "{network} {end}");
        }
        for wrong in ["", "192.0.2.0/33", "192.0.2.0/x", "host", "2001:db8::/129", "192.0.2.0/"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }
}
