//! How a program gets connections: as descriptors from 3 on, as standard input and output, through a socket, from `accept(2)`, or
//! through a relay.

mod adopt;
pub(crate) mod parting;
mod program;
mod relay;
pub(crate) mod rescue;
mod socket;
pub(crate) mod state;

use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Resource, getrlimit};
use soccr::{Connection, Flow};

use crate::exit::{self, Exit};
use crate::signals::Deaf;

use adopt::Server;
use parting::Parting;
use relay::{Protocol, Relay};
use rescue::rescue_unless;
use socket::Delivery;
use state::State;

/// Who gets the connections
#[derive(clap::Args, Debug)]
#[group(required = true, multiple = true)]
pub(crate) struct Handover {
    /// Put the connection into the accept queue of the server that listens on its address and port
    ///
    /// The server is any program, unmodified, in this network namespace. It gets the unread bytes, and nothing of what
    /// the old server knew. Needs root and Linux 6.9.
    ///
    /// What moves is bytes. TLS, the streams of HTTP/2, a login, a database that was SELECTed, a transaction are state of the old
    /// server and stay with it: move only between two requests that stand alone, as of HTTP/1.1 or memcached, and what is
    /// in use not at all (`soccr send --idle`).
    #[arg(long, conflicts_with_all = ["stdio", "send_fd", "program"])]
    adopt: bool,
    /// With --adopt: how long a peer may take to acknowledge what was sent to it, before its connection moves on
    #[arg(long, value_name = "SECONDS", default_value = "5", requires = "adopt",
        conflicts_with_all = ["connect", "stdio", "send_fd", "program"], value_parser = clap::value_parser!(u64).range(..=86400))]
    drain: u64,
    /// Relay each connection to the server at this address: any server, on any host, which gets new connections
    ///
    /// This command runs until they have ended.
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with_all = ["adopt", "stdio", "send_fd", "program"])]
    connect: Option<SocketAddr>,
    /// With --connect: tell the server the addresses of each connection by the PROXY protocol of this version
    #[arg(long, value_name = "VERSION", requires = "connect",
        conflicts_with_all = ["adopt", "stdio", "send_fd", "program"])]
    proxy_protocol: Option<Protocol>,
    /// Give the connection as standard input and output, like inetd
    #[arg(long, requires = "program", conflicts_with = "send_fd")]
    stdio: bool,
    /// Send the descriptors to a waiting UNIX stream socket (SCM_RIGHTS)
    ///
    /// Each message carries up to 253 descriptors, and a line `LOCAL REMOTE` for each connection as its text. Where the source has
    /// sent a state along, the line is `LOCAL REMOTE state`, and the next descriptor is a file with that. What is not read within 10 seconds
    /// is saved in images, without its state: a message that is read later has descriptors without connections.
    #[arg(long, value_name = "UNIX_SOCKET", conflicts_with = "program")]
    send_fd: Option<PathBuf>,
    /// Become this program, which finds the connections as descriptors 3 and up (LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES;
    /// see sd_listen_fds(3)), each with the name "connection", and without names where there are more than 11,000. Behind them come
    /// files with the states that the source has sent along: "state-5" is that of descriptor 5
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<String>,
}

/// How long a recipient may stop reading. Connections that it has not got by then are saved in images.
const PATIENCE: Duration = Duration::from_secs(10);

/// The recipient of the connections, known to be there.
#[derive(Debug)]
pub(crate) enum Recipient {
    Program { path: PathBuf, arguments: Vec<String>, stdio: bool },
    Socket(UnixStream),
    Server(Box<Server>),
    Relay(Relay),
}

/// A live connection to be given away. Its addresses go along: of one that the peer has reset, the kernel does not tell them any more.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) flow: Flow,
    pub(crate) stream: TcpStream,
    /// The source has sent a state along, which is in no image.
    pub(crate) has_state: bool,
}

impl Handover {
    /// Whether this process, or the program that it becomes, has the connections for as long as they live.
    pub(crate) fn is_kept_here(&self) -> bool {
        !self.adopt && self.send_fd.is_none()
    }

    /// Looks for the recipient, before a connection is touched.
    ///
    /// A server is looked for in the network namespace of the caller.
    pub(crate) fn find(&self) -> Result<Recipient> {
        if self.adopt {
            return Ok(Recipient::Server(Box::new(Server::new(Duration::from_secs(self.drain))?)));
        }
        if let Some(server) = self.connect {
            return Ok(Recipient::Relay(Relay::new(server, self.proxy_protocol)?));
        }
        if let Some(path) = &self.send_fd {
            let socket = UnixStream::connect(path).with_context(|| format!("{}", path.display()))?;
            socket.set_write_timeout(Some(PATIENCE)).context("SO_SNDTIMEO")?;
            return Ok(Recipient::Socket(socket));
        }
        let path = program::find(&self.program[0])?;
        Ok(Recipient::Program { path, arguments: self.program.clone(), stdio: self.stdio })
    }
}

impl Recipient {
    /// How many connections it can take.
    pub(crate) fn capacity(&self) -> usize {
        match self {
            Self::Program { stdio: true, .. } => 1,
            _ => usize::MAX,
        }
    }

    /// This command ends as soon as the connections are given.
    pub(crate) fn is_soon_over(&self) -> bool {
        matches!(self, Self::Server(_) | Self::Socket(_))
    }

    /// Whether it also gets the state that the source sends along with a connection.
    pub(crate) fn takes_states(&self) -> bool {
        matches!(self, Self::Program { stdio: false, .. } | Self::Socket(_))
    }

    /// Checks that this number of connections, and of states that come with them, can be given away, before the first is taken from where
    /// it is.
    pub(crate) fn check_room(&self, connections: usize, states: usize) -> Result<()> {
        /// Room for everything else that this process has open.
        const OTHERS: u64 = 64;
        let (each, whom) = match self {
            // Each has two descriptors for a moment.
            Self::Program { stdio: false, .. } => (2, "a program"),
            // The connection to the server, and at worst two full pipes.
            Self::Relay(_) => (6, "a program"),
            // They stay here until they have been read.
            Self::Socket(_) => (1, "--send-fd"),
            _ => return Ok(()),
        };
        let wanted = OTHERS + (connections + states) as u64 * each;
        match getrlimit(Resource::Nofile).current {
            Some(limit) if limit < wanted => {
                bail!(
                    "{wanted} descriptors for {whom}: {limit} are allowed: raise RLIMIT_NOFILE (`ulimit -n`)"
                )
            }
            _ => Ok(()),
        }
    }

    /// Checks that this connection can be given away, before it is taken from where it is.
    pub(crate) fn check(&self, connection: &Connection) -> Result<()> {
        match self {
            Self::Server(server) => server.check(connection),
            _ => Ok(()),
        }
    }

    /// Gives the connections away; for a program, this process executes it, with signals enabled again. Connections that
    /// cannot be given are [rescued](rescue::rescue).
    pub(crate) fn give(
        self,
        mut connections: Vec<Live>,
        states: &[State],
        deaf: Deaf,
        mut parting: Parting,
    ) -> Result<Exit> {
        let given = match self {
            Self::Socket(socket) => {
                let mut delivery = Delivery::new(socket);
                let Err(error) = delivery.send(&mut connections, states) else { return Ok(Exit::Done) };
                return give_up_unless(
                    &mut |number| delivery.has_given(number),
                    &connections,
                    &error,
                    &parting,
                );
            }
            Self::Program { path, arguments, stdio } => {
                program::execute(&path, &arguments, stdio, &mut connections, states, deaf, &mut parting)
            }
            Self::Server(server) => server.give(&mut connections).map(|()| Exit::Done),
            Self::Relay(relay) => relay.give(&mut connections, deaf, &mut parting).map(|()| Exit::Done),
        };
        let Err(error) = given else { return given };
        give_up(&connections, &error, &parting)
    }
}

/// Nobody gets these connections, for this reason: they are [rescued](rescue::rescue).
pub(crate) fn give_up(connections: &[Live], reason: &anyhow::Error, parting: &Parting) -> Result<Exit> {
    give_up_unless(&mut |_| false, connections, reason, parting)
}

/// The same, but for those that have [a new owner](rescue_unless).
fn give_up_unless(
    is_gone: &mut dyn FnMut(usize) -> bool,
    connections: &[Live],
    reason: &anyhow::Error,
    parting: &Parting,
) -> Result<Exit> {
    let error = rescue_unless(is_gone, connections, reason);
    let is_told = exit::fail_by_source(&error);
    parting.fail();
    match is_told {
        true => Ok(exit::code(&error)),
        false => Err(error),
    }
}
