//! `soccr steer`: packets that follow connections to another host, and addresses of other hosts that are delivered here.

use std::collections::{HashMap, HashSet, hash_map};
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use serde_json::json;
use soccr::Flow;
use soccr::steer::{self, Foreign, NextHop, Steered, Steering, Tunnel};

use crate::command::completions;
use crate::command::list::duration;
use crate::command::lock::parse_flow;
use crate::exit::{self, Exit};
use crate::guide::{Hop, parse_hop, redirect};
use crate::network;
use crate::show::table::{Align, Table};

/// See and change where the packets of connections go that have left this host
///
/// What `soccr send --steer` and `soccr receive` arrange stays until it is removed, or until its connection has ended; no program
/// has to run. Here it can be seen (--list), sent on to another host (--to), and removed.
#[derive(clap::Args, Debug)]
#[command(
    group = clap::ArgGroup::new("what").required(true).args(["list", "to", "remove", "adopt_address"]),
    group = clap::ArgGroup::new("which").args(["all", "connections"]),
    after_help = "\
Examples:
  soccr steer --list
  soccr steer --to 192.0.2.3 192.0.2.1:443-198.51.100.7:41234
  soccr steer --remove 192.0.2.1:443-198.51.100.7:41234
  soccr steer --remove --all                     on the old host and on the new one
  soccr steer --adopt-address 192.0.2.1/24 --device eth0   on the new host, when the old one is gone for good"
)]
pub(crate) struct Steer {
    /// The connections that are steered, and the addresses whose packets are delivered here
    #[arg(long)]
    list: bool,
    /// One JSON object
    #[arg(long, requires = "list", conflicts_with_all = ["to", "remove", "adopt_address"])]
    json: bool,
    /// Steer connections to this address on a common network from now on, or to ADDRESS dev DEVICE, or through the tunnel
    /// vxlan:ADDRESS that is there already
    #[arg(long, value_name = "NEXT_HOP", value_parser = parse_hop, requires = "connections")]
    to: Option<Hop>,
    /// Do not steer the connections any more
    #[arg(long, requires = "which")]
    remove: bool,
    /// With --remove: all connections, the delivery of all addresses, and all tunnels
    #[arg(long, requires = "remove", conflicts_with_all = ["list", "to", "adopt_address"])]
    all: bool,
    /// Give this host an address for which packets are delivered here, tell the network, and end the delivery
    #[arg(long, value_name = "ADDRESS/PREFIX", value_parser = parse_network, requires = "device")]
    adopt_address: Option<(IpAddr, u8)>,
    /// The device that gets the address
    #[arg(long, value_name = "DEVICE", requires = "adopt_address", conflicts_with_all = ["list", "to", "remove"])]
    device: Option<String>,
    /// The network namespace: a path, a name of ip-netns(8), or the number of a process
    #[arg(long, value_name = "PATH|NAME|PID", add = completions::namespaces())]
    netns: Option<String>,
    /// Both ends of a connection, the one on this host first
    #[arg(value_name = "LOCAL-REMOTE", value_parser = parse_flow, conflicts_with_all = ["list", "adopt_address"])]
    connections: Vec<Flow>,
}

fn parse_network(text: &str) -> Result<(IpAddr, u8), String> {
    let wrong = || "an address and the length of its network's prefix: 192.0.2.1/24".to_owned();
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let prefix = prefix.parse().map_err(|_| wrong())?;
    if prefix > if address.is_ipv4() { 32 } else { 128 } { Err(wrong()) } else { Ok((address, prefix)) }
}

impl Steer {
    pub(crate) fn run(&self) -> Result<Exit> {
        network::enter(self.netns.as_deref())?;
        if let Some(hop) = &self.to {
            redirect(hop, &self.connections)?;
        } else if let (Some((address, prefix)), Some(device)) = (self.adopt_address, &self.device) {
            steer::adopt_address(address, prefix, device)?;
        } else if self.remove {
            return self.remove();
        } else {
            let all = contents()?;
            let foreign = Foreign::list()?;
            return if self.json { print_json(&all, &foreign) } else { print_tables(&all, &foreign) };
        }
        Ok(Exit::Done)
    }

    fn remove(&self) -> Result<Exit> {
        if self.all {
            return remove_all();
        }
        let distinct: HashSet<Flow> = self.connections.iter().map(Flow::on_the_wire).collect();
        match (distinct.len(), steer::stop(&self.connections)?) {
            (count, 0) => bail!("{count} of them are not steered"),
            (count, stopped) if stopped < count => {
                exit::complain(&format!("{} of them are not steered", count - stopped));
                Ok(Exit::SomeFailed)
            }
            _ => Ok(Exit::Done),
        }
    }
}

/// Removes as much as can be.
fn remove_all() -> Result<Exit> {
    let (steered, foreign, tunnels) = (Steering::list()?, Foreign::list()?, Tunnel::list()?);
    let outcomes = steered.iter().map(Steering::remove).chain(foreign.iter().map(Foreign::remove));
    let mut exit = Exit::Done;
    for error in outcomes.chain(tunnels.iter().map(Tunnel::remove)).filter_map(Result::err) {
        exit::complain(&error.to_string());
        exit = Exit::SomeFailed;
    }
    Ok(exit)
}

/// A steered connection.
struct Entry {
    steered: Steered,
    /// Through which it goes to its next hop.
    device: String,
    /// Whether the next hop does.
    answers: bool,
}

/// Whether these are answers that another host sends back through this one: their local address is not this host's.
fn are_answers(flow: &Flow, foreign: &[Foreign]) -> Result<bool> {
    let local = flow.local.ip();
    Ok(foreign.iter().all(|foreign| foreign.address() != local) && steer::is_foreign(local)?)
}

/// One entry for each connection, by whichever device its packets arrive.
fn contents() -> Result<Vec<Entry>> {
    let mut all: Vec<Entry> = Vec::new();
    let mut known: HashMap<_, usize> = HashMap::new();
    let mut hops = HashMap::new();
    for steering in Steering::list()? {
        let device = steering.egress();
        for steered in steering.contents()? {
            match known.entry((steered.flow, steered.next_hop, device.to_owned())) {
                hash_map::Entry::Occupied(known) => add(&mut all[*known.get()].steered, &steered),
                hash_map::Entry::Vacant(new) => {
                    new.insert(all.len());
                    let hop = NextHop::known(steered.next_hop, device);
                    let answers = *hops
                        .entry((steered.next_hop, device.to_owned()))
                        .or_insert_with(|| hop.answers().unwrap_or(false));
                    all.push(Entry { steered, device: device.to_owned(), answers });
                }
            }
        }
    }
    Ok(all)
}

/// What has arrived by another device.
fn add(steered: &mut Steered, other: &Steered) {
    steered.packets += other.packets;
    steered.bytes += other.bytes;
    steered.idle = steered.idle.min(other.idle);
    steered.remaining = steered.remaining.max(other.remaining);
    steered.closing |= other.closing;
}

fn print_json(all: &[Entry], foreign: &[Foreign]) -> Result<Exit> {
    let mut steered = Vec::with_capacity(all.len());
    for Entry { steered: entry, device, answers } in all {
        steered.push(json!({
            "local": entry.flow.local,
            "remote": entry.flow.remote,
            "next_hop": entry.next_hop,
            "device": device,
            "answers": answers,
            "packets": entry.packets,
            "bytes": entry.bytes,
            "idle_ms": entry.idle.as_millis() as u64,
            "remaining_ms": entry.remaining.as_millis() as u64,
            "closing": entry.closing,
            "answers_back": are_answers(&entry.flow, foreign)?,
        }));
    }
    let mut delivered = Vec::with_capacity(foreign.len());
    for foreign in foreign {
        let numbers = foreign.numbers();
        delivered.push(json!({
            "address": foreign.address(),
            "complete": foreign.is_complete()?,
            "mark": numbers.mark,
            "table": numbers.table,
            "priority": numbers.priority,
            "answers_table": numbers.answers,
        }));
    }
    let object = json!({ "steered": steered, "delivered": delivered });
    exit::print(&format!("{}\n", serde_json::to_string_pretty(&object).context("JSON")?))
}

fn print_tables(all: &[Entry], foreign: &[Foreign]) -> Result<Exit> {
    let mut table = Table::new([
        ("LOCAL", Align::Left),
        ("REMOTE", Align::Left),
        ("NEXT HOP", Align::Left),
        ("PACKETS", Align::Right),
        ("BYTES", Align::Right),
        ("LAST SEEN", Align::Right),
        ("STATE", Align::Left),
    ]);
    for Entry { steered: entry, device, answers } in all {
        let state = match (answers, entry.closing) {
            (false, _) => "FAILED: it does not answer",
            (true, true) => "closing",
            (true, false) if are_answers(&entry.flow, foreign)? => "answers",
            (true, false) => "steered",
        };
        table.row([
            entry.flow.local.to_string(),
            entry.flow.remote.to_string(),
            format!("{} dev {device}", entry.next_hop),
            entry.packets.to_string(),
            entry.bytes.to_string(),
            duration(entry.idle),
            state.to_owned(),
        ]);
    }
    for foreign in foreign {
        let (address, none) = (foreign.address().to_string(), String::new);
        let state = if foreign.is_complete()? { "delivered" } else { "FAILED: its nftables table is gone" };
        let row = [address, "any".into(), "this host".into(), none(), none(), none(), state.into()];
        table.row(row);
    }
    exit::written(table.print())
}
