//! Proof that the target of a hand-over is gone.
//!
//! The end of a pipe proves nothing: a relay such as ssh(1) may have died while the target lives on. So the source gives the
//! command that it runs one end of a socket pair, named in the environment, and a target that is on the same machine
//! sends a pidfd of itself through it. Relays leave it alone.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{FdFlags, fcntl_setfd, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, socketpair,
};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use crate::sys;

/// Sent by a target that ends as soon as it has given its connections away.
const GIVES: &[u8; 1] = b"=";

const VARIABLE: &str = "SOCCR_LIFELINE";

/// How long a target may take at most to die once its pipe is closed.
const LIMIT: Duration = Duration::from_secs(2);

/// The source's end of the socket pair.
///
/// Proof needs a target that ended before it took any connection: later it may have given them away.
#[derive(Debug)]
pub(crate) struct Lifeline {
    socket: OwnedFd,
    target: Option<OwnedFd>,
}

impl Lifeline {
    /// Runs `start` with a command that inherits the other end.
    pub(crate) fn with<T>(
        command: &mut Command,
        start: impl FnOnce(&mut Command) -> Result<T>,
    ) -> Result<(Self, T)> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .context("socketpair")?;
        fcntl_setfd(&theirs, FdFlags::empty()).context("fcntl(F_SETFD)")?;
        command.env(VARIABLE, theirs.as_raw_fd().to_string());
        let started = start(command)?;
        Ok((Self { socket: ours, target: None }, started))
    }

    /// Waits until a target ends that has announced to do so once its connections are given; returns whether it did.
    pub(crate) fn wait_while_giving(&mut self, limit: Duration) -> bool {
        self.look_for_target();
        let Some(target) = &self.target else { return false };
        let mut words = [0; 2];
        let said = recv(&self.socket, &mut words, RecvFlags::DONTWAIT).map_or(0, |(count, _)| count);
        let gives = words[..said].contains(&GIVES[0]);
        if gives {
            let limit = limit.try_into().expect("a time limit fits");
            let _ = retry_on_intr(|| poll(&mut [PollFd::new(target, PollFlags::IN)], Some(&limit)));
        }
        gives
    }

    fn look_for_target(&mut self) {
        if self.target.is_none() {
            self.target = self.receive();
        }
    }

    /// Whether the target is known to have ended without a connection. Waits for its end up to [`LIMIT`], and at most `remaining`.
    pub(crate) fn is_cut(&mut self, remaining: Duration) -> bool {
        self.look_for_target();
        let Some(target) = &self.target else { return false };
        let limit = LIMIT.min(remaining).try_into().expect("seconds fit");
        let mut ended = [PollFd::new(target, PollFlags::IN)];
        retry_on_intr(|| poll(&mut ended, Some(&limit))).is_ok_and(|count| count > 0) && !self.has_taken()
    }

    fn has_taken(&self) -> bool {
        let mut byte = [0];
        recv(&self.socket, &mut byte, RecvFlags::DONTWAIT).is_ok_and(|(count, _)| count > 0)
    }

    fn receive(&self) -> Option<OwnedFd> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut text = [IoSliceMut::new(&mut byte)];
        recvmsg(&self.socket, &mut text, &mut control, RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC).ok()?;
        control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
    }
}

/// The target's end of the socket pair.
#[derive(Debug)]
pub(crate) struct Claim(Option<OwnedFd>);

impl Claim {
    /// Tells the source that connections are about to be here, and whether this process ends when it has given them away.
    pub(crate) fn has_taken(&mut self, gives: bool) {
        let Some(socket) = self.0.take() else { return };
        for word in [Some(b"+"), gives.then_some(GIVES)].into_iter().flatten() {
            let _ = send(&socket, word, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        }
    }
}

/// Tells the source who its target is, if there is a lifeline. Call it once, before the first thread starts.
pub(crate) fn claim() -> Result<Claim> {
    let Some(number) = std::env::var(VARIABLE).ok().and_then(|number| number.parse().ok()) else {
        return Ok(Claim(None));
    };
    let Some(socket) = sys::inherited_socket(number) else { return Ok(Claim(None)) };
    let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).context("pidfd_open")?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [pidfd.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    // If the descriptor is something else, there is no lifeline.
    let _ = sendmsg(&socket, &[IoSlice::new(b"!")], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    Ok(Claim(Some(socket)))
}

/// Keeps the variable from the program that gets the connections.
pub(crate) fn hide(command: &mut Command) {
    command.env_remove(VARIABLE);
}
