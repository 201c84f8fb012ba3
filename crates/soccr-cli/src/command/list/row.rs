//! One socket: whose it is, what moves over it, and why it cannot be saved.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::process::Pid;
use serde::Serialize;
use soccr::Paused;
use soccr::connection::State;
use soccr::diag::Socket;

use crate::nat::Translated;
use crate::traffic::Traffic;
use soccr_handover::foreign::Process;
use soccr_handover::foreign::process::{self, Holder};

/// A socket, as `--json` shows it.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) local: SocketAddr,
    /// None for a listener.
    pub(super) remote: Option<SocketAddr>,
    pub(super) state: &'static str,
    /// Bytes; for a listener connections.
    pub(super) receive_queue: u32,
    pub(super) send_queue: u32,
    #[serde(flatten)]
    pub(super) traffic: Option<Traffic>,
    pub(super) congestion_control: Option<String>,
    pub(super) timer: Option<Timer>,
    pub(super) uid: u32,
    pub(super) inode: u32,
    pub(super) processes: Vec<Owner>,
    pub(super) savable: bool,
    pub(super) why_not: Option<Cow<'static, str>>,
    /// What the kernel encrypts and decrypts.
    pub(super) tls: Option<String>,
    /// A connection that can be saved, but is known by other addresses outside.
    pub(super) nat: Option<Translated>,
}

/// What the kernel waits for.
#[derive(Debug, Serialize)]
pub(super) struct Timer {
    pub(super) name: &'static str,
    pub(super) expires_ms: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Owner {
    pub(super) pid: i32,
    pub(super) name: String,
    pub(super) fd: i32,
    /// Its control group (version 2), which tells the unit or the container.
    pub(super) cgroup: Option<String>,
}

/// A program as people know it: its name and its control group.
#[derive(Clone, Debug)]
pub(super) struct Program {
    name: String,
    cgroup: Option<String>,
}

impl Program {
    fn of(pid: Pid) -> Self {
        let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let cgroup = groups.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned);
        Self { name: process::name(pid).unwrap_or_default(), cgroup }
    }
}

/// As it is on the wire: an IPv6 socket of an IPv4 connection has its addresses in another form.
fn on_the_wire(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        IpAddr::V6(_) => address,
    }
}

impl Owner {
    /// `programs` keeps what has been looked up.
    pub(super) fn of(holder: &Holder, programs: &mut HashMap<Pid, Program>) -> Self {
        let Program { name, cgroup } =
            programs.entry(holder.pid).or_insert_with(|| Program::of(holder.pid)).clone();
        Self { pid: holder.pid.as_raw_pid(), name, fd: holder.fd, cgroup }
    }
}

impl Row {
    pub(super) fn new(
        socket: &Socket<'_>,
        traffic: Option<Traffic>,
        processes: Vec<Owner>,
        why_not: Option<Cow<'static, str>>,
    ) -> Self {
        Self {
            local: on_the_wire(socket.local),
            remote: Some(on_the_wire(socket.remote)).filter(|remote| remote.port() != 0),
            state: socket.state.name(),
            receive_queue: socket.receive_queue,
            send_queue: socket.send_queue,
            congestion_control: socket.congestion_control().filter(|_| traffic.is_some()).map(str::to_owned),
            timer: socket
                .timer
                .map(|(timer, left)| Timer { name: timer.name(), expires_ms: left.as_millis() as u64 }),
            traffic,
            uid: socket.uid,
            inode: socket.inode,
            processes,
            savable: why_not.is_none(),
            why_not,
            tls: socket.tls().map(|tls| tls.to_string()),
            nat: None,
        }
    }
}

/// Why a socket cannot be saved, as far as that can be told without touching it.
pub(super) fn why_not(socket: &Socket<'_>, held: &[Holder], may_pause: bool) -> Option<Cow<'static, str>> {
    let tls = socket.tls().and_then(|tls| tls.refusal());
    let reason = match socket.state {
        State::Listen => Some("listener: no connection"),
        State::SynReceived => Some("handshake: not accepted yet"),
        State::TimeWait => Some("closed: belongs to no process"),
        State::Close => Some("not connected"),
        _ if socket.is_mptcp() => Some("MPTCP: the kernel cannot repair it"),
        _ if tls.is_some() => tls,
        _ if socket.upper_layer().is_some_and(|name| name != "tls") => {
            Some("the kernel speaks a protocol over it")
        }
        _ if socket.inode == 0 => Some("orphan: its process has closed it, or not accepted it yet"),
        _ if held.is_empty() => Some("its process is not visible: run as root"),
        _ if !may_pause => Some("needs CAP_NET_ADMIN: run as root"),
        _ => return look(held[0]),
    };
    reason.map(Cow::Borrowed)
}

/// What only the descriptor tells: whether we can duplicate it, whether the socket is in repair mode, and what a save would refuse.
fn look(holder: Holder) -> Option<Cow<'static, str>> {
    match Process::open(holder.pid).ok()?.duplicate(holder.fd) {
        Ok(socket) => {
            let paused = Paused::take_over(socket.as_fd()).map(Paused::leave_paused).is_ok();
            if soccr::diag::hides_unread(&socket) {
                return Some(
                    "urgent data behind unread bytes: this kernel shows it to its process alone".into(),
                );
            }
            if paused {
                return Some("paused: soccr resume".into());
            }
            let refusal = soccr::diag::refusal(&socket)?;
            Some(format!("{}: {}", refusal.what(), refusal.remedy()).into())
        }
        Err(Errno::PERM) => Some("needs CAP_SYS_PTRACE over its process: run as root".into()),
        // The process has ended, or closed the socket, a moment ago.
        Err(_) => None,
    }
}
