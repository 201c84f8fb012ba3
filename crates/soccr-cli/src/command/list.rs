//! `soccr list`: every TCP socket, whose it is, and whether it can be saved.

mod filter;
mod order;
mod row;
mod show;

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketType};
use rustix::process::Pid;
use soccr::Flow;
use soccr::connection::State;
use soccr::diag::Diag;
use soccr_handover::foreign::process;

use crate::command::completions;
use crate::exit::Exit;
use crate::nat::Nat;
use crate::pid::parse_pid;
use crate::traffic::Traffic;
use crate::{exit, network};

use filter::Filter;
use order::Order;
use row::{Owner, Row};

pub(crate) use show::duration;

/// List TCP sockets, and say which can be saved
///
/// All states, and also the sockets that belong to no process any longer. IDLE is the time since data were sent or received, RETR how many
/// segments were sent again, TIMER what the kernel does next and when (as in ss(8): on, keepalive,
/// timewait, persist), CC the congestion control. SAVE says "yes", or why not, and
/// what NAT makes of its addresses; "paused" is a socket that somebody has left in
/// repair mode. A narrow terminal gets fewer columns, then the addresses below each row.
/// --json shows more.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr list --pid 4711
  soccr list --port 443 --state established --idle 60
  soccr list --name nginx --sort recv-q --watch
  soccr list --port 443 --json | jq '.[] | select(.savable) | .remote'
  soccr list --netns /run/netns/blue")]
pub(crate) struct List {
    /// Only sockets of this process, in its network namespace
    #[arg(long, value_name = "PID", value_parser = parse_pid, add = completions::processes())]
    pid: Option<Pid>,
    #[command(flatten)]
    filter: Filter,
    /// The network namespace to look into: a path, a name of ip-netns(8), or the number of a process
    #[arg(long, value_name = "PATH|NAME|PID", add = completions::namespaces())]
    netns: Option<String>,
    /// What comes first: for numbers the largest
    #[arg(long, value_name = "COLUMN")]
    sort: Option<Order>,
    /// Show the list again every SECONDS, until it is interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", conflicts_with = "json",
        value_parser = clap::value_parser!(u32).range(1..))]
    watch: Option<u32>,
    /// One JSON array, an object for each socket
    #[arg(long)]
    json: bool,
}

impl List {
    pub(crate) fn run(&self) -> Result<Exit> {
        let netns = self.netns.clone().or(self.pid.map(|pid| pid.to_string()));
        if let Some(pid) = self.pid {
            process::look_into(pid)?;
        }
        let mut nat = Nat::around(|| network::enter(netns.as_deref()))?;
        let Some(seconds) = self.watch else {
            let rows = self.rows(&mut nat)?;
            nat.complain();
            return exit::written(if self.json { show::json(&rows) } else { show::table(&rows) });
        };
        loop {
            let rows = self.rows(&mut nat)?;
            if let Err(error) = clear().and_then(|()| show::table(&rows)) {
                return exit::written(Err(error));
            }
            nat.complain();
            std::thread::sleep(Duration::from_secs(seconds.into()));
        }
    }

    fn rows(&self, nat: &mut Nat) -> Result<Vec<Row>> {
        let processes = self.pid.map_or_else(process::all, |pid| Ok(vec![pid]))?;
        let holders = process::holders(&processes)?;
        let may_pause = may_pause()?;
        let mut rows = Vec::new();
        let mut programs = HashMap::new();
        Diag::open()?.visit(|socket| {
            let held = holders.get(&socket.inode.into()).map(Vec::as_slice).unwrap_or_default();
            let traffic = Traffic::read(socket.tcp_info()).filter(|_| socket.state != State::Listen);
            let owned = self.pid.is_none() || !held.is_empty();
            if owned && self.filter.wants(socket, traffic.as_ref()) {
                let processes: Vec<Owner> =
                    held.iter().map(|holder| Owner::of(holder, &mut programs)).collect();
                if self.filter.wants_one_of(&processes) {
                    let why_not = row::why_not(socket, held, may_pause);
                    let flow = Flow { local: socket.local, remote: socket.remote };
                    let nat = why_not.is_none().then(|| nat.of(flow)).flatten();
                    rows.push(Row { nat, ..Row::new(socket, traffic, processes, why_not) });
                }
            }
        })?;
        if let Some(order) = self.sort {
            order.sort(&mut rows);
        }
        Ok(rows)
    }
}

/// Begins a new screen, or a new paragraph where there is none.
fn clear() -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(if out.is_terminal() { b"\x1b[H\x1b[2J" } else { b"\n" })
}

/// Whether this process may pause sockets of this network at all.
fn may_pause() -> Result<bool> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).context("socket")?;
    Ok(soccr::pause(&socket).is_ok())
}
