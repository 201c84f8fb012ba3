//! `soccr list`: every TCP socket, whose it is, and whether it can be saved.

mod filter;

use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use rustix::process::Pid;
use serde::Serialize;
use soccr::connection::State;
use soccr::diag::{Diag, Socket};
use soccr::{Flow, Paused};

use crate::exit::Exit;
use crate::nat::{Nat, Translated};
use crate::process::{self, Holder, Process, parse_pid};
use crate::table::{Align, Table, printable};
use crate::traffic::Traffic;
use crate::{exit, network};

use filter::Filter;

/// List TCP sockets, and say which can be saved
///
/// All states, including those that belong to no process any longer. IDLE is the time since data were sent or received, RETR how many
/// segments were sent again, CC the congestion control. SAVE says "yes", or why not, and
/// what NAT makes of its addresses; "paused" is a socket that somebody has left in
/// repair mode. --json shows more.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr list --pid 4711
  soccr list --port 443 --state established --idle 60
  soccr list --port 443 --json | jq '.[] | select(.savable) | .remote'
  soccr list --netns /run/netns/blue")]
pub(crate) struct List {
    /// Only sockets of this process, in its network namespace
    #[arg(long, value_name = "PID", value_parser = parse_pid)]
    pid: Option<Pid>,
    #[command(flatten)]
    filter: Filter,
    /// The network namespace to look into: a path, a name of ip-netns(8), or the number of a process
    #[arg(long, value_name = "PATH|NAME|PID")]
    netns: Option<String>,
    /// One JSON array, an object for each socket
    #[arg(long)]
    json: bool,
}

/// A socket, as `--json` shows it.
#[derive(Debug, Serialize)]
struct Row {
    local: SocketAddr,
    /// None for a listener.
    remote: Option<SocketAddr>,
    state: &'static str,
    /// Bytes; for a listener connections.
    receive_queue: u32,
    send_queue: u32,
    #[serde(flatten)]
    traffic: Option<Traffic>,
    congestion_control: Option<String>,
    uid: u32,
    inode: u32,
    processes: Vec<Owner>,
    savable: bool,
    why_not: Option<&'static str>,
    /// A connection that can be saved, but is known by other addresses outside.
    nat: Option<Translated>,
}

#[derive(Debug, Serialize)]
struct Owner {
    pid: i32,
    name: String,
    fd: i32,
}

impl List {
    pub(crate) fn run(&self) -> Result<Exit> {
        let processes = match self.pid {
            Some(pid) => {
                process::look_into(pid)?;
                vec![pid]
            }
            None => process::all()?,
        };
        let holders = process::holders(&processes);
        let netns = self.netns.clone().or(self.pid.map(|pid| pid.to_string()));
        let mut nat = Nat::around(|| network::enter(netns.as_deref()))?;
        let mut rows = Vec::new();
        let mut names = HashMap::new();
        let may_pause = may_pause()?;
        Diag::open()?.visit(|socket| {
            let held = holders.get(&socket.inode.into()).map(Vec::as_slice).unwrap_or_default();
            let traffic = Traffic::read(socket.tcp_info()).filter(|_| socket.state != State::Listen);
            if (self.pid.is_none() || !held.is_empty()) && self.filter.wants(socket, traffic.as_ref()) {
                let why_not = why_not(socket, held, may_pause);
                let flow = Flow { local: socket.local, remote: socket.remote };
                let nat = why_not.is_none().then(|| nat.of(flow)).flatten();
                rows.push(Row { nat, ..Row::new(socket, traffic, held, why_not, &mut names) });
            }
        })?;
        exit::written(if self.json { print_json(&rows) } else { print_table(&rows) })
    }
}

/// Whether this process may pause sockets of this network at all.
fn may_pause() -> Result<bool> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).context("socket")?;
    Ok(soccr::pause(&socket).is_ok())
}

/// As it is on the wire: an IPv6 socket of an IPv4 connection has its addresses in another form.
fn on_the_wire(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        IpAddr::V6(_) => address,
    }
}

impl Row {
    fn new(
        socket: &Socket<'_>,
        traffic: Option<Traffic>,
        held: &[Holder],
        why_not: Option<&'static str>,
        names: &mut HashMap<i32, String>,
    ) -> Self {
        let mut name = |pid: Pid| names.entry(pid.as_raw_pid()).or_insert_with(|| process::name(pid)).clone();
        Self {
            local: on_the_wire(socket.local),
            remote: Some(on_the_wire(socket.remote)).filter(|remote| remote.port() != 0),
            state: socket.state.name(),
            receive_queue: socket.receive_queue,
            send_queue: socket.send_queue,
            congestion_control: socket.congestion_control().filter(|_| traffic.is_some()).map(str::to_owned),
            traffic,
            uid: socket.uid,
            inode: socket.inode,
            processes: held
                .iter()
                .map(|holder| Owner { pid: holder.pid.as_raw_pid(), name: name(holder.pid), fd: holder.fd })
                .collect(),
            savable: why_not.is_none(),
            why_not,
            nat: None,
        }
    }
}

/// Why a socket cannot be saved, as far as that can be told without touching it.
fn why_not(socket: &Socket<'_>, held: &[Holder], may_pause: bool) -> Option<&'static str> {
    match socket.state {
        State::Listen => Some("listener: no connection"),
        State::SynReceived => Some("handshake: not accepted yet"),
        State::TimeWait => Some("closed: belongs to no process"),
        State::Close => Some("not connected"),
        _ if socket.is_mptcp() => Some("MPTCP: the kernel cannot repair it"),
        _ if socket.upper_layer() == Some("tls") => Some("kTLS: the kernel does not give its keys away"),
        _ if socket.upper_layer().is_some() => Some("the kernel speaks a protocol over it"),
        _ if socket.inode == 0 => Some("orphan: its process has closed it, or not accepted it yet"),
        _ if held.is_empty() => Some("its process is not visible: run as root"),
        _ if !may_pause => Some("needs CAP_NET_ADMIN: run as root"),
        _ => look(held[0]),
    }
}

/// What only the descriptor tells: whether it can be had, and whether it is in repair mode.
fn look(holder: Holder) -> Option<&'static str> {
    match Process::open(holder.pid).ok()?.duplicate(holder.fd) {
        Ok(socket) => {
            let paused = Paused::take_over(socket.as_fd()).map(Paused::release).is_ok();
            paused.then_some("paused: soccr resume")
        }
        Err(Errno::PERM) => Some("needs CAP_SYS_PTRACE over its process: run as root"),
        // It has ended, or closed it, a moment ago.
        Err(_) => None,
    }
}

fn print_json(rows: &[Row]) -> std::io::Result<()> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    out.write_all(b"[")?;
    for (i, row) in rows.iter().enumerate() {
        out.write_all(if i == 0 { b"\n" } else { b",\n" })?;
        serde_json::to_writer(&mut out, row)?;
    }
    out.write_all(b"\n]\n")?;
    out.flush()
}

fn print_table(rows: &[Row]) -> std::io::Result<()> {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("PID", Right),
        ("FD", Right),
        ("PROCESS", Left),
        ("STATE", Left),
        ("LOCAL", Left),
        ("REMOTE", Left),
        ("RECV-Q", Right),
        ("SEND-Q", Right),
        ("IDLE", Right),
        ("RTT", Right),
        ("CWND", Right),
        ("RETR", Right),
        ("CC", Left),
        ("SAVE", Left),
    ]);
    for row in rows {
        let owner = row.processes.first();
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        let traffic = row.traffic.as_ref();
        let others = match row.processes.len() {
            0 | 1 => String::new(),
            count => format!(" +{}", count - 1),
        };
        table.row([
            or_dash(owner.map(|owner| owner.pid.to_string())),
            or_dash(owner.map(|owner| owner.fd.to_string())),
            or_dash(owner.map(|owner| printable(&owner.name) + &others)),
            row.state.into(),
            row.local.to_string(),
            row.remote.map_or("*".into(), |remote| remote.to_string()),
            row.receive_queue.to_string(),
            row.send_queue.to_string(),
            or_dash(traffic.map(|traffic| rough(traffic.idle()))),
            or_dash(traffic.map(|traffic| duration(traffic.rtt()))),
            or_dash(traffic.map(|traffic| traffic.cwnd().to_string())),
            or_dash(traffic.map(|traffic| traffic.retransmissions().to_string())),
            or_dash(row.congestion_control.clone()),
            match (row.why_not, row.nat) {
                (Some(reason), _) => reason.into(),
                (None, Some(nat)) => format!("yes, but {nat}"),
                (None, None) => "yes".into(),
            },
        ]);
    }
    table.print()
}

/// `87µs`, `1.2ms`, `20ms`, `1.5s`.
pub(crate) fn duration(duration: Duration) -> String {
    let micros = duration.as_micros();
    match micros {
        0..1000 => format!("{micros}µs"),
        1000..10_000 => format!("{:.1}ms", micros as f64 / 1e3),
        10_000..1_000_000 => format!("{}ms", micros / 1000),
        _ => format!("{:.1}s", micros as f64 / 1e6),
    }
}

/// `0s`, `59s`, `5m`, `36h`, `20d`.
fn rough(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m", seconds / 60),
        seconds @ 3600..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86400),
    }
}
