//! Raw sockets: packets as if the peer had sent them, and ours to the peer.
//!
//! # References
//! `raw(7)`, `ip(7)`, `packet(7)`; RFC 3542 §3 (raw sockets of IPv6).

use std::cell::Cell;
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::retry_on_intr;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{
    AddressFamily, Protocol, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with,
};
use soccr_netlink::{Family, Socket};

use crate::error::{Error, Result};
use crate::sys::route::Routes;
use crate::sys::{LOOPBACK, MARK};
use crate::sys::{descriptor, ipv4, ipv6, namespace, sockopt};

/// How an [`Injector`] hands its packets to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    /// Routed like our own: to a local address over `lo`, to the peer over its route.
    Ipv4,
    /// The same for IPv6, with a header that the kernel writes, see [`ipv6`].
    Ipv6,
    /// The same for IPv6 in one piece of memory, however long, which adoption needs.
    Ipv6Whole,
    /// Received from `lo`, past the rules for outgoing packets: for local addresses only.
    Loopback,
}

impl Via {
    /// The way for packets with this address.
    pub(crate) fn routed(address: IpAddr) -> Self {
        if address.to_canonical().is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }

    /// Asks for the route of such packets from `remote` to `local`.
    ///
    /// # Errors
    /// Refused where the packets would leave this host, to the owner of a foreign address, who would reset the
    /// connection.
    fn check(self, routes: &mut Routes, remote: SocketAddr, local: SocketAddr, interface: u32) -> Result<()> {
        let stays = match self {
            // A packet from `lo` would not reach a socket that is bound to another interface, and would be answered by a reset.
            Self::Loopback if ![0, LOOPBACK].contains(&interface) => Ok(false),
            Self::Loopback => routes.stay_here_from_lo(remote.ip(), local.ip()),
            Self::Ipv4 | Self::Ipv6 | Self::Ipv6Whole => routes.end_here(local, interface),
        };
        if stays.map_err(|error| Error::system("RTM_GETROUTE", error))? {
            return Ok(());
        }
        let ip = local.ip().to_canonical();
        Err(Error::refused(
            format!("a packet that plays the peer's would leave this host: {ip} is no local address for it"),
            format!(
                "let packets with the mark 0xC114 go where those of the peer go: `ip rule add fwmark 0xc114 to {ip} lookup TABLE`"
            ),
        ))
    }
}

/// A raw socket in one network namespace, marked with [`MARK`] but for packets that go [as TCP's do](Injector::send_ours).
#[derive(Debug)]
pub(crate) struct Injector {
    fd: OwnedFd,
    via: Via,
    mark: Cell<u32>,
    /// The interface to which it is bound (`SO_BINDTOIFINDEX`), or 0.
    interface: Cell<u32>,
    priority: Cell<u32>,
}

/// A way into a socket for packets that play its peer's: the kernel has said that none of them leaves this host.
#[derive(Debug)]
pub(crate) struct Inward<'a> {
    injector: &'a Injector,
    local: SocketAddr,
}

impl<'a> Inward<'a> {
    /// The way for packets from `remote` to `local`, and to a socket that is bound to this interface (0: to none): it takes
    /// nothing that has not come from there.
    ///
    /// # Errors
    /// Those of [`Via::check`].
    pub(crate) fn open(
        injector: &'a Injector,
        routes: &mut Routes,
        remote: SocketAddr,
        local: SocketAddr,
        interface: u32,
    ) -> Result<Self> {
        injector.via.check(routes, remote, local, interface)?;
        Self::known(injector, local, interface)
    }

    /// The same, for packets of which it is known that they stay here.
    fn known(injector: &'a Injector, local: SocketAddr, interface: u32) -> Result<Self> {
        if injector.via != Via::Loopback {
            injector.bind_to(interface).map_err(|error| Error::system("SO_BINDTOIFINDEX", error))?;
        }
        injector.mark_with(MARK)?;
        Ok(Self { injector, local })
    }

    /// Gives its packets this `SO_PRIORITY`, by which a program knows what to do with them.
    pub(crate) fn with_priority(self, priority: u32) -> io::Result<Self> {
        let Injector { fd, priority: now, .. } = self.injector;
        if now.replace(priority) != priority {
            sockopt::set(fd.as_fd(), libc::SOL_SOCKET, libc::SO_PRIORITY, &priority)?;
        }
        Ok(self)
    }

    /// Sends a whole packet, see [`Injector::send`].
    pub(crate) fn send(&self, packet: &[u8]) -> Result<()> {
        self.injector.send(packet, self.local)
    }
}

/// Raw sockets of one network namespace, for packets that play those of any peer there, kept for as long as a lock or an
/// adopter lives.
#[derive(Debug)]
pub(crate) struct Ways {
    /// IPv4, IPv6. A kernel without one of the families has no connections of it either.
    injectors: [Option<Injector>; 2],
    routes: Routes,
    /// Where packets were known to stay here, and when.
    stays: Option<(SocketAddr, u32, Instant)>,
}

/// How long the answer of the kernel holds: asked for each packet, it costs as much as sending it.
const ANSWER: Duration = Duration::from_millis(10);

impl Ways {
    /// In the namespace of the calling thread.
    pub(crate) fn open() -> io::Result<Self> {
        let open = |via| match Injector::open(via) {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(None),
            opened => opened.map(|injector| Some(Injector { fd: descriptor::high(injector.fd), ..injector })),
        };
        let injectors = [open(Via::Ipv4)?, open(Via::Ipv6Whole)?];
        Ok(Self { injectors, routes: Routes::open()?.kept(), stays: None })
    }

    /// See [`Inward::open`]. An answer of the kernel serves for some milliseconds.
    pub(crate) fn inward(
        &mut self,
        remote: SocketAddr,
        local: SocketAddr,
        interface: u32,
    ) -> Result<Inward<'_>> {
        let injector = &self.injectors[usize::from(!local.ip().to_canonical().is_ipv4())];
        let injector = injector.as_ref().ok_or_else(|| {
            Error::refused(
                "a packet of a missing address family",
                "the kernel got it after the raw sockets were opened",
            )
        })?;
        let now = Instant::now();
        match self.stays {
            Some((to, on, since)) if (to, on) == (local, interface) && now - since < ANSWER => {
                Inward::known(injector, local, interface)
            }
            _ => {
                let way = Inward::open(injector, &mut self.routes, remote, local, interface)?;
                self.stays = Some((local, interface, now));
                Ok(way)
            }
        }
    }
}

impl Ways {
    /// The interface by which packets go to this address.
    pub(crate) fn interface_to(&mut self, address: IpAddr) -> io::Result<u32> {
        self.routes.interface_to(address)
    }
}

impl AsFd for Ways {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.routes.as_fd()
    }
}

/// The interface to which a socket is bound, or 0 (`SO_BINDTOIFINDEX`, Linux 5.0; older kernels tell none).
pub(crate) fn bound_interface(socket: BorrowedFd<'_>) -> Result<u32> {
    match sockopt::get(socket, libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(0),
        interface => interface.map_err(|error| Error::system("SO_BINDTOIFINDEX", error)),
    }
}

/// What is opened to inject packets and to ask the kernel, the last one of each kind with the cookie of its network
/// namespace: opening them costs as much as the rest of a restore. They belong to the call that saves or restores, or to the
/// thread that does so with many connections, and end with it: the program around it never finds a descriptor that it has
/// not opened.
#[derive(Debug, Default)]
pub(crate) struct Injectors {
    last: [Option<(u64, Injector)>; 4],
    routes: Option<(u64, Routes)>,
    netfilter: Option<(u64, Socket)>,
    /// What stays on this host, and when the kernel has said so.
    checked: Option<(Question, Instant)>,
}

/// The namespace, and what [`Via::check`] is asked: about the peer only where its answer depends on it.
type Question = (u64, Via, Option<IpAddr>, SocketAddr, u32);

/// As what an injector is opened.
const RAW: &str = "raw socket";

impl Injectors {
    /// The injector for the namespace of `socket`, for packets to its peer.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_RAW` and `CAP_NET_ADMIN`, and without `CAP_SYS_ADMIN` where the socket is in
    /// another namespace than the thread.
    pub(crate) fn outward(&mut self, socket: BorrowedFd<'_>, via: Via) -> Result<&Injector> {
        let namespace = namespace_of(socket)?;
        let injector = beside(RAW, &mut self.last[via as usize], namespace, socket, || Injector::open(via))?;
        injector
            .bind_to(bound_interface(socket)?)
            .map_err(|error| Error::system("SO_BINDTOIFINDEX", error))?;
        Ok(injector)
    }

    /// Netfilter in the namespace of `socket`: connection tracking.
    ///
    /// # Errors
    /// The errors of opening a netlink socket there.
    pub(crate) fn netfilter(&mut self, socket: BorrowedFd<'_>) -> Result<&mut Socket> {
        let namespace = namespace_of(socket)?;
        beside("netfilter socket", &mut self.netfilter, namespace, socket, || Socket::open(Family::Netfilter))
    }

    /// The way into `socket`, for packets that play its peer's.
    ///
    /// # Errors
    /// The errors of [`outward`](Self::outward) and [`Inward::open`].
    pub(crate) fn inward(
        &mut self,
        socket: BorrowedFd<'_>,
        via: Via,
        remote: SocketAddr,
        local: SocketAddr,
    ) -> Result<Inward<'_>> {
        let (namespace, interface) = (namespace_of(socket)?, bound_interface(socket)?);
        let peer = (via == Via::Loopback).then_some(remote.ip());
        let mut at_any_port = local;
        at_any_port.set_port(0);
        let question = (namespace, via, peer, at_any_port, interface);
        let injector = beside(RAW, &mut self.last[via as usize], namespace, socket, || Injector::open(via))?;
        if !self.checked.is_some_and(|(same, when)| same == question && when.elapsed() < ANSWER) {
            let routes = beside("netlink socket", &mut self.routes, namespace, socket, Routes::open)?;
            via.check(routes, remote, local, interface)?;
            self.checked = Some((question, Instant::now()));
        }
        Inward::known(injector, local, interface)
    }
}

fn namespace_of(socket: BorrowedFd<'_>) -> Result<u64> {
    namespace::cookie(socket).map_err(|error| Error::system("SO_NETNS_COOKIE", error))
}

/// What was used last, or what `open` opens, if that is in another network namespace than `socket`.
fn beside<'a, T: AsFd + Send>(
    what: &'static str,
    last: &'a mut Option<(u64, T)>,
    namespace: u64,
    socket: BorrowedFd<'_>,
    open: impl Fn() -> io::Result<T> + Send + Sync,
) -> Result<&'a mut T> {
    let opened = match last.take() {
        Some((same, opened)) if same == namespace => opened,
        _ => namespace::open_in(namespace, socket, open).map_err(|error| Error::system(what, error))?,
    };
    Ok(&mut last.insert((namespace, opened)).1)
}

impl Injector {
    /// Opens a raw socket in the namespace of the calling thread.
    fn open(via: Via) -> io::Result<Self> {
        let raw = |family, kind, protocol| socket_with(family, kind, SocketFlags::CLOEXEC, protocol);
        let fd = match via {
            Via::Ipv4 => raw(AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW))?,
            Via::Ipv6 => ipv6::open()?,
            Via::Ipv6Whole => raw(AddressFamily::INET6, SocketType::RAW, Some(ipproto::RAW))?,
            Via::Loopback => raw(AddressFamily::PACKET, SocketType::DGRAM, None::<Protocol>)?,
        };
        sockopt::set(fd.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, &MARK)?;
        Ok(Self { fd, via, mark: Cell::new(MARK), interface: Cell::new(0), priority: Cell::new(0) })
    }

    /// Gives its packets this mark.
    fn mark_with(&self, mark: u32) -> Result<()> {
        if self.mark.get() != mark {
            sockopt::set(self.fd.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, &mark)
                .map_err(|error| Error::system("SO_MARK", error))?;
            self.mark.set(mark);
        }
        Ok(())
    }

    /// Makes its packets take this interface, or any (0).
    fn bind_to(&self, interface: u32) -> io::Result<()> {
        if self.interface.get() != interface {
            sockopt::set(self.fd.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX, &interface)?;
            self.interface.set(interface);
        }
        Ok(())
    }

    /// Sends a whole packet, IP header included, towards `destination`, whose scope counts and whose port does not.
    ///
    /// A packet to a local address has been received, as a rule, when this returns; under load it may be
    /// a moment later.
    ///
    /// # Errors
    /// `EPERM` where a firewall drops it on its way out, `EMSGSIZE` where it is longer than the route allows
    /// (65535 bytes to a local address).
    pub(crate) fn send(&self, packet: &[u8], destination: SocketAddr) -> Result<()> {
        let flags = SendFlags::NOSIGNAL;
        let send = || match (self.via, destination.ip().to_canonical(), destination) {
            (Via::Ipv4, IpAddr::V4(v4), _) => {
                sendto(&self.fd, packet, flags, &SocketAddrV4::new(v4, 0)).map(drop)
            }
            (Via::Ipv6, _, SocketAddr::V6(v6)) => ipv6::send(self.fd.as_fd(), packet, v6),
            (Via::Ipv6Whole, _, SocketAddr::V6(v6)) => {
                let address = SocketAddrV6::new(*v6.ip(), 0, 0, v6.scope_id());
                sendto(&self.fd, packet, flags, &address).map(drop)
            }
            (Via::Loopback, address, _) => {
                let protocol = if address.is_ipv4() { libc::ETH_P_IP } else { libc::ETH_P_IPV6 } as u16;
                let device = Device { index: LOOPBACK, protocol, destination: [0; 6] };
                sendto(&self.fd, packet, flags, &device).map(drop)
            }
            _ => Err(rustix::io::Errno::AFNOSUPPORT),
        };
        answer(send)
    }

    /// Sends a packet of `socket` to its peer, by the way that those take which TCP sends: source and mark decide as well.
    /// Where a lock drops it, it has the mark that locks let pass.
    ///
    /// # Errors
    /// Those of [`send`](Self::send).
    pub(crate) fn send_ours(
        &self,
        socket: BorrowedFd<'_>,
        packet: &[u8],
        destination: SocketAddr,
    ) -> Result<()> {
        let send = || match (self.via, destination.ip().to_canonical()) {
            (Via::Ipv4, IpAddr::V4(to)) => answer(|| ipv4::send(self.fd.as_fd(), packet, to)),
            _ => self.send(packet, destination),
        };
        self.mark_with(sockopt::get(socket, libc::SOL_SOCKET, libc::SO_MARK).unwrap_or(MARK))?;
        match send() {
            Err(error) if error.errno() == Some(libc::EPERM) => {
                self.mark_with(MARK)?;
                send()
            }
            outcome => outcome,
        }
    }
}

fn answer(send: impl FnMut() -> rustix::io::Result<()>) -> Result<()> {
    match retry_on_intr(send) {
        Ok(()) => Ok(()),
        Err(errno @ rustix::io::Errno::PERM) => Err(Error::system("raw sendto", errno)
            .advise("a firewall rule drops outgoing packets with mark 0xC114: let them pass on `lo`")),
        Err(errno) => Err(Error::system("raw sendto", errno)),
    }
}

impl AsFd for Injector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sends a packet of this protocol (`ETH_P_…`) out of a device, to an Ethernet address.
pub(crate) fn send_from_device(
    index: u32,
    protocol: u16,
    destination: [u8; 6],
    packet: &[u8],
) -> io::Result<()> {
    let fd = socket_with(AddressFamily::PACKET, SocketType::DGRAM, SocketFlags::CLOEXEC, None::<Protocol>)?;
    let device = Device { index, protocol, destination };
    retry_on_intr(|| sendto(&fd, packet, SendFlags::NOSIGNAL, &device))?;
    Ok(())
}

/// A device, and for whom a packet is that leaves it.
struct Device {
    index: u32,
    protocol: u16,
    destination: [u8; 6],
}

// SAFETY: the closure gets a pointer to a `sockaddr_ll` and its size.
unsafe impl SocketAddrArg for Device {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        let mut sll_addr = [0; 8];
        sll_addr[..6].copy_from_slice(&self.destination);
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: self.protocol.to_be(),
            sll_ifindex: self.index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr,
        };
        f((&raw const address).cast(), size_of::<libc::sockaddr_ll>() as SocketAddrLen)
    }
}
