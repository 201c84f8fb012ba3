//! What the kernel says about one socket.

use std::ffi::CStr;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use soccr_netlink::attributes;

use crate::state::State;
use crate::tls;

/// `struct inet_diag_msg`: what every answer begins with, before its attributes.
const ANSWER: usize = 72;

pub(super) const INET_DIAG_INFO: u16 = 2;
pub(super) const INET_DIAG_CONG: u16 = 4;
const INET_DIAG_SKV6ONLY: u16 = 11;
const INET_DIAG_MARK: u16 = 15;
const INET_DIAG_MD5SIG: u16 = 18;
const INET_DIAG_ULP_INFO: u16 = 19;
const INET_ULP_INFO_NAME: u16 = 1;
const INET_ULP_INFO_TLS: u16 = 2;

/// A TCP socket, as the kernel describes it to others than its owner.
#[derive(Clone, Copy, Debug)]
pub struct Socket<'a> {
    /// The state of its connection.
    pub state: State,
    /// The address of our end.
    pub local: SocketAddr,
    /// The address of the peer; unspecified for a listener.
    pub remote: SocketAddr,
    /// The interface it is bound to; zero for none.
    pub interface: u32,
    /// A number that no other socket has had since the system started (`SO_COOKIE`).
    pub cookie: u64,
    /// Bytes that the application has not read; for a listener, connections not yet accepted.
    pub receive_queue: u32,
    /// Bytes that the peer has not acknowledged; for a listener, its backlog.
    pub send_queue: u32,
    /// The user it belongs to.
    pub uid: u32,
    /// The inode number, by which `/proc/PID/fd` names it; zero where no process has it open.
    pub inode: u32,
    /// What the kernel waits for, and for how long at most.
    pub timer: Option<(Timer, Duration)>,
    attributes: &'a [u8],
}

/// Why the kernel will deal with a connection by itself, should nothing happen before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Timer {
    /// What is unacknowledged is sent again, or a lost end of it is probed for.
    Retransmission,
    /// The peer is asked whether it is still there; also the time that FIN_WAIT2 may last.
    Keepalive,
    /// The end of TIME_WAIT.
    TimeWait,
    /// The peer is asked for its window, which was zero.
    WindowProbe,
}

impl Timer {
    /// `idiag_timer`.
    fn from_kernel(number: u8) -> Option<Self> {
        [Self::Retransmission, Self::Keepalive, Self::TimeWait, Self::WindowProbe]
            .get(usize::from(number.checked_sub(1)?))
            .copied()
    }

    /// As `netstat(8)` and `ss(8)` call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Retransmission => "on",
            Self::Keepalive => "keepalive",
            Self::TimeWait => "timewait",
            Self::WindowProbe => "persist",
        }
    }
}

impl Socket<'_> {
    /// `struct tcp_info`, as long as this kernel makes it. Empty in TIME_WAIT and SYN_RECV.
    pub fn tcp_info(&self) -> &[u8] {
        self.attribute(INET_DIAG_INFO).unwrap_or_default()
    }

    /// `SO_MARK`. The kernel tells it only with `CAP_NET_ADMIN`.
    pub fn mark(&self) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.attribute(INET_DIAG_MARK)?.first_chunk()?))
    }

    /// The name of its congestion control (`TCP_CONGESTION`).
    pub fn congestion_control(&self) -> Option<&str> {
        self.attribute(INET_DIAG_CONG).and_then(text)
    }

    /// The name of the protocol that the kernel itself speaks over it (`TCP_ULP`), such as `tls` or `mptcp`.
    pub fn upper_layer(&self) -> Option<&str> {
        let layer = self.attribute(INET_DIAG_ULP_INFO)?;
        attributes(layer).find(|(kind, _)| *kind == INET_ULP_INFO_NAME).and_then(|(_, name)| text(name))
    }

    /// What the kernel encrypts and decrypts (kTLS); `None` where it does not, or does not tell: it needs `CAP_NET_ADMIN`.
    pub fn tls(&self) -> Option<tls::Summary> {
        let mut layer = attributes(self.attribute(INET_DIAG_ULP_INFO)?);
        let (_, described) = layer.find(|(kind, _)| *kind == INET_ULP_INFO_TLS)?;
        // Version, cipher, and who encrypts and decrypts (`TLS_INFO_VERSION` … `TLS_INFO_RXCONF`).
        let [version, cipher, transmit, receive] = [1, 2, 3, 4].map(|wanted| {
            let found = attributes(described).find(|(kind, _)| *kind == wanted);
            found.and_then(|(_, value)| value.first_chunk().copied()).map_or(0, u16::from_ne_bytes)
        });
        Some(tls::Summary::of(version, cipher, transmit, receive))
    }

    /// It is a subflow of an MPTCP connection, which cannot be paused.
    pub fn is_mptcp(&self) -> bool {
        self.upper_layer() == Some("mptcp")
    }

    /// It takes no IPv4 connections (`IPV6_V6ONLY`).
    pub(crate) fn is_v6_only(&self) -> bool {
        self.attribute(INET_DIAG_SKV6ONLY).is_some_and(|value| value != [0])
    }

    /// TCP MD5 keys, one `struct tcp_diag_md5sig` behind another. The kernel tells them only with `CAP_NET_ADMIN`.
    pub(crate) fn md5_keys(&self) -> Option<&[u8]> {
        self.attribute(INET_DIAG_MD5SIG)
    }

    fn attribute(&self, wanted: u16) -> Option<&[u8]> {
        attributes(self.attributes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
    }
}

/// Reads a `struct inet_diag_msg`.
pub(super) fn decode(payload: &[u8]) -> Option<Socket<'_>> {
    let (header, attributes) = payload.split_first_chunk::<ANSWER>()?;
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let interface = word(40);
    let address = |port: usize, ip: usize| {
        let port = u16::from_be_bytes([header[port], header[port + 1]]);
        if i32::from(header[0]) == libc::AF_INET {
            let octets: [u8; 4] = header[ip..ip + 4].try_into().ok()?;
            return Some(SocketAddr::from((Ipv4Addr::from(octets), port)));
        }
        let octets: [u8; 16] = header[ip..ip + 16].try_into().ok()?;
        let ip = Ipv6Addr::from(octets);
        let scope = if ip.is_unicast_link_local() { interface } else { 0 };
        Some(SocketAddr::V6(SocketAddrV6::new(ip, port, 0, scope)))
    };
    Some(Socket {
        state: State::from_kernel(header[1])?,
        local: address(4, 8)?,
        remote: address(6, 24)?,
        interface,
        cookie: u64::from(word(44)) | u64::from(word(48)) << 32,
        receive_queue: word(56),
        send_queue: word(60),
        uid: word(64),
        inode: word(68),
        timer: Timer::from_kernel(header[2]).map(|timer| (timer, Duration::from_millis(word(52).into()))),
        attributes,
    })
}

/// A name that ends with a zero byte.
pub(super) fn text(bytes: &[u8]) -> Option<&str> {
    CStr::from_bytes_until_nul(bytes).ok()?.to_str().ok()
}
