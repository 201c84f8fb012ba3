//! Every TCP socket of a network namespace, whoever owns it: `sock_diag(7)`.
//!
//! ```
//! # fn main() -> soccr::Result<()> {
//! let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
//! let mut found = false;
//! soccr::diag::Diag::open()?.visit(|socket| found |= socket.local == listener.local_addr().unwrap())?;
//! assert!(found);
//! # Ok(())
//! # }
//! ```
//!
//! # References
//! `linux/inet_diag.h`, `linux/sock_diag.h`.

mod socket;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use soccr_netlink::{ACK, Batch, DUMP, Family, REQUEST};

use crate::error::{Error, Result};
use crate::flow::Flow;
pub use crate::queue::hides_unread;
pub use crate::save::refusal;
use crate::state::State;
use crate::sys::{descriptor, namespace, sockopt};
use socket::{INET_DIAG_CONG, INET_DIAG_INFO, decode};
pub use socket::{Socket, Timer};

/// The state of the connection in a TCP socket (`TCP_INFO`).
///
/// # Errors
/// System: the option, of any other socket.
pub fn state<Fd: AsFd + ?Sized>(socket: &Fd) -> Result<State> {
    crate::save::state(socket.as_fd()).map_err(|error| error.at("diag"))
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_REQ_BYTECODE: u16 = 1;
/// All states of `tcpi_state`.
const ALL_STATES: u32 = 0xfff;

/// Asks the kernel about the sockets of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Diag {
    netlink: soccr_netlink::Socket,
    batch: Batch,
}

impl Diag {
    /// Opens a `sock_diag` socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `EPROTONOSUPPORT` or, on asking, `ENOENT` where the kernel has no `inet_diag`; `EMFILE`.
    pub fn open() -> Result<Self> {
        let netlink = soccr_netlink::Socket::open(Family::SockDiag).map_err(failed)?;
        Ok(Self { netlink, batch: Batch::new() })
    }

    /// Opens one in the network namespace of `socket`.
    pub(crate) fn beside(socket: BorrowedFd<'_>) -> Result<Self> {
        let open = || soccr_netlink::Socket::open(Family::SockDiag);
        let netlink = namespace::open_beside(socket, open).map_err(failed)?;
        Ok(Self { netlink, batch: Batch::new() })
    }

    /// The same, for whoever keeps it.
    pub(crate) fn kept(self) -> Self {
        Self { netlink: self.netlink.with_descriptor(descriptor::high), ..self }
    }

    /// Shows every TCP socket to `each`, IPv4 first. Sockets come and go meanwhile: it is no snapshot.
    ///
    /// # Errors
    /// The errors of `sock_diag(7)`.
    pub fn visit(&mut self, mut each: impl FnMut(&Socket<'_>)) -> Result<()> {
        for family in [libc::AF_INET, libc::AF_INET6] {
            self.ask(&Request { family, states: ALL_STATES, dump: true, ..Request::default() }, &mut each)?;
        }
        Ok(())
    }

    /// Looks for the connection with exactly these addresses, bound to whichever link or to none, and shows it to `read`;
    /// `None` where there is none.
    ///
    /// # Errors
    /// The errors of `sock_diag(7)`.
    pub fn find<T>(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
        mut read: impl FnMut(&Socket<'_>) -> T,
    ) -> Result<Option<T>> {
        let mut found = None;
        self.find_each(&[Flow { local, remote }], |_, socket| found = Some(read(socket)))?;
        Ok(found)
    }

    /// The same for many connections: shows those that are there to `each`, with their place in `flows`. Where some are not there, this
    /// is much faster than one by one.
    ///
    /// # Errors
    /// The errors of `sock_diag(7)`.
    pub fn find_each(&mut self, flows: &[Flow], each: impl FnMut(usize, &Socket<'_>)) -> Result<()> {
        self.find_any(flows, None, each)
    }

    /// Shows a connected socket of this namespace to `read`.
    ///
    /// # Errors
    /// Refused where the kernel does not find it by its addresses. Those of `sock_diag(7)`.
    pub(crate) fn describe<T>(
        &mut self,
        socket: BorrowedFd<'_>,
        flow: Flow,
        mut read: impl FnMut(&Socket<'_>) -> T,
    ) -> Result<T> {
        let cookie = sockopt::get(socket, libc::SOL_SOCKET, libc::SO_COOKIE)
            .map_err(|error| Error::system("SO_COOKIE", error))?;
        let mut found = None;
        self.find_any(&[flow], Some(cookie), |_, socket| found = Some(read(socket)))?;
        found.ok_or_else(|| {
            let what =
                format!("a socket that sock_diag does not find from {} to {}", flow.local, flow.remote);
            Error::refused(what, "a BPF program of its cgroup may hide its true addresses")
        })
    }

    /// The connections with these addresses, and with this cookie if there is one.
    fn find_any(
        &mut self,
        flows: &[Flow],
        cookie: Option<u64>,
        mut each: impl FnMut(usize, &Socket<'_>),
    ) -> Result<()> {
        let is_it = |socket: &Socket<'_>| cookie.is_none_or(|cookie| cookie == socket.cookie);
        let mut missing: HashMap<Flow, Vec<usize>> = HashMap::new();
        for (index, flow) in flows.iter().enumerate() {
            // The kernel finds IPv4 connections of IPv6 sockets, too.
            let plain = |end: SocketAddr| match end.ip().to_canonical() {
                address @ IpAddr::V4(_) => SocketAddr::new(address, end.port()),
                IpAddr::V6(_) => end,
            };
            let mut found = false;
            let outcome = self.ask(&Request::exact(plain(flow.local), plain(flow.remote)), |socket| {
                // The kernel answers with a listener where there is no connection.
                if socket.remote.port() == flow.remote.port() && is_it(socket) {
                    found = true;
                    each(index, socket);
                }
            });
            match outcome {
                Err(error) if error.errno() == Some(libc::ENOENT) => {}
                outcome => outcome?,
            }
            if !found {
                missing.entry(flow.on_the_wire()).or_default().push(index);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        // A socket that is bound to a link is found by that link alone: all of these are looked through, once. A kernel
        // that knows nothing of TCP sockets (`tcp_diag`) has said of each that it is not there, but fails here.
        let has_ipv4 = missing.keys().any(|flow| flow.local.is_ipv4());
        for family in [libc::AF_INET, libc::AF_INET6].into_iter().skip(usize::from(!has_ipv4)) {
            let request =
                Request { family, states: ALL_STATES, dump: true, bound: true, ..Request::default() };
            self.ask(&request, |socket| {
                let flow = Flow { local: socket.local, remote: socket.remote };
                for &index in missing.get(&flow.on_the_wire()).into_iter().flatten() {
                    let link = scope(flows[index].local);
                    if (link == 0 || link == socket.interface) && is_it(socket) {
                        each(index, socket);
                    }
                }
            })?;
        }
        Ok(())
    }

    /// Shows the listeners on a port to `each`, IPv4 first.
    pub(crate) fn visit_listeners(&mut self, port: u16, mut each: impl FnMut(&Socket<'_>)) -> Result<()> {
        let states = 1 << State::Listen as u8;
        let local = Some(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
        [libc::AF_INET, libc::AF_INET6].into_iter().try_for_each(|family| {
            self.ask(&Request { family, states, local, dump: true, ..Request::default() }, &mut each)
        })
    }

    /// Closes a connection as the kernel's `SOCK_DESTROY` does: its owner sees `ECONNABORTED`, and a reset leaves for the
    /// peer, unless a lock stops it. One that is gone already counts as closed.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`; `EOPNOTSUPP` where the kernel lacks `CONFIG_INET_DIAG_DESTROY`.
    pub(crate) fn destroy(&mut self, flow: Flow) -> Result<()> {
        let Flow { local, remote } = flow.on_the_wire();
        let key = |socket: &Socket<'_>| (socket.cookie, socket.interface);
        let Some((cookie, interface)) = self.find(local, remote, key)? else { return Ok(()) };
        let request = Request { interface, ..Request::exact(local, remote) };
        let mut bytes = request.encode();
        bytes[48..].copy_from_slice(&cookie.to_ne_bytes());
        self.batch.clear();
        self.batch.message(SOCK_DESTROY, REQUEST | ACK, |message| message.bytes(&bytes));
        match self.netlink.transact(&self.batch) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            outcome => outcome.map_err(|error| Error::system("SOCK_DESTROY", error)),
        }
    }

    /// The peer of the connection in SYN_SENT that has this address and this cookie (`SO_COOKIE`): `getpeername(2)` does not tell it
    /// yet. `None` where there is none.
    ///
    /// # Errors
    /// The errors of `sock_diag(7)`.
    pub fn peer_of_handshake(&mut self, local: SocketAddr, cookie: u64) -> Result<Option<SocketAddr>> {
        let states = 1 << State::SynSent as u8;
        let request =
            Request { family: family(local), states, local: Some(local), dump: true, ..Request::default() };
        let mut peer = None;
        self.ask(&request, |socket| {
            if socket.cookie == cookie {
                peer = Some(socket.remote);
            }
        })?;
        Ok(peer)
    }

    fn ask(&mut self, request: &Request, mut each: impl FnMut(&Socket<'_>)) -> Result<()> {
        self.batch.clear();
        let flags = if request.dump { REQUEST | DUMP } else { REQUEST };
        self.batch.message(SOCK_DIAG_BY_FAMILY, flags, |message| {
            message.bytes(&request.encode());
            if request.bound {
                message.attribute(INET_DIAG_REQ_BYTECODE, &bound_to_a_link());
            }
        });
        let answer = |_, payload: &[u8]| {
            if let Some(socket) = decode(payload) {
                each(&socket);
            }
        };
        let asked = match request.dump {
            true => self.netlink.dump(&self.batch, answer),
            false => self.netlink.get(&self.batch, answer),
        };
        asked.map_err(failed)
    }
}

/// `struct inet_diag_req_v2`.
#[derive(Default)]
struct Request {
    family: i32,
    states: u32,
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
    /// The link that the socket is bound to; zero for none.
    interface: u32,
    dump: bool,
    /// Only of sockets that are bound to a link.
    bound: bool,
}

impl Request {
    /// For the one connection with these addresses. A link-local one is bound to its link.
    fn exact(local: SocketAddr, remote: SocketAddr) -> Self {
        let (family, interface) = (family(local), scope(local));
        let (local, remote) = (Some(local), Some(remote));
        Self { family, states: ALL_STATES, local, remote, interface, dump: false, bound: false }
    }

    fn encode(&self) -> [u8; 56] {
        let mut bytes = [0; 56];
        bytes[0] = self.family as u8;
        bytes[1] = libc::IPPROTO_TCP as u8;
        // One bit for each attribute wanted. MD5 keys come along with the info.
        bytes[2] = 1 << (INET_DIAG_INFO - 1) | 1 << (INET_DIAG_CONG - 1);
        bytes[4..8].copy_from_slice(&self.states.to_ne_bytes());
        for (address, port, ip) in [(self.local, 8, 12), (self.remote, 10, 28)] {
            let Some(address) = address else { continue };
            bytes[port..port + 2].copy_from_slice(&address.port().to_be_bytes());
            match address.ip() {
                IpAddr::V4(v4) => bytes[ip..ip + 4].copy_from_slice(&v4.octets()),
                IpAddr::V6(v6) => bytes[ip..ip + 16].copy_from_slice(&v6.octets()),
            }
        }
        bytes[44..48].copy_from_slice(&self.interface.to_ne_bytes());
        // INET_DIAG_NOCOOKIE: whatever its cookie.
        bytes[48..].fill(0xff);
        bytes
    }
}

/// Reads everything of an answer.
#[cfg(fuzzing)]
pub(crate) fn fuzz(payload: &[u8]) {
    let Some(socket) = decode(payload) else { return };
    let _ = (socket.tcp_info(), socket.mark(), socket.is_mptcp(), socket.is_v6_only(), socket.md5_keys());
    let _ = (socket.congestion_control(), socket.upper_layer());
}

/// What the kernel runs for each socket (`struct inet_diag_bc_op`): one that is bound to no link is passed over.
fn bound_to_a_link() -> [u8; 12] {
    const DEVICE: u8 = 9;
    const JUMP: u8 = 1;
    let mut code = [0; 12];
    // Device 0: to the jump behind it, which leads beyond the end, and so to no answer. Another one: to the end, to an answer.
    code[..4].copy_from_slice(&operation(DEVICE, 8, 12));
    code[8..].copy_from_slice(&operation(JUMP, 4, 8));
    code
}

/// How far it is to the next operation, where this one holds and where it does not.
fn operation(code: u8, yes: u8, no: u16) -> [u8; 4] {
    let [low, high] = no.to_ne_bytes();
    [code, yes, low, high]
}

fn scope(address: SocketAddr) -> u32 {
    match address {
        SocketAddr::V6(address) => address.scope_id(),
        SocketAddr::V4(_) => 0,
    }
}

fn family(address: SocketAddr) -> i32 {
    if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

fn failed(error: std::io::Error) -> Error {
    Error::system("sock_diag", error)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::socket::text;
    use super::*;

    fn congestion_control(socket: &TcpStream) -> Option<String> {
        let mut name = [0; 16];
        sockopt::get_bytes(socket.as_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, &mut name).unwrap();
        text(&name).map(str::to_owned)
    }

    #[test]
    fn connections_are_found_by_their_addresses() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(host).unwrap();
            let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let theirs = listener.accept().unwrap().0;
            ours.write_all(b"unread").unwrap();
            let mut diag = Diag::open().unwrap();
            let (local, remote) = (theirs.local_addr().unwrap(), theirs.peer_addr().unwrap());
            let read = |socket: &Socket<'_>| {
                assert_eq!((socket.local, socket.remote), (local, remote));
                assert_eq!((socket.state, socket.receive_queue), (State::Established, 6));
                assert_eq!(socket.tcp_info().first(), Some(&1));
                assert!(socket.inode != 0 && !socket.is_mptcp() && socket.upper_layer().is_none());
                assert_eq!(socket.congestion_control().map(Into::into), congestion_control(&theirs));
                socket.cookie
            };
            let cookie: u64 = sockopt::get(theirs.as_fd(), libc::SOL_SOCKET, libc::SO_COOKIE).unwrap();
            assert_eq!(diag.find(local, remote, read).unwrap(), Some(cookie));
            let mut seen = 0;
            diag.visit(|socket| seen += u32::from(socket.cookie == cookie)).unwrap();
            assert_eq!(seen, 1);
            let nobody = SocketAddr::new(remote.ip(), 1);
            assert_eq!(diag.find(local, nobody, |_| ()).unwrap(), None);
        }
    }

    #[test]
    fn what_is_bound_to_a_link_is_found() {
        for host in ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
            let listener = TcpListener::bind(host).unwrap();
            let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            sockopt::set_bytes(ours.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"lo\0").unwrap();
            let flow = Flow::of(&ours).unwrap();
            let mut diag = Diag::open().unwrap();
            let interface = diag.find(flow.local, flow.remote, |socket| socket.interface).unwrap();
            assert_eq!(interface, Some(1), "{flow:?}");
            assert_eq!(diag.describe(ours.as_fd(), flow, |socket| socket.interface).unwrap(), 1);
            // Another socket than that of these addresses.
            let error = diag.describe(listener.as_fd(), flow, |_| ()).unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::Refused, "{error}");
        }
    }
}
