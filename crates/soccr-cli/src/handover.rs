//! How a program gets connections: as descriptors from 3 on, as standard input and output, through a socket, from `accept(2)`, or
//! through a relay.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{IoSlice, Read};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{Access, OFlags, access, fcntl_getfl, fcntl_setfl};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Resource, getrlimit};
use soccr::Connection;

use crate::adopt::Server;
use crate::exit::{Coded, Exit};
use crate::parting::Parting;
use crate::relay::{Protocol, Relay};
use crate::rescue::rescue;
use crate::signals::Deaf;
use crate::{descriptors, lifeline, sys};

/// Who gets the connections
#[derive(clap::Args, Debug)]
#[group(required = true, multiple = true)]
pub(crate) struct Handover {
    /// Put the connection into the accept queue of the server that listens on its address and port
    ///
    /// The server is any program, unmodified, in this network namespace. It gets the unread bytes, and nothing of what
    /// the old server knew. Needs root and Linux 6.9.
    #[arg(long, conflicts_with_all = ["stdio", "send_fd", "program"])]
    adopt: bool,
    /// With --adopt: how long a peer may take to acknowledge what was sent to it, before its connection moves on
    #[arg(long, value_name = "SECONDS", default_value = "5", requires = "adopt")]
    drain: u64,
    /// Relay each connection to the server at this address: any server, on any host, which gets new connections
    ///
    /// This command runs until they have ended.
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with_all = ["adopt", "stdio", "send_fd", "program"])]
    connect: Option<SocketAddr>,
    /// With --connect: tell the server the addresses of each connection by the PROXY protocol of this version
    #[arg(long, value_name = "VERSION", requires = "connect")]
    proxy_protocol: Option<Protocol>,
    /// Give the connection as standard input and output, like inetd
    #[arg(long, requires = "program", conflicts_with = "send_fd")]
    stdio: bool,
    /// Send the descriptors to a waiting UNIX stream socket (SCM_RIGHTS)
    ///
    /// Each message carries up to 253 descriptors, and as many lines `LOCAL REMOTE` as its text.
    #[arg(long, value_name = "UNIX_SOCKET", conflicts_with = "program")]
    send_fd: Option<PathBuf>,
    /// Become this program, which finds the connections as descriptors 3 and up (LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES;
    /// see sd_listen_fds(3)), each with the name "connection", and without names where there are more than 11,000
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<String>,
}

/// The number of the first descriptor given (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;
/// The kernel takes no more descriptors in one message (`SCM_MAX_FD`).
const BATCH: usize = 253;

/// How long a recipient may take to read on. What it has not got by then is saved in images.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whoever will get the connections, known to be there.
#[derive(Debug)]
pub(crate) enum Recipient {
    Program { path: PathBuf, arguments: Vec<String>, stdio: bool },
    Socket(UnixStream),
    Server(Box<Server>),
    Relay(Relay),
}

impl Handover {
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
        let path = find_program(&self.program[0])?;
        Ok(Recipient::Program { path, arguments: self.program.clone(), stdio: self.stdio })
    }
}

/// Finds a program as execvp(3) does.
fn find_program(name: &str) -> Result<PathBuf> {
    let candidates: Vec<PathBuf> = match name.contains('/') {
        true => vec![name.into()],
        false => {
            let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
            std::env::split_paths(&path).map(|directory| directory.join(name)).collect()
        }
    };
    let is_program = |path: &&PathBuf| path.is_file() && access(path.as_path(), Access::EXEC_OK).is_ok();
    if let Some(program) = candidates.iter().find(is_program) {
        if let Some(interpreter) = interpreter(program).filter(|path| !is_program(&path)) {
            let missing = interpreter.display();
            bail!(Coded(Exit::NotStarted, format!("{name}: its interpreter {missing} cannot be executed")));
        }
        return Ok(program.clone());
    }
    if candidates.iter().any(|path| Path::exists(path)) {
        bail!(Coded(Exit::NotStarted, format!("{name}: it is no program that may be executed")));
    }
    bail!(Coded(Exit::NotFound, format!("{name}: there is no such program")))
}

/// What the `#!` line of a script names.
fn interpreter(script: &Path) -> Option<PathBuf> {
    let mut start = Vec::new();
    File::open(script).ok()?.take(256).read_to_end(&mut start).ok()?;
    let line = start.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let name = line.split(|byte| b" \t".contains(byte)).find(|word| !word.is_empty())?;
    Some(OsStr::from_bytes(name).into())
}

impl Recipient {
    /// How many connections it can take.
    pub(crate) fn capacity(&self) -> usize {
        match self {
            Self::Program { stdio: true, .. } => 1,
            _ => usize::MAX,
        }
    }

    /// Giving to it is over in a moment, and then so is this command.
    pub(crate) fn is_soon_over(&self) -> bool {
        matches!(self, Self::Server(_) | Self::Socket(_))
    }

    /// Checks that so many connections can be given away, before the first is taken from where it is.
    pub(crate) fn check_room(&self, connections: usize) -> Result<()> {
        /// What else this process has open, and more.
        const OTHERS: u64 = 64;
        let wanted = OTHERS
            + connections as u64
                * match self {
                    // For a moment they have two numbers each.
                    Self::Program { stdio: false, .. } => 2,
                    // That to the server, and at worst two full pipes.
                    Self::Relay(_) => 6,
                    _ => return Ok(()),
                };
        match getrlimit(Resource::Nofile).current {
            Some(limit) if limit < wanted => {
                bail!(
                    "{wanted} descriptors for a program: {limit} are allowed: raise RLIMIT_NOFILE (`ulimit -n`)"
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

    /// Gives the connections away. Where that is a program, this one becomes it, and heeds signals again. What cannot be
    /// given is [rescued](rescue).
    pub(crate) fn give(
        self,
        mut connections: Vec<TcpStream>,
        deaf: Deaf,
        mut parting: Parting,
    ) -> Result<Exit> {
        let given = match self {
            Self::Socket(socket) => send(&socket, &mut connections).map(|()| Exit::Done),
            Self::Program { path, arguments, stdio } => {
                execute(&path, &arguments, stdio, &mut connections, deaf, &mut parting)
            }
            Self::Server(server) => server.give(&mut connections).map(|()| Exit::Done),
            Self::Relay(relay) => relay.give(&mut connections, deaf, &mut parting).map(|()| Exit::Done),
        };
        given.map_err(|error| {
            parting.fail();
            rescue(&connections, &error)
        })
    }
}

/// What has been sent is taken out of `connections`.
fn send(socket: &UnixStream, connections: &mut Vec<TcpStream>) -> Result<()> {
    while !connections.is_empty() {
        let batch = &connections[..connections.len().min(BATCH)];
        let mut text = String::new();
        for connection in batch {
            text += &format!("{} {}\n", connection.local_addr()?, connection.peer_addr()?);
        }
        let fds: Vec<_> = batch.iter().map(AsFd::as_fd).collect();
        let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)
            .context("--send-fd: sendmsg(SCM_RIGHTS)")?;
        // The descriptors went with the first byte: they are the recipient's, whatever becomes of the rest of the text.
        let batch = fds.len();
        connections.drain(..batch);
        let mut rest = &text.as_bytes()[sent..];
        while !rest.is_empty() {
            let sent = rustix::net::send(socket, rest, SendFlags::NOSIGNAL).context("--send-fd: send")?;
            rest = &rest[sent..];
        }
    }
    Ok(())
}

fn execute(
    path: &Path,
    arguments: &[String],
    stdio: bool,
    connections: &mut [TcpStream],
    deaf: Deaf,
    parting: &mut Parting,
) -> Result<Exit> {
    let mut command = Command::new(path);
    lifeline::hide(&mut command);
    descriptors::keep_limit_from(&mut command);
    command.arg0(&arguments[0]).args(&arguments[1..]);
    let end = FIRST + connections.len() as RawFd;
    parting.leave(end)?;
    for connection in &mut *connections {
        // As systemd and inetd give them. A program that wants another mode sets it.
        let flags = fcntl_getfl(&*connection).context("fcntl(F_GETFL)")?;
        fcntl_setfl(&*connection, flags - OFlags::NONBLOCK).context("fcntl(F_SETFL)")?;
        // Beyond the numbers that they will have, so that none is in the way of another.
        let beyond = rustix::io::fcntl_dupfd_cloexec(&*connection, end);
        *connection = beyond.context("fcntl(F_DUPFD_CLOEXEC): see RLIMIT_NOFILE (ulimit -n)")?.into();
    }
    match stdio {
        true => {
            let connection = connections.first().context("there is no connection to give")?;
            rustix::stdio::dup2_stdin(connection).context("dup2")?;
            rustix::stdio::dup2_stdout(connection).context("dup2")?;
        }
        false => {
            sys::place(connections, FIRST).context("dup2")?;
            command
                .env("LISTEN_FDS", connections.len().to_string())
                .env("LISTEN_PID", std::process::id().to_string())
                .envs(names(connections.len()).map(|names| ("LISTEN_FDNAMES", names)));
        }
    }
    // The program inherits what is ignored.
    drop(deaf);
    let error = command.exec();
    // The attempt has given SIGPIPE its default back: a message that nobody reads would cost the connections.
    sys::ignore(libc::SIGPIPE);
    bail!(Coded(Exit::NotStarted, format!("{}: {error}", path.display())))
}

/// The most descriptors that have names.
const MOST_NAMES: usize = 11_000;

/// The names of the descriptors; none where they are longer than the kernel takes (`MAX_ARG_STRLEN`, 128 KiB).
fn names(count: usize) -> Option<String> {
    (count <= MOST_NAMES).then(|| vec!["connection"; count].join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_starts_with_the_names_of_as_many_descriptors_as_have_some() {
        assert_eq!(names(2).unwrap(), "connection:connection");
        assert_eq!(names(MOST_NAMES + 1), None);
        let longest = names(MOST_NAMES).unwrap();
        assert!(Command::new("true").env("LISTEN_FDNAMES", longest).status().unwrap().success());
    }
}
