//! `--listener`: connections that wait in the accept queues of a process go along. Those that do not leave return to their queues.

use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::{SocketFlags, accept_with, ipproto, sockopt};
use rustix::process::Pid;
use soccr::Flow;
use soccr::adopt::{Adopter, DRAIN};
use soccr::lock::{Locker, Mode};
use soccr_handover::Seat;
use soccr_handover::foreign::{Process, Sharing, Stopped, namespace, process};

use crate::exit;
use crate::give::rescue::rescue;
use crate::signals::Deaf;

/// More than an accept queue usually holds. A limit, because clients that connect meanwhile would keep us here.
const MOST: usize = 1 << 16;

/// Connections that we have accepted instead of their server. Dropping this puts those that have not left back into the queue.
#[derive(Debug, Default)]
pub(crate) struct Backlog(Vec<Waiting>);

/// A connection that its server has not accepted.
#[derive(Debug)]
struct Waiting {
    name: String,
    flow: Flow,
    socket: OwnedFd,
}

impl Backlog {
    /// Accepts, in their order, the connections that wait for a process. Meanwhile the processes that share its listeners are stopped.
    pub(crate) fn take(pid: Pid) -> Result<Self> {
        process::look_into(pid)?;
        let owner = Process::open(pid)?;
        let (mut listeners, mut inodes) = (Vec::new(), Vec::new());
        process::sockets(pid, |fd, inode| {
            // A listener that has been closed meanwhile has no queue.
            let Ok(socket) = owner.duplicate(fd) else { return };
            if sockopt::socket_acceptconn(&socket) != Ok(true) || inodes.contains(&inode) {
                return;
            }
            match sockopt::socket_protocol(&socket) {
                Ok(Some(protocol)) if protocol == ipproto::TCP => {
                    listeners.push((format!("pid {pid} fd {fd}"), socket));
                    inodes.push(inode);
                }
                Ok(Some(protocol)) if protocol.as_raw().get() == libc::IPPROTO_MPTCP as u32 => {
                    exit::complain(&format!(
                        "pid {pid} fd {fd}: left out: its queue could not be filled again (MPTCP)"
                    ));
                }
                _ => {}
            }
        })?;
        let mut sharing = Sharing::find(&inodes)?;
        let mut backlog = Self::default();
        let _stopped = Stopped::stop(&mut sharing)?;
        for (name, listener) in &listeners {
            if let Err(error) = backlog.accept(name, listener) {
                exit::complain(&format!("{name}: accept: {error}"));
            }
        }
        Ok(backlog)
    }

    /// A blocking listener does not block here: the process is stopped, and nobody else accepts.
    fn accept(&mut self, name: &str, listener: &OwnedFd) -> rustix::io::Result<()> {
        let waits = || poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&Timespec::default()));
        while self.0.len() < MOST && retry_on_intr(waits)? > 0 {
            let socket = accept_with(listener, SocketFlags::CLOEXEC)?;
            // Otherwise the client has given up.
            if let Ok(flow) = Flow::of(&socket) {
                self.0.push(Waiting { name: format!("{name}, not accepted"), flow, socket });
            }
        }
        Ok(())
    }

    pub(crate) fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|waiting| waiting.socket.as_fd())
    }

    /// The connections, to be sent. They are duplicates of the sockets here, which show whether a connection has come back.
    pub(crate) fn seats(&self) -> Result<Vec<(String, Seat)>> {
        let seat = |Waiting { name, flow, socket }: &Waiting| {
            Ok((name.clone(), Seat::new(socket.try_clone()?, *flow)))
        };
        self.0.iter().map(seat).collect()
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        let _deaf = Deaf::begin();
        // A connection that has left is no longer in its socket.
        let stay: Vec<Waiting> =
            self.0.drain(..).filter(|waiting| Flow::of(&waiting.socket).is_ok()).collect();
        if !stay.is_empty()
            && let Err(error) = give_back(stay)
        {
            exit::complain(&exit::line(&error));
        }
    }
}

/// Puts connections back into the queues of their listeners, or saves them in images if that fails.
fn give_back(stay: Vec<Waiting>) -> Result<()> {
    let tools = namespace::enter_of(stay[0].socket.as_fd())
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok((Adopter::new()?, Locker::new(Mode::HOLD)?)));
    let (flows, sockets): (Vec<_>, Vec<_>) =
        stay.into_iter().map(|waiting| (waiting.flow, waiting.socket)).unzip();
    let (mut kept, mut reason) = (Vec::new(), None);
    match tools {
        Err(error) => {
            kept.extend(flows.into_iter().zip(sockets.into_iter().map(TcpStream::from)));
            reason = Some(error);
        }
        Ok((mut adopter, locker)) => {
            for (flow, outcome) in flows.into_iter().zip(adopter.give(&locker, sockets, DRAIN)) {
                let Err(there) = outcome else { continue };
                reason = Some(anyhow!("{}", there.error()));
                match there.into_socket() {
                    Ok(socket) => kept.push((flow, socket.into())),
                    Err(connection) => exit::complain(&format!("{} is lost", connection.remote)),
                }
            }
        }
    }
    match reason {
        None => Ok(()),
        Some(reason) => Err(rescue(
            kept.iter().map(|(flow, stream)| (*flow, stream)),
            &reason.context("back into the accept queue"),
        )),
    }
}
