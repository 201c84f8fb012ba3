//! `soccr list`: every TCP socket, whose it is, and whether it can be saved.

use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::Result;
use rustix::process::Pid;
use serde::Serialize;
use soccr::Paused;
use soccr::connection::State;
use soccr::diag::{Diag, Socket};

use crate::exit::Exit;
use crate::process::{self, Holder, Process, parse_pid};
use crate::table::{Align, Table, printable};
use crate::{exit, network};

/// List TCP sockets, and say which can be saved
///
/// All states, including those that belong to no process any longer. SAVE says "yes", or why not; "paused" is a socket that
/// somebody has left in repair mode.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr list --pid 4711
  soccr list --port 443 --json | jq '.[] | select(.savable) | .remote'
  soccr list --netns /run/netns/blue")]
pub(crate) struct List {
    /// Only sockets of this process, in its network namespace
    #[arg(long, value_name = "PID", value_parser = parse_pid)]
    pid: Option<Pid>,
    /// Only sockets with this port at either end
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// The network namespace to look into: a path, or the number of a process
    #[arg(long, value_name = "PATH|PID")]
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
    path: Option<Path>,
    uid: u32,
    inode: u32,
    processes: Vec<Owner>,
    savable: bool,
    why_not: Option<&'static str>,
}

#[derive(Debug, Serialize)]
struct Owner {
    pid: i32,
    name: String,
    fd: i32,
}

/// From `struct tcp_info`.
#[derive(Debug, Serialize)]
struct Path {
    rtt_us: u32,
    cwnd: u32,
    mss: u32,
}

impl List {
    pub(crate) fn run(&self) -> Result<Exit> {
        let processes = match self.pid {
            Some(pid) => vec![pid],
            None => process::all()?,
        };
        let holders = process::holders(&processes);
        let netns = self.netns.clone().or(self.pid.map(|pid| pid.to_string()));
        network::enter(netns.as_deref())?;
        let mut rows = Vec::new();
        let mut names = HashMap::new();
        Diag::open()?.visit(|socket| {
            let held = holders.get(&socket.inode.into()).map(Vec::as_slice).unwrap_or_default();
            if (self.pid.is_none() || !held.is_empty()) && self.port.is_none_or(|port| has_port(socket, port))
            {
                rows.push(Row::new(socket, held, &mut names));
            }
        })?;
        exit::written(if self.json { print_json(&rows) } else { print_table(&rows) })
    }
}

fn has_port(socket: &Socket<'_>, port: u16) -> bool {
    socket.local.port() == port || socket.remote.port() == port
}

impl Row {
    fn new(socket: &Socket<'_>, held: &[Holder], names: &mut HashMap<i32, String>) -> Self {
        let why_not = why_not(socket, held);
        let mut name = |pid: Pid| names.entry(pid.as_raw_pid()).or_insert_with(|| process::name(pid)).clone();
        Self {
            local: socket.local,
            remote: Some(socket.remote).filter(|remote| remote.port() != 0),
            state: socket.state.name(),
            receive_queue: socket.receive_queue,
            send_queue: socket.send_queue,
            path: Path::read(socket.tcp_info()).filter(|_| socket.state != State::Listen),
            uid: socket.uid,
            inode: socket.inode,
            processes: held
                .iter()
                .map(|holder| Owner { pid: holder.pid.as_raw_pid(), name: name(holder.pid), fd: holder.fd })
                .collect(),
            savable: why_not.is_none(),
            why_not,
        }
    }
}

/// Why a socket cannot be saved, as far as that can be told without touching it.
fn why_not(socket: &Socket<'_>, held: &[Holder]) -> Option<&'static str> {
    match socket.state {
        State::Listen => Some("listener: no connection"),
        State::SynReceived => Some("handshake: not accepted yet"),
        State::TimeWait => Some("closed: belongs to no process"),
        State::Close => Some("not connected"),
        _ if socket.is_mptcp() => Some("MPTCP: the kernel cannot repair it"),
        _ if socket.inode == 0 => Some("orphan: its process has closed it, or not accepted it yet"),
        _ if held.is_empty() => Some("its process is not visible: run as root"),
        _ if is_paused(held[0]) => Some("paused: soccr resume"),
        _ => None,
    }
}

/// In repair mode, as far as this process may look: nothing else tells it.
fn is_paused(holder: Holder) -> bool {
    let socket = Process::open(holder.pid).and_then(|process| process.descriptor(holder.fd));
    socket.is_ok_and(|socket| Paused::take_over(socket.as_fd()).map(Paused::release).is_ok())
}

impl Path {
    /// Offsets of `linux/tcp.h`.
    fn read(info: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_ne_bytes(info.get(at..at + 4)?.try_into().ok()?));
        Some(Self { rtt_us: word(68)?, cwnd: word(80)?, mss: word(16)? })
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
        ("RTT", Right),
        ("CWND", Right),
        ("MSS", Right),
        ("SAVE", Left),
    ]);
    for row in rows {
        let owner = row.processes.first();
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        let path = row.path.as_ref();
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
            or_dash(path.map(|path| duration(Duration::from_micros(path.rtt_us.into())))),
            or_dash(path.map(|path| path.cwnd.to_string())),
            or_dash(path.map(|path| path.mss.to_string())),
            row.why_not.unwrap_or("yes").into(),
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
