//! `soccr lock` and `soccr unlock`: connections kept silent on this host, beyond the life of the command.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value as Json, json};
use soccr::connection::Flow;
use soccr::lock::PersistentLock;

use crate::command::list::duration;
use crate::command::{completions, restore};
use crate::exit::{self, Exit};
use crate::network;
use crate::show::table::{Align, Table};

/// Keep connections silent on this host: their packets are dropped, in both directions
///
/// The lock stays when the command has ended, until its time is over or `soccr unlock` removes it. It is a table of its own
/// (nft list table inet soccr-persistent-NAME); other rules are not touched. `soccr restore` and `soccr receive` leave a lock with a
/// name alone, and report that it still locks the connection. A lock without a name ends when the connection is restored: after a
/// reboot it keeps a host silent about the connections of an image until `soccr restore` has brought them back.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr lock --name move 192.0.2.1:443-198.51.100.7:41234
  soccr lock --image /var/lib/soccr/all.soccr    before the network comes up
  soccr lock --list")]
pub(crate) struct Lock {
    /// The name by which it is removed
    #[arg(long, required_unless_present_any = ["list", "image"])]
    name: Option<String>,
    /// The connections of this image too
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// After how many seconds the lock ends by itself
    #[arg(long, value_name = "SECONDS", default_value_t = soccr::lock::SILENCE.as_secs(),
        value_parser = clap::value_parser!(u64).range(1..=86400))]
    seconds: u64,
    /// The locks that are there
    #[arg(long, conflicts_with_all = ["name", "connections", "image", "seconds"])]
    list: bool,
    /// One JSON array, an object for each lock
    #[arg(long, requires = "list", conflicts_with_all = ["name", "connections", "image", "seconds"])]
    json: bool,
    /// The network namespace: a path, a name of ip-netns(8), or the number of a process
    #[arg(long, value_name = "PATH|NAME|PID", add = completions::namespaces())]
    netns: Option<String>,
    /// Both ends of a connection, ours first
    #[arg(value_name = "LOCAL-REMOTE", value_parser = parse_flow, required_unless_present_any = ["list", "image"])]
    connections: Vec<Flow>,
}

/// Remove locks that were left by `soccr lock`, and by connections that have left this host
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr unlock move
  soccr unlock --all")]
pub(crate) struct Unlock {
    /// Their names (see `soccr lock --list`)
    #[arg(value_name = "NAME", required_unless_present = "all", add = completions::locks())]
    names: Vec<String>,
    /// All of them
    #[arg(long, conflicts_with = "names")]
    all: bool,
    /// The network namespace: a path, a name of ip-netns(8), or the number of a process
    #[arg(long, value_name = "PATH|NAME|PID", add = completions::namespaces())]
    netns: Option<String>,
}

/// `192.0.2.1:443-198.51.100.7:41234`, without IPv6 zones: packets do not carry them.
pub(crate) fn parse_flow(text: &str) -> Result<Flow, String> {
    let wrong = || "two addresses with ports and a hyphen between them: IP:PORT-IP:PORT".to_owned();
    let (local, remote) = text.split_once('-').ok_or_else(wrong)?;
    let end = |text: &str| text.parse::<SocketAddr>().map_err(|_| wrong());
    let flow = Flow { local: end(local)?, remote: end(remote)? };
    let is_v4 = |ip: IpAddr| ip.to_canonical().is_ipv4();
    match is_v4(flow.local.ip()) == is_v4(flow.remote.ip()) {
        true => Ok(flow),
        false => Err("both addresses must be of one family".into()),
    }
}

impl Lock {
    pub(crate) fn run(&self) -> Result<Exit> {
        // What a killed `soccr save` has left is compared with this network.
        network::enter(self.netns.as_deref())?;
        let mut flows = self.connections.clone();
        if let Some(image) = &self.image {
            let (_, saved) = restore::image::read(Some(image))?;
            flows.extend(saved.iter().flat_map(|(_, connection)| connection.flows()));
        }
        if !self.list {
            let name = self.name.clone().unwrap_or_else(soccr_handover::silence::name);
            PersistentLock::create(&name, &flows, Some(Duration::from_secs(self.seconds)))?;
            return Ok(Exit::Done);
        }
        let mut locks = Vec::new();
        for lock in PersistentLock::list()? {
            match lock.contents() {
                // Somebody has removed it meanwhile.
                Err(error) if error.errno() == Some(libc::ENOENT) => {}
                // The time of a lock without connections is over.
                Ok(contents) if contents.is_empty() => {}
                contents => locks.push((lock.name, contents?)),
            }
        }
        if self.json { print_json(&locks) } else { print_table(&locks) }
    }
}

impl Unlock {
    pub(crate) fn run(&self) -> Result<Exit> {
        network::enter(self.netns.as_deref())?;
        let locks = PersistentLock::list()?;
        if let Some(name) = self.names.iter().find(|name| !locks.iter().any(|lock| lock.name == **name)) {
            bail!("there is no lock {name}");
        }
        for lock in locks.iter().filter(|lock| self.all || self.names.contains(&lock.name)) {
            match lock.remove() {
                // Somebody else has removed it meanwhile.
                Err(error) if error.errno() == Some(libc::ENOENT) => {}
                removed => removed?,
            }
        }
        Ok(Exit::Done)
    }
}

/// The name of a lock, its connections, and for how much longer it locks each.
type Listed = (String, Vec<(Flow, Option<Duration>)>);

fn print_json(locks: &[Listed]) -> Result<Exit> {
    let millis = |left: Duration| left.as_millis() as u64;
    let object = |(name, contents): &Listed| {
        let one = |(flow, left): &(Flow, Option<Duration>)| json!({ "local": flow.local, "remote": flow.remote, "remaining_ms": left.map(millis) });
        // One without a limit outlasts all others.
        let all: Option<Vec<Duration>> = contents.iter().map(|(_, left)| *left).collect();
        json!({
            "name": name,
            "remaining_ms": all.and_then(|all| all.into_iter().max()).map(millis),
            "connections": contents.iter().map(one).collect::<Vec<Json>>(),
        })
    };
    let objects: Vec<Json> = locks.iter().map(object).collect();
    exit::print(&format!("{}\n", serde_json::to_string_pretty(&objects).context("JSON")?))
}

fn print_table(locks: &[Listed]) -> Result<Exit> {
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("ENDS IN", Align::Right),
        ("LOCAL", Align::Left),
        ("REMOTE", Align::Left),
    ]);
    for (name, contents) in locks {
        for (flow, left) in contents {
            let left = left.map_or("never".into(), duration);
            table.row([name.clone(), left, flow.local.to_string(), flow.remote.to_string()]);
        }
    }
    exit::written(table.print())
}
