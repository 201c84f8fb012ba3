//! What stands against an adoption, in words, with the remedy.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileExt;

use crate::adopt::program::Failure;
use crate::connection::{Connection, Flow, State};
use crate::diag::{Diag, Socket};
use crate::error::{Error, Result};
use crate::settings::MD5;
use crate::sys::raw::Ways;

/// The kernel takes no smaller MSS for a connection made of a segment.
const MIN_MSS: [u16; 2] = [536, 1220];

/// Why a program could not be loaded.
pub(super) fn explain(Failure { step, error }: Failure) -> Error {
    use std::io::ErrorKind::{NotFound, PermissionDenied};
    match (error.kind(), step) {
        (PermissionDenied, _) => Error::system(step, error).advise(
            "needs CAP_BPF, CAP_NET_ADMIN and CAP_NET_RAW in the initial user namespace: run as root",
        ),
        (NotFound, "BTF") => Error::system(step, error).advise("needs a kernel with CONFIG_DEBUG_INFO_BTF"),
        (NotFound, _) => {
            Error::refused("a kernel without bpf_sk_assign_tcp_reqsk", "needs Linux 6.9 (CONFIG_SYN_COOKIES)")
        }
        (_, "BPF_LINK_CREATE") => Error::system(step, error).advise("needs Linux 6.6 (tcx)"),
        _ => Error::system(step, error),
    }
}

/// What a connection has that a listener's new socket cannot have.
pub(super) fn in_connection(connection: &Connection) -> Result<()> {
    connection.validate()?;
    let control = &connection.control;
    let refuse = |what: &str, remedy: &str| Err(Error::refused(what.to_owned(), remedy.to_owned()));
    if !matches!(control.state, State::Established | State::CloseWait) {
        let what = format!("a connection in {}", control.state);
        return refuse(
            &what,
            "a server accepts only those that can be written to: ESTABLISHED and CLOSE_WAIT",
        );
    }
    if control.reset {
        return refuse(
            "a connection that its peer has reset",
            "its peer is gone: let the old server read of it",
        );
    }
    if connection.urgent.is_some() {
        return refuse("urgent data", "let the old server read it first");
    }
    if connection.settings.get(MD5).is_some() {
        return refuse("TCP MD5", "restore it into a program that takes descriptors");
    }
    if connection.tls.is_some() {
        return refuse(
            "kernel TLS",
            "its server would begin a handshake: restore it into a program that has the session",
        );
    }
    let min = MIN_MSS[usize::from(!connection.flow().is_ipv4())];
    if control.options.mss_clamp < min {
        let what = format!("an MSS of {}", control.options.mss_clamp);
        return refuse(
            &what,
            &format!("the kernel makes no connection with less than {min} out of a segment"),
        );
    }
    Ok(())
}

/// The inode numbers of the listeners that may get the connection: several, where they share the port.
pub(super) fn listeners(diag: &mut Diag, flow: Flow) -> Result<Vec<u32>> {
    Ok(find(diag, flow)?.into_iter().map(|listener| listener.inode).collect())
}

/// The listeners that match best.
fn find(diag: &mut Diag, flow: Flow) -> Result<Vec<Listener>> {
    let local = flow.on_the_wire().local;
    let (mut best, mut found) = (0, Vec::new());
    let scope = scope(flow);
    let fits = |interface| interface == 0 || scope == 0 || interface == scope;
    diag.visit_listeners(local.port(), |socket| match rank(socket, local.ip()) {
        _ if !fits(socket.interface) => {}
        Some(rank) if rank > best => (best, found) = (rank, vec![Listener::of(socket)]),
        Some(rank) if rank == best => found.push(Listener::of(socket)),
        _ => {}
    })?;
    Ok(found)
}

/// Why no connection came into being. Returns the interface to which the listener is bound, or 0.
pub(super) fn in_listener(diag: &mut Diag, ways: &mut Ways, flow: Flow) -> Result<u32> {
    let listeners = find(diag, flow)?;
    if let Some(listener) = listeners.iter().find(|listener| listener.is_mptcp) {
        return Err(Error::refused(
            format!("the listener on {} speaks MPTCP", listener.local),
            "open it with IPPROTO_TCP (Go: GODEBUG=multipathtcp=0)",
        ));
    }
    // Which one of several the kernel chooses is not known, but in the rest they are alike.
    let Some(listener) = listeners.into_iter().next() else { return Err(no_listener(flow)) };
    if listener.interface != 0 && scope(flow) == 0 {
        let peer = flow.on_the_wire().remote.ip();
        let way = ways.interface_to(peer).map_err(|error| Error::system("RTM_GETROUTE", error))?;
        if way != listener.interface {
            return Err(Error::refused(
                format!(
                    "the listener on {} is bound to a device that does not lead to {peer}",
                    listener.local
                ),
                "let it listen on the device by which the packets of the peer arrive, or without SO_BINDTODEVICE",
            ));
        }
    }
    if listener.waiting > listener.backlog {
        return Err(Error::refused(
            format!("the accept queue of {} is full: {} connections", listener.local, listener.waiting),
            "let the server accept them, or raise its backlog and net.core.somaxconn",
        ));
    }
    Ok(listener.interface)
}

/// The interface of link-local addresses, or 0.
pub(super) fn scope(flow: Flow) -> u32 {
    match flow.local {
        SocketAddr::V6(local) => local.scope_id(),
        SocketAddr::V4(_) => 0,
    }
}

pub(super) fn no_listener(flow: Flow) -> Error {
    Error::refused(
        format!("nobody listens on {}", flow.local),
        "start the server in this network namespace, on that address and port, before the connections arrive",
    )
}

struct Listener {
    local: SocketAddr,
    interface: u32,
    waiting: u32,
    backlog: u32,
    inode: u32,
    is_mptcp: bool,
}

impl Listener {
    fn of(socket: &Socket<'_>) -> Self {
        Self {
            local: socket.local,
            interface: socket.interface,
            waiting: socket.receive_queue,
            backlog: socket.send_queue,
            inode: socket.inode,
            is_mptcp: socket.is_mptcp(),
        }
    }
}

/// How well a listener matches: the kernel prefers the one that names the address, then the one of the family.
fn rank(socket: &Socket<'_>, wanted: IpAddr) -> Option<u8> {
    let address = socket.local.ip();
    match address {
        _ if address.to_canonical() == wanted => Some(3),
        _ if address.is_unspecified() && address.is_ipv4() == wanted.is_ipv4() => Some(2),
        IpAddr::V6(_) if address.is_unspecified() && !socket.is_v6_only() => Some(1),
        _ => None,
    }
}

/// The sysctls of the listener's network namespace that decide.
#[derive(Debug)]
pub(super) struct Sysctls {
    cookies: File,
    scaling: File,
    sack: File,
    timestamps: File,
    ecn: File,
}

impl Sysctls {
    /// Those of the calling thread's namespace: an open file stays with it.
    pub(super) fn open() -> Result<Self> {
        let open = |name: &'static str| {
            let path = format!("/proc/sys/net/ipv4/{name}");
            File::open(&path).map_err(|error| Error::system(path, error))
        };
        Ok(Self {
            cookies: open("tcp_syncookies")?,
            scaling: open("tcp_window_scaling")?,
            sack: open("tcp_sack")?,
            timestamps: open("tcp_timestamps")?,
            ecn: open("tcp_ecn")?,
        })
    }

    /// The kernel would not refuse it, but forget ECN.
    pub(super) fn check_ecn(&self, connection: &Connection) -> Result<()> {
        match connection.control.options.ecn {
            true => insist(&self.ecn, "tcp_ecn", "a connection with ECN"),
            false => Ok(()),
        }
    }

    /// The kernel would not refuse it, but reset the peer.
    pub(super) fn check_cookies(&self) -> Result<()> {
        insist(&self.cookies, "tcp_syncookies", "a kernel that takes no SYN cookies")
    }

    /// What was negotiated must be allowed here.
    pub(super) fn check(&self, connection: &Connection) -> Result<()> {
        let options = &connection.control.options;
        self.check_cookies()?;
        self.check_ecn(connection)?;
        if options.window_scale.is_some() {
            insist(&self.scaling, "tcp_window_scaling", "a connection with window scaling")?;
        }
        if options.sack {
            insist(&self.sack, "tcp_sack", "a connection with SACK")?;
        }
        if options.timestamps.is_some() {
            insist(&self.timestamps, "tcp_timestamps", "a connection with timestamps")?;
        }
        Ok(())
    }
}

/// Refuses where a sysctl is 0.
fn insist(file: &File, name: &str, what: &'static str) -> Result<()> {
    let mut text = [0; 16];
    let length = file.read_at(&mut text, 0).map_err(|error| Error::system(name.to_owned(), error))?;
    match text[..length].trim_ascii() {
        b"0" => Err(Error::refused(what, format!("set it: sysctl -w net.ipv4.{name}=1"))),
        _ => Ok(()),
    }
}
