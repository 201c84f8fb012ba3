//! `--adopt`: connections for a server that listens, and knows nothing of it.

use std::cell::RefCell;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use soccr::Connection;
use soccr::adopt::{Adopted, Adopter};
use soccr::lock::{Locker, Mode};

use crate::exit;

/// How long a server may take to accept what is in its queue, before that is reported.
const ACCEPT: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

/// Whoever listens where the connections go.
#[derive(Debug)]
pub(crate) struct Server {
    adopter: RefCell<Adopter>,
    locker: Locker,
    drain: Duration,
}

impl Server {
    /// Servers in the network namespace of the caller.
    pub(crate) fn new(drain: Duration) -> Result<Self> {
        Ok(Self { adopter: RefCell::new(Adopter::new()?), locker: Locker::new(Mode::HOLD)?, drain })
    }

    pub(crate) fn check(&self, connection: &Connection) -> Result<()> {
        Ok(self.adopter.borrow_mut().check(connection)?)
    }

    /// Gives the connections away, and says how many were accepted. What is kept stays in `connections`.
    pub(crate) fn give(&self, connections: &mut Vec<TcpStream>) -> Result<()> {
        let mut adopter = self.adopter.borrow_mut();
        let sockets = connections.drain(..).map(OwnedFd::from).collect();
        let (mut adopted, mut reasons) = (Vec::new(), Vec::new());
        for outcome in adopter.give(&self.locker, sockets, self.drain) {
            match outcome {
                Ok(there) => adopted.push(there),
                Err(kept) => {
                    reasons.push(kept.error().to_string());
                    match kept.into_socket() {
                        Ok(socket) => connections.push(socket.into()),
                        Err(connection) => exit::complain(&format!("{} is lost", connection.remote)),
                    }
                }
            }
        }
        let waiting = wait_for_accept(&mut adopter, adopted)?;
        for there in &waiting {
            exit::complain(&format!("{there}: it stays there, alive, until the server accepts it"));
        }
        match reasons.first() {
            None => Ok(()),
            Some(reason) => Err(anyhow!("{} of the connections were not adopted: {reason}", reasons.len())),
        }
    }
}

/// Waits until a server has accepted them; returns what it has not accepted in time.
fn wait_for_accept(adopter: &mut Adopter, adopted: Vec<Adopted>) -> Result<Vec<Adopted>> {
    let deadline = Instant::now() + ACCEPT;
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
