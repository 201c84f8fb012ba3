//! `--adopt`: connections for a listening server that knows nothing of soccr.

use std::cell::RefCell;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use rustix::process::Pid;
use soccr::Connection;
use soccr::adopt::{Adopted, Adopter};
use soccr::lock::{Locker, Mode};
use soccr_handover::foreign::process;

use crate::exit;

use super::Live;

/// How long a server may take to accept what is in its queue, before that is reported.
const ACCEPT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

/// The servers that listen on the addresses of the connections.
#[derive(Debug)]
pub(crate) struct Server {
    adopter: RefCell<Adopter>,
    locker: Locker,
    drain: Duration,
    /// The addresses whose listeners have been looked up.
    known: RefCell<HashSet<SocketAddr>>,
}

impl Server {
    /// Servers in the network namespace of the caller.
    pub(crate) fn new(drain: Duration) -> Result<Self> {
        Ok(Self {
            adopter: RefCell::new(Adopter::new()?),
            locker: Locker::new(Mode::HOLD)?,
            drain,
            known: RefCell::default(),
        })
    }

    pub(crate) fn check(&self, connection: &Connection) -> Result<()> {
        let mut adopter = self.adopter.borrow_mut();
        adopter.check(connection)?;
        let flow = connection.flow();
        if self.known.borrow_mut().insert(flow.local) {
            tell_rivals(flow.local, &adopter.listeners(flow)?)?;
        }
        Ok(())
    }

    /// Gives the connections away and prints how many were accepted. The others stay in `connections`.
    pub(crate) fn give(&self, connections: &mut Vec<Live>) -> Result<()> {
        let mut adopter = self.adopter.borrow_mut();
        let (flows, sockets): (Vec<_>, Vec<_>) =
            connections.drain(..).map(|live| (live.flow, OwnedFd::from(live.stream))).unzip();
        let (mut adopted, mut reasons) = (Vec::new(), Vec::new());
        for (flow, outcome) in flows.into_iter().zip(adopter.give(&self.locker, sockets, self.drain)) {
            match outcome {
                Ok(there) => adopted.push(there),
                Err(kept) => {
                    reasons.push(kept.error().to_string());
                    match kept.into_socket() {
                        Ok(socket) => {
                            connections.push(Live { flow, stream: socket.into(), has_state: false })
                        }
                        Err(connection) => exit::complain(&format!("{} is lost", connection.remote)),
                    }
                }
            }
        }
        // If some did not fit, the caller saves them now: do not wait for the server first.
        let limit = if reasons.is_empty() { ACCEPT } else { Duration::ZERO };
        let waiting = wait_for_accept(&mut adopter, adopted, limit);
        let waiting = waiting.unwrap_or_else(|error| {
            // They are in the queue, whoever has accepted them.
            exit::complain(&format!("whether they are accepted: {}", exit::line(&error)));
            Vec::new()
        });
        exit::complain_of_all(waiting.iter().map(|there| {
            (there.to_string(), "it stays there, alive, until the server accepts it".to_owned())
        }));
        match reasons.first() {
            None => Ok(()),
            Some(reason) => Err(anyhow!("{} of the connections were not adopted: {reason}", reasons.len())),
        }
    }
}

/// Prints a note if several servers share a port: each has listeners that the others do not have.
fn tell_rivals(local: SocketAddr, listeners: &[u32]) -> Result<()> {
    if listeners.len() < 2 {
        return Ok(());
    }
    let holders = process::holders(&process::all()?)?;
    let mut servers: Vec<Vec<Pid>> = Vec::new();
    for inode in listeners {
        let mut server: Vec<Pid> =
            holders.get(&u64::from(*inode)).into_iter().flatten().map(|holder| holder.pid).collect();
        servers.retain_mut(|other| {
            let is_same = other.iter().any(|pid| server.contains(pid));
            if is_same {
                server.append(other);
            }
            !is_same
        });
        servers.push(server);
    }
    if servers.len() > 1 {
        let pids: Vec<String> =
            servers.iter().filter_map(|server| server.first()).map(Pid::to_string).collect();
        exit::complain(&format!(
            "several processes listen on {local}, and the kernel chooses between them: {}: one that should get nothing must stop \
             listening before",
            pids.join(", ")
        ));
    }
    Ok(())
}

/// Waits until a server has accepted the connections; returns those that it has not accepted in time.
fn wait_for_accept(adopter: &mut Adopter, adopted: Vec<Adopted>, limit: Duration) -> Result<Vec<Adopted>> {
    let deadline = Instant::now() + limit;
    let mut waiting = adopted;
    loop {
        let mut still = Vec::new();
        for there in waiting {
            if !there.accepted() && adopter.is_accepted(there.flow())? == Some(false) {
                still.push(there);
            }
        }
        waiting = still;
        if waiting.is_empty() || Instant::now() >= deadline {
            return Ok(waiting);
        }
        std::thread::sleep(POLL);
    }
}
