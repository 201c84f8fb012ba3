//! `OLD=NEW`: an address that changes where the connection comes back.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use soccr::Connection;

use crate::error::{Error, Result};

/// One rule `OLD=NEW`: an IP address, or an IP address and port, and what it becomes.
///
/// A rule for an IPv4 address also concerns the IPv4-mapped one of an IPv6 socket.
///
/// ```
/// use soccr_image::AddressMap;
///
/// let map: AddressMap = "192.0.2.1=198.51.100.7".parse()?;
/// assert_eq!(map.apply("192.0.2.1:80".parse()?), Some("198.51.100.7:80".parse()?));
/// assert_eq!(map.apply("192.0.2.2:80".parse()?), None);
///
/// let map: AddressMap = "[2001:db8::1]:80=[2001:db8::2]:8080".parse()?;
/// assert_eq!(map.apply("[2001:db8::1]:80".parse()?), Some("[2001:db8::2]:8080".parse()?));
/// assert_eq!(map.apply("[2001:db8::1]:81".parse()?), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressMap {
    old: (IpAddr, Option<u16>),
    new: (IpAddr, Option<u16>),
}

impl AddressMap {
    /// The address without its port, and what becomes of it.
    pub(crate) fn ips(&self) -> (IpAddr, IpAddr) {
        (self.old.0, self.new.0)
    }

    /// What `address` becomes; `None` where the rule doesn't concern it.
    pub fn apply(&self, address: SocketAddr) -> Option<SocketAddr> {
        let ((old, old_port), (new, new_port)) = (self.old, self.new);
        if address.ip().to_canonical() != old || old_port.is_some_and(|port| port != address.port()) {
            return None;
        }
        let mut mapped = address;
        mapped.set_ip(match (address, new) {
            (SocketAddr::V6(_), IpAddr::V4(new)) => new.to_ipv6_mapped().into(),
            _ => new,
        });
        mapped.set_port(new_port.unwrap_or(address.port()));
        Some(mapped)
    }

    /// What `address` becomes by the first of `maps` that concerns it; itself where none does.
    pub fn apply_first(maps: &[Self], address: SocketAddr) -> SocketAddr {
        maps.iter().find_map(|map| map.apply(address)).unwrap_or(address)
    }

    /// Changes both addresses of a connection, each by the first of `maps` that concerns it.
    pub fn apply_to_connection(maps: &[Self], connection: &mut Connection) {
        connection.local = Self::apply_first(maps, connection.local);
        let peer = connection.remote.ip();
        connection.remote = Self::apply_first(maps, connection.remote);
        connection.settings.move_keys(peer, connection.remote.ip());
        if let Some(tracked) = &mut connection.tracked {
            tracked.wire.local = Self::apply_first(maps, tracked.wire.local);
            tracked.wire.remote = Self::apply_first(maps, tracked.wire.remote);
        }
    }
}

impl FromStr for AddressMap {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse =
            |why: &str| Error::invalid(format!("{text:?} {why}: OLD=NEW, each IP, IPv4:PORT or [IPv6]:PORT"));
        let (old, new) = text.split_once('=').ok_or_else(|| refuse("has no ="))?;
        let side = |side: &str| {
            let bare = side.strip_prefix('[').and_then(|side| side.strip_suffix(']'));
            match (bare.unwrap_or(side).parse::<IpAddr>(), side.parse::<SocketAddr>()) {
                (Ok(ip), _) => Ok((ip.to_canonical(), None)),
                (_, Ok(address)) if address.port() != 0 => {
                    Ok((address.ip().to_canonical(), Some(address.port())))
                }
                _ => Err(refuse("names no address")),
            }
        };
        let (old, new) = (side(old)?, side(new)?);
        if old.0.is_ipv4() != new.0.is_ipv4() {
            return Err(refuse("joins two families"));
        }
        if new.1.is_some() && old.1.is_none() {
            return Err(refuse("gives every port of an address the same new one"));
        }
        if new.0.is_unspecified() && !old.0.is_unspecified() {
            return Err(refuse("makes an address unspecified"));
        }
        Ok(Self { old, new })
    }
}

impl fmt::Display for AddressMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (end, (ip, port)) in [("=", self.old), ("", self.new)] {
            match (ip, port) {
                (ip, None) => write!(f, "{ip}{end}")?,
                (ip, Some(port)) => write!(f, "{}{end}", SocketAddr::from((ip, port)))?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use soccr::settings::Value;

    use super::*;

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in [
            "",
            "=",
            "10.0.0.1",
            "10.0.0.1=",
            "a=b",
            "10.0.0.1=::1",
            "10.0.0.1=10.0.0.2:80",
            "10.0.0.1:0=10.0.0.2",
            "10.0.0.1:99999=10.0.0.2",
            "10.0.0.1=10.0.0.2=10.0.0.3",
            "10.0.0.1=0.0.0.0",
        ] {
            assert!(text.parse::<AddressMap>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_rule_prints_as_it_is_read() {
        for text in
            ["10.0.0.1=10.0.0.2", "10.0.0.1:80=10.0.0.2:81", "fd00::1=fd00::2", "[fd00::1]:80=fd00::2"]
        {
            assert_eq!(text.parse::<AddressMap>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn mapped_addresses_follow_their_ipv4_rule() {
        let map: AddressMap = "10.0.0.1=10.0.0.2".parse().unwrap();
        assert_eq!(
            map.apply("[::ffff:10.0.0.1]:80".parse().unwrap()),
            Some("[::ffff:10.0.0.2]:80".parse().unwrap())
        );
        assert_eq!(map.apply("[fd00::ffff:a00:1]:80".parse().unwrap()), None);
    }

    #[test]
    fn the_keys_of_a_peer_follow_it() {
        // struct tcp_diag_md5sig: family, prefix, length of the key, address, key.
        let key = |prefix: u8, address: [u8; 4]| {
            let mut key = [0; 100];
            (key[0], key[1], key[2]) = (2, prefix, 6);
            key[4..8].copy_from_slice(&address);
            key[20..26].copy_from_slice(b"secret");
            key
        };
        let [theirs, others, both] = [(32, [10, 0, 0, 1]), (32, [10, 0, 0, 7]), (8, [10, 0, 0, 0])]
            .map(|(prefix, address)| key(prefix, address));
        for (remote, rule, moved) in [
            ("10.0.0.1:80", "10.0.0.1=10.0.0.2", [key(32, [10, 0, 0, 2]), others, both]),
            (
                "[::ffff:10.0.0.1]:80",
                "10.0.0.1=11.0.0.1",
                [key(32, [11, 0, 0, 1]), others, key(32, [11, 0, 0, 1])],
            ),
            ("10.0.0.1:80", "10.0.0.3=10.0.0.4", [theirs, others, both]),
        ] {
            let mut connection = Connection::empty();
            connection.remote = remote.parse().unwrap();
            connection.settings.set("TCP_MD5SIG", Value::Secret([theirs, others, both].concat()));
            AddressMap::apply_to_connection(&[rule.parse().unwrap()], &mut connection);
            let keys = connection.settings.get("TCP_MD5SIG");
            assert!(keys == Some(&Value::Secret(moved.concat())), "{remote} {rule}");
        }
    }

    #[test]
    fn the_first_rule_wins_and_is_not_chained() {
        let maps = ["10.0.0.1:80=10.0.0.9:90", "10.0.0.1=10.0.0.2", "10.0.0.2=10.0.0.3"]
            .map(|text| text.parse::<AddressMap>().unwrap());
        let apply = |text: &str| AddressMap::apply_first(&maps, text.parse().unwrap()).to_string();
        assert_eq!(apply("10.0.0.1:80"), "10.0.0.9:90");
        assert_eq!(apply("10.0.0.1:81"), "10.0.0.2:81");
        assert_eq!(apply("10.0.0.7:81"), "10.0.0.7:81");
    }
}
