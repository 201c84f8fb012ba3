//! Which sockets `soccr list` shows.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use soccr::connection::State;
use soccr::diag::Socket;

use super::row::Owner;
use crate::traffic::Traffic;

/// What a socket must be like to be shown; what is not given does not matter.
#[derive(clap::Args, Debug)]
pub(super) struct Filter {
    /// Only sockets with this port at either end
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Only sockets in this state (such as ESTABLISHED or close-wait); may be repeated
    #[arg(long, value_name = "STATE", value_parser = parse_state)]
    state: Vec<State>,
    /// Only connections to this address or network (such as 192.0.2.0/24)
    #[arg(long, value_name = "ADDRESS")]
    peer: Option<Network>,
    /// Only sockets of processes with this name (`/proc/PID/comm`)
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Only connections that have been idle for this time: nothing sent or received, and nothing in their queues
    #[arg(long, value_name = "SECONDS")]
    idle: Option<u32>,
}

impl Filter {
    pub(super) fn wants(&self, socket: &Socket<'_>, traffic: Option<&Traffic>) -> bool {
        let ports = [socket.local.port(), socket.remote.port()];
        self.port.is_none_or(|port| ports.contains(&port))
            && (self.state.is_empty() || self.state.contains(&socket.state))
            && self.peer.is_none_or(|peer| socket.remote.port() != 0 && peer.contains(socket.remote))
            && self.idle.is_none_or(|seconds| {
                let idle = Duration::from_secs(seconds.into());
                socket.receive_queue == 0 && traffic.is_some_and(|traffic| traffic.is_idle(idle))
            })
    }

    /// The processes that have the socket.
    pub(super) fn wants_one_of(&self, owners: &[Owner]) -> bool {
        self.name.as_ref().is_none_or(|name| owners.iter().any(|owner| owner.name == *name))
    }
}

fn parse_state(text: &str) -> Result<State, String> {
    let plain = |name: &str| name.replace(['_', '-'], "").to_uppercase();
    let mut states = (1..=u8::MAX).map_while(State::from_kernel);
    states.find(|state| plain(state.name()) == plain(text)).ok_or_else(|| {
        let names: Vec<&str> = (1..=u8::MAX).map_while(State::from_kernel).map(State::name).collect();
        format!("it is one of {}", names.join(", "))
    })
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

    #[test]
    fn states_have_the_names_of_the_kernel_and_of_ss() {
        for (name, state) in [
            ("ESTABLISHED", State::Established),
            ("close-wait", State::CloseWait),
            ("fin_wait1", State::FinWait1),
        ] {
            assert_eq!(parse_state(name), Ok(state));
        }
        assert!(parse_state("open").is_err_and(|error| error.contains("ESTABLISHED")));
    }
}
