//! `soccr criu`: images of CRIU, read and mended.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use rustix::net::{AddressFamily, SocketType};
use serde_json::{Value as Json, json};
use soccr_image::AddressMap;
use soccr_image::criu::{Directory, Protocol, Rewritten, Socket};

use crate::command::restore::image::refuse_to_replace;
use crate::exit::{self, Exit};
use crate::mapping;
use crate::show::table::{Align, Table, printable};

/// Read and mend the images of CRIU
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  soccr criu list dump/
  soccr criu extract dump/ 13 -o c.soccr
  soccr criu rewrite dump/ --map 192.0.2.1=198.51.100.7")]
pub(crate) struct Criu {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// List the Internet sockets of a dump
    List {
        /// The directory of the images
        directory: PathBuf,
        /// One JSON array, an object for each socket
        #[arg(long)]
        json: bool,
    },
    /// Make an image of soccr from one connection of a dump
    ///
    /// It holds what CRIU has saved; `soccr inspect` shows it, `soccr restore` restores it.
    Extract {
        /// The directory of the images
        directory: PathBuf,
        /// The number of the socket (see `soccr criu list`)
        id: u32,
        /// Where to: a file that only you can read
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// Replace an image that is there
        #[arg(long)]
        force: bool,
    },
    /// Replace addresses in a dump, so that `criu restore` works where they are other ones
    ///
    /// Concerns connections, listeners and UDP sockets, and where tasks have network namespaces of their own the
    /// addresses and routes of these. Everything else in the images stays as it is, byte for byte.
    /// Addresses that the programs keep in their memory are not found.
    Rewrite {
        /// The directory of the images; the files that name the address are replaced
        directory: PathBuf,
        /// What becomes of an address: IP=IP, or IP:PORT=IP:PORT; may be repeated, the first that fits counts
        #[arg(long, value_name = "OLD=NEW", required = true)]
        map: Vec<AddressMap>,
    },
}

impl Criu {
    pub(crate) fn run(&self) -> Result<Exit> {
        match &self.action {
            Action::List { directory, json } => {
                let images = Directory::open(directory)?;
                match json {
                    true => print_json(images.sockets()),
                    false => print_table(images.sockets()),
                }
            }
            Action::Extract { directory, id, output, force } => {
                if !force {
                    refuse_to_replace(output)?;
                }
                let images = Directory::open(directory)?;
                let mut socket = images.socket(*id)?.clone();
                if let Some(interface) = &socket.interface {
                    // CRIU keeps the name of the interface; the scope of an address is its number here.
                    let any = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
                    let index = rustix::net::netdevice::name_to_index(&any, interface)
                        .with_context(|| format!("the interface {interface} of socket {id}"))?;
                    socket.set_scope(index);
                }
                soccr_image::save_file(output, &images.extract(&socket)?)?;
                Ok(Exit::Done)
            }
            Action::Rewrite { directory, map } => {
                mapping::refuse_twice(map)?;
                let rewritten = Directory::open(directory)?.rewrite(map)?;
                if rewritten.sockets + rewritten.addresses + rewritten.routes == 0 {
                    bail!("{}: no socket has such an address", directory.display());
                }
                exit::print(&describe(&rewritten))
            }
        }
    }
}

fn describe(rewritten: &Rewritten) -> String {
    let mut text = format!("{} sockets changed\n", rewritten.sockets);
    if rewritten.addresses + rewritten.routes > 0 {
        text += &format!(
            "{} addresses and {} routes of network namespaces changed\n",
            rewritten.addresses, rewritten.routes
        );
    }
    for address in &rewritten.missing {
        text += &format!("no image configures {address}: give it to an interface before the restore\n");
    }
    for gateway in &rewritten.unreachable {
        text += &format!("the gateway {gateway} is in no network there any more: map it as well\n");
    }
    text
}

fn protocol(socket: &Socket) -> String {
    match socket.protocol {
        Protocol::Tcp => "tcp".into(),
        Protocol::Udp => "udp".into(),
        Protocol::Other(number) => number.to_string(),
        _ => "?".into(),
    }
}

fn print_json(sockets: &[Socket]) -> Result<Exit> {
    let object = |socket: &Socket| {
        json!({
            "id": socket.id,
            "inode": socket.inode,
            "protocol": protocol(socket),
            "state": socket.state.name(),
            "local": socket.local,
            "remote": Some(socket.remote).filter(|remote| remote.port() != 0),
            "interface": socket.interface,
            "namespace": socket.namespace,
        })
    };
    let objects: Vec<Json> = sockets.iter().map(object).collect();
    exit::print(&format!("{}\n", serde_json::to_string_pretty(&objects).context("JSON")?))
}

fn print_table(sockets: &[Socket]) -> Result<Exit> {
    use Align::{Left, Right};
    let mut table = Table::new([
        ("ID", Right),
        ("PROTOCOL", Left),
        ("STATE", Left),
        ("LOCAL", Left),
        ("REMOTE", Left),
        ("INTERFACE", Left),
    ]);
    for socket in sockets {
        table.row([
            socket.id.to_string(),
            protocol(socket),
            socket.state.name().into(),
            socket.local.to_string(),
            if socket.remote.port() == 0 { "*".into() } else { socket.remote.to_string() },
            socket.interface.as_deref().map_or("-".into(), printable),
        ]);
    }
    exit::written(table.print())
}
