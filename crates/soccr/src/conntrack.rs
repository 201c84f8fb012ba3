//! Connection tracking: firewalls and NAT know a connection by an entry in the kernel; the host that it moves to has none.
//!
//! So the entry travels along, and is made where the connection is restored, before the first packet: a firewall that lets only
//! established connections pass then knows that this one is, and NAT goes on to translate its addresses. An entry that is
//! there already, perhaps from an earlier stay, gets the connection's state, and its window checks are turned off.
//!
//! The entry is looked up by the socket's own addresses, which the packets that it sends have.
//!
//! # References
//! `linux/netfilter/nfnetlink_conntrack.h`; conntrack(8).

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use soccr_netlink::{ACK, Batch, CREATE, EXCLUSIVE, Family, Message, REQUEST, Socket, attributes};

use crate::error::{Error, Result};
use crate::flow::Flow;
use crate::nftables;
use crate::state::State;
use crate::sys;
use crate::sys::namespace::{self, Recently};
use crate::sys::raw::Injectors;
use crate::sys::sockopt;

/// What connection tracking knows about a connection beyond its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// The connection as the packets of the peer show it before they are translated (NAT), and those of our end behind.
    pub wire: Flow,
    /// Our end has begun the connection.
    pub initiator: bool,
    /// The mark that a firewall has given it (`ct mark`).
    pub mark: u32,
}

impl Tracked {
    /// What a host would assume by itself.
    fn plain(flow: Flow) -> Self {
        Self { wire: flow.on_the_wire(), initiator: false, mark: 0 }
    }

    /// Its packets have other addresses on the wire than its socket.
    pub fn is_translated(&self, flow: Flow) -> bool {
        self.wire.on_the_wire() != flow.on_the_wire()
    }

    /// Those addresses, where they are others.
    pub(crate) fn translation(&self, flow: Flow) -> Option<Flow> {
        self.is_translated(flow).then(|| self.wire.on_the_wire())
    }

    /// The first packet's addresses, and those of the answer: (source, destination) each.
    fn tuples(&self, flow: Flow) -> [(SocketAddr, SocketAddr); 2] {
        let sent = (flow.local, flow.remote);
        let received = (self.wire.remote, self.wire.local);
        if self.initiator { [sent, received] } else { [received, sent] }
    }
}

/// The connection tracking of a network namespace: what may translate a connection on its way is found there, also outside of the
/// namespace that its socket is in.
#[derive(Debug)]
pub struct Tracking(Socket);

impl Tracking {
    /// That of the calling thread's network namespace. `None` where the kernel tracks no connection.
    ///
    /// # Errors
    /// Opening a netlink socket failed.
    pub fn open() -> Result<Option<Self>> {
        let open = || Socket::open(Family::Netfilter).map_err(|error| Error::system("conntrack", error));
        is_loaded().then(|| Ok(Self(open()?))).transpose()
    }

    /// What is known there about a connection, by the addresses that its socket has.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN` in that namespace.
    pub fn find(&mut self, flow: Flow) -> Result<Option<Tracked>> {
        find(&mut self.0, flow).map_err(|error| Error::system("conntrack", error))
    }
}

/// What is known about a connection in the network namespace of its socket, where that is more than its addresses.
/// `None` as well where nothing is tracked, or nobody tells.
///
/// # Errors
/// The kernel has an entry, and could not tell of it: the connection may be translated. Refused where it is, and nobody tells how.
pub(crate) fn read(injectors: &mut Injectors, socket: BorrowedFd<'_>, flow: Flow) -> Result<Option<Tracked>> {
    let destination = original_destination(socket, flow);
    if has_entry(&destination) != Some(true) {
        return Ok(None);
    }
    let found = injectors
        .netfilter(socket)
        .and_then(|netlink| find(netlink, flow).map_err(|error| Error::system("conntrack", error)));
    match (found, destination) {
        // Rights over the socket alone are enough where nothing is translated.
        (Err(error), Ok(destination)) if is_denied(&error) => {
            let Flow { local, remote } = flow.on_the_wire();
            if [local, remote].contains(&destination) { Ok(None) } else { Err(untold(destination)) }
        }
        (found, _) => Ok(found?.filter(|tracked| *tracked != Tracked::plain(flow))),
    }
}

fn untold(destination: SocketAddr) -> Error {
    Error::refused(
        format!(
            "a connection behind NAT, about which nobody tells more than that it was begun to {destination}"
        ),
        "needs CAP_SYS_ADMIN to ask in its network namespace, and a kernel that answers: modprobe nf_conntrack_netlink",
    )
}

/// To where the connection was begun that what the socket sends belongs to. One call that needs no privilege, as proxies ask by
/// it where a connection was to go.
fn original_destination(socket: BorrowedFd<'_>, flow: Flow) -> io::Result<SocketAddr> {
    /// linux/netfilter_ipv4.h; for IPv6 `IP6T_SO_ORIGINAL_DST` has the same number.
    const SO_ORIGINAL_DST: i32 = 80;
    let level = if flow.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 };
    // `struct sockaddr_in`, or `sockaddr_in6`, which has a flow label before its address.
    let mut name = [0; size_of::<libc::sockaddr_in6>()];
    sockopt::get_bytes(socket, level, SO_ORIGINAL_DST, &mut name)?;
    let ip = if flow.is_ipv4() {
        IpAddr::from([name[4], name[5], name[6], name[7]])
    } else {
        let mut ip = [0; 16];
        ip.copy_from_slice(&name[8..24]);
        IpAddr::from(ip)
    };
    Ok(SocketAddr::new(ip, u16::from_be_bytes([name[2], name[3]])))
}

/// Whether there is an entry for what the socket sends; `None` where the kernel cannot track connections.
fn has_entry(destination: &io::Result<SocketAddr>) -> Option<bool> {
    match destination {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => None,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Some(false),
        _ => Some(true),
    }
}

/// Makes a connection known in the network namespace of its socket, and returns it as its packets must show it to reach the
/// socket.
///
/// Entries live by packets; one that sees none is gone after two minutes.
///
/// # Errors
/// Refused where it was translated, and cannot be here. The kernel could not make the entry that rules may ask for.
pub(crate) fn admit(
    injectors: &mut Injectors,
    socket: BorrowedFd<'_>,
    flow: Flow,
    state: State,
    tracked: Option<Tracked>,
) -> Result<Flow> {
    let translated = tracked.filter(|tracked| tracked.is_translated(flow));
    if translated.is_none() && !is_used(injectors, socket, flow) {
        return Ok(flow);
    }
    let is_known = has_entry(&original_destination(socket, flow)) == Some(true);
    let entered = injectors.netfilter(socket).and_then(|netlink| {
        let failed = |error| Error::system("conntrack", error);
        if translated.is_some() && !translates(netlink).map_err(failed)? {
            return Err(Error::refused("no rules for NAT are here", ""));
        }
        let known = if is_known { find(netlink, flow).map_err(failed)? } else { None };
        let wanted = tracked.unwrap_or(Tracked::plain(flow));
        match enter(netlink, flow, state, known, wanted) {
            // The entry has come, or gone, since it was looked for.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENOENT)) => {
                let known = find(netlink, flow).map_err(failed)?;
                enter(netlink, flow, state, known, wanted).map_err(failed)
            }
            entered => entered.map_err(failed),
        }
    });
    match (entered, translated) {
        (Ok(entered), Some(wanted)) if entered.wire != wanted.wire.on_the_wire() => Err(untranslated(
            wanted,
            &format!("here it would be {} to {}", entered.wire.local, entered.wire.remote),
        )),
        // The addresses of the socket say more: the scope of link-local ones.
        (Ok(entered), _) if !entered.is_translated(flow) => Ok(flow),
        (Ok(entered), _) => Ok(entered.wire),
        (Err(error), Some(wanted)) => Err(untranslated(wanted, &error.to_string())),
        (Err(error), None) if is_denied(&error) => Ok(flow),
        (Err(error), None) => Err(error),
    }
}

/// Nothing can be entered, and never could: without rights over the network namespace, and by a kernel that tells nobody about
/// its entries.
fn is_denied(error: &Error) -> bool {
    matches!(error.errno(), Some(libc::EPERM | libc::EINVAL | libc::EPROTONOSUPPORT))
}

/// Whether anything in the network namespace of `socket` can come to look at an entry: the kernel tracks connections where
/// rules ask for it. Where there were none a moment ago, nobody is asked again.
fn is_used(injectors: &mut Injectors, socket: BorrowedFd<'_>, flow: Flow) -> bool {
    static UNUSED: Recently = Recently::within(Duration::from_millis(10));
    if UNUSED.at(socket).is_some() {
        return false;
    }
    let is_used = match has_entry(&original_destination(socket, flow)) {
        // Whoever cannot ask does not know that there are none.
        Some(false) => injectors.netfilter(socket).map_or(true, |netlink| has_rules(netlink, socket)),
        known => known.is_some(),
    };
    if !is_used {
        UNUSED.note_at(socket, ());
    }
    is_used
}

/// Somebody else has rules in the namespace of `socket`, or may have.
fn has_rules(netlink: &mut Socket, socket: BorrowedFd<'_>) -> bool {
    let ours = |tables: Vec<String>| tables.iter().all(|table| table.starts_with(nftables::PREFIX));
    !nftables::names(netlink, None).is_ok_and(ours)
        || !legacy_tables_beside(socket).is_ok_and(|tables| tables.is_empty())
}

/// The tables of iptables and ip6tables in the network namespace of the thread.
///
/// # Errors
/// `EACCES`: the kernel names them to root alone.
pub(crate) fn legacy_tables() -> io::Result<Vec<String>> {
    let directory = Path::new("/proc/thread-self/net");
    let mut tables = Vec::new();
    for file in ["ip_tables_names", "ip6_tables_names"] {
        match std::fs::read_to_string(directory.join(file)) {
            Ok(names) => tables.extend(names.lines().map(str::to_owned)),
            // It is not loaded.
            Err(error) if error.kind() == io::ErrorKind::NotFound && directory.exists() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(tables)
}

/// The same in the namespace of a socket.
fn legacy_tables_beside(socket: BorrowedFd<'_>) -> io::Result<Vec<String>> {
    namespace::run_beside(socket, legacy_tables)
}

fn untranslated(wanted: Tracked, reason: &str) -> Error {
    let Flow { local, remote } = wanted.wire;
    Error::refused(
        format!(
            "the peer knows the connection as {local} to {remote} (NAT), and this host does not: {reason}"
        ),
        "set up the same NAT here, in the same network namespace, before the connection comes",
    )
}

/// As packets show them before they are translated: those of these connections for which that makes a difference.
///
/// # Errors
/// Whether they are translated could not be found out.
pub(crate) fn translated(netlink: &mut Socket, flows: &[Flow]) -> io::Result<Vec<(Flow, Flow)>> {
    /// Where nothing was translated a moment ago, nothing is that is worth a lock.
    static PLAIN: Recently = Recently::within(Duration::from_millis(10));
    if PLAIN.at(netlink.as_fd()).is_some() || !is_loaded() {
        return Ok(Vec::new());
    }
    let translates = match translates(netlink) {
        // Without a right, a thread or a /proc to find out with: the entries tell.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EPERM | libc::EACCES | libc::EAGAIN | libc::ENOENT)
            ) =>
        {
            true
        }
        translates => translates?,
    };
    if !translates {
        PLAIN.note_at(netlink.as_fd(), ());
        return Ok(Vec::new());
    }
    let mut translated = Vec::new();
    for &flow in flows {
        let tracked = match find(netlink, flow) {
            // This kernel tells nobody about its entries.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
            found => found?.filter(|tracked| tracked.is_translated(flow)),
        };
        translated.extend(tracked.map(|tracked| (flow, tracked.wire)));
    }
    Ok(translated)
}

/// The kernel can track connections: otherwise to ask it would load what nobody here uses.
pub(crate) fn is_loaded() -> bool {
    Path::new("/proc/sys/net/netfilter/nf_conntrack_count").exists() || !Path::new("/proc/sys/net").exists()
}

/// Something here translates addresses: without such a rule no entry is ever applied.
fn translates(netlink: &mut Socket) -> io::Result<bool> {
    Ok(nftables::has_chain_of_type(netlink, "nat")?
        || legacy_tables_beside(netlink.as_fd())?.iter().any(|name| name == "nat"))
}

/// Finds the entry of a connection by what its socket sends.
fn find(netlink: &mut Socket, flow: Flow) -> io::Result<Option<Tracked>> {
    let flow = flow.on_the_wire();
    let mut batch = Batch::new();
    batch.message(GET, REQUEST, |m| {
        header(m, flow);
        m.nested(TUPLE_ORIGINAL, |t| tuple(t, (flow.local, flow.remote)));
    });
    let entry = netlink.get(&batch, |_, entry| {
        let entry = entry.get(HEADER..).unwrap_or_default();
        let side = |kind| nftables::value(entry, kind).and_then(read_tuple);
        let (original, reply) = (side(TUPLE_ORIGINAL)?, side(TUPLE_REPLY)?);
        let initiator = original == (flow.local, flow.remote);
        let (remote, local) = if initiator { reply } else { original };
        let mark = nftables::value(entry, MARK).and_then(<[u8]>::first_chunk);
        let mark = mark.map_or(0, |mark| u32::from_be_bytes(*mark));
        Some(Tracked { wire: Flow { local, remote }, initiator, mark })
    });
    match entry {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        entry => entry,
    }
}

fn enter(
    netlink: &mut Socket,
    flow: Flow,
    state: State,
    known: Option<Tracked>,
    tracked: Tracked,
) -> io::Result<Tracked> {
    let flow = flow.on_the_wire();
    let [original, reply] = known.unwrap_or(tracked).tuples(flow);
    let mut batch = Batch::new();
    batch.message(
        NEW,
        if known.is_some() { REQUEST | ACK } else { REQUEST | ACK | CREATE | EXCLUSIVE },
        |m| {
            header(m, flow);
            m.nested(TUPLE_ORIGINAL, |t| tuple(t, original));
            // The kernel translates the answer by itself, and only what it translates so.
            m.nested(TUPLE_REPLY, |t| {
                tuple(t, if known.is_some() { reply } else { (original.1, original.0) })
            });
            if known.is_none() {
                for (kind, before, after) in
                    [(NAT_DESTINATION, original.1, reply.0), (NAT_SOURCE, original.0, reply.1)]
                {
                    if before != after {
                        m.nested(kind, |nat| translation(nat, after));
                    }
                }
                m.be32(STATUS, SEEN_REPLY | ASSURED | CONFIRMED);
                m.be32(TIMEOUT, 120);
                // Rules may give the packets of a connection its mark.
                if tracked.mark != 0 && tracked.mark != sys::MARK {
                    m.be32(MARK, tracked.mark);
                }
            }
            m.nested(PROTOCOL_INFO, |info| {
                info.nested(INFO_TCP, |tcp| {
                    tcp.attribute(TCP_STATE, &[state_of(state)]);
                    // The windows are unknown until both ends have sent.
                    tcp.attribute(TCP_FLAGS_ORIGINAL, &[BE_LIBERAL, BE_LIBERAL]);
                    tcp.attribute(TCP_FLAGS_REPLY, &[BE_LIBERAL, BE_LIBERAL]);
                });
            });
        },
    );
    netlink.transact(&batch)?;
    match known {
        Some(known) => Ok(known),
        // What it has made of it.
        None => find(netlink, flow)?.ok_or_else(|| io::ErrorKind::NotFound.into()),
    }
}

/// The state by which the kernel's tracker names it (`enum tcp_conntrack`).
fn state_of(state: State) -> u8 {
    match state {
        State::FinWait1 => 4,
        State::FinWait2 | State::CloseWait => 5,
        State::Closing | State::LastAck => 6,
        State::Close => 7,
        _ => 3,
    }
}

fn header(m: &mut Message<'_>, flow: Flow) {
    let family = if flow.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    m.bytes(&[family as u8, 0, 0, 0]);
}

fn tuple(t: &mut Message<'_>, (source, destination): (SocketAddr, SocketAddr)) {
    t.nested(TUPLE_IP, |ip| {
        for (end, v4, v6) in
            [(source, IPV4_SOURCE, IPV6_SOURCE), (destination, IPV4_DESTINATION, IPV6_DESTINATION)]
        {
            match end.ip().to_canonical() {
                IpAddr::V4(address) => ip.attribute(v4, &address.octets()),
                IpAddr::V6(address) => ip.attribute(v6, &address.octets()),
            }
        }
    });
    t.nested(TUPLE_PROTOCOL, |protocol| {
        protocol.attribute(PROTOCOL_NUMBER, &[libc::IPPROTO_TCP as u8]);
        protocol.attribute(PORT_SOURCE, &source.port().to_be_bytes());
        protocol.attribute(PORT_DESTINATION, &destination.port().to_be_bytes());
    });
}

fn read_tuple(bytes: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let (ip, protocol) = (nftables::value(bytes, TUPLE_IP)?, nftables::value(bytes, TUPLE_PROTOCOL)?);
    let end = |v4, v6, port| {
        let address = match attributes(ip).find(|(kind, _)| [v4, v6].contains(kind))?.1 {
            bytes if bytes.len() == 4 => IpAddr::from(*bytes.first_chunk::<4>()?),
            bytes => IpAddr::from(*bytes.first_chunk::<16>()?),
        };
        let port = u16::from_be_bytes(*nftables::value(protocol, port)?.first_chunk()?);
        Some(SocketAddr::new(address, port))
    };
    Some((
        end(IPV4_SOURCE, IPV6_SOURCE, PORT_SOURCE)?,
        end(IPV4_DESTINATION, IPV6_DESTINATION, PORT_DESTINATION)?,
    ))
}

/// One address, and one port, to translate to.
fn translation(nat: &mut Message<'_>, to: SocketAddr) {
    match to.ip().to_canonical() {
        IpAddr::V4(address) => {
            [NAT_V4_FROM, NAT_V4_TO].iter().for_each(|kind| nat.attribute(*kind, &address.octets()))
        }
        IpAddr::V6(address) => {
            [NAT_V6_FROM, NAT_V6_TO].iter().for_each(|kind| nat.attribute(*kind, &address.octets()))
        }
    }
    nat.nested(NAT_PROTOCOL, |protocol| {
        for kind in [NAT_PORT_FROM, NAT_PORT_TO] {
            protocol.attribute(kind, &to.port().to_be_bytes());
        }
    });
}

const HEADER: usize = 4;
const NEW: u16 = 1 << 8;
const GET: u16 = 1 << 8 | 1;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL_INFO: u16 = 4;
const NAT_SOURCE: u16 = 6;
const TIMEOUT: u16 = 7;
const MARK: u16 = 8;
const NAT_DESTINATION: u16 = 13;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const IPV4_SOURCE: u16 = 1;
const IPV4_DESTINATION: u16 = 2;
const IPV6_SOURCE: u16 = 3;
const IPV6_DESTINATION: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const PORT_SOURCE: u16 = 2;
const PORT_DESTINATION: u16 = 3;
const INFO_TCP: u16 = 1;
const TCP_STATE: u16 = 1;
const TCP_FLAGS_ORIGINAL: u16 = 4;
const TCP_FLAGS_REPLY: u16 = 5;
const NAT_V4_FROM: u16 = 1;
const NAT_V4_TO: u16 = 2;
const NAT_PROTOCOL: u16 = 3;
const NAT_V6_FROM: u16 = 4;
const NAT_V6_TO: u16 = 5;
const NAT_PORT_FROM: u16 = 1;
const NAT_PORT_TO: u16 = 2;

// linux/netfilter/nf_conntrack_common.h, linux/netfilter/nf_conntrack_tcp.h
const SEEN_REPLY: u32 = 1 << 1;
const ASSURED: u32 = 1 << 2;
const CONFIRMED: u32 = 1 << 3;
const BE_LIBERAL: u8 = 0x08;
