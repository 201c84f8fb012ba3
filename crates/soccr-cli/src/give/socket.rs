//! Connections through a UNIX socket, as descriptors (`SCM_RIGHTS`).
//!
//! What has been sent is the recipient's when it has read it, not before: the kernel takes a message also for a process that hangs, or has not
//! accepted the socket yet, and destroys it with the socket. So the connections stay here, too, until the message has been read.

use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::io::retry_on_intr;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg, sockopt};
use soccr_handover::foreign::process::{self, Sharing};

use crate::sys;

use super::state::State;
use super::{Live, PATIENCE};

/// The kernel takes no more descriptors in one message (`SCM_MAX_FD`).
const BATCH: usize = 253;

/// From when on a message that has not been read to its end is looked for in other processes.
const SLOW: Duration = Duration::from_millis(64);

/// The socket of the recipient, and what waits there.
#[derive(Debug)]
pub(super) struct Delivery {
    socket: UnixStream,
    /// How many connections are in the message that has not been read, as far as is known.
    in_flight: usize,
    /// The recipient has closed the socket, or sending has failed: that nothing waits there does not mean that it has been read.
    is_over: bool,
}

impl Delivery {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, in_flight: 0, is_over: false }
    }

    /// Takes the connections that the recipient has got out of `connections`.
    pub(super) fn send(&mut self, connections: &mut Vec<Live>, mut states: &[State]) -> Result<()> {
        let all = connections.len();
        while !connections.is_empty() {
            let (mut text, mut fds, mut batch) = (String::new(), Vec::new(), 0);
            let mut number = all - connections.len();
            for Live { flow, stream, .. } in &*connections {
                let state = states.first().filter(|(of, _)| *of == number);
                if fds.len() + 1 + usize::from(state.is_some()) > BATCH {
                    break;
                }
                text += &format!("{} {}", flow.local, flow.remote);
                fds.push(stream.as_fd());
                if let Some((_, state)) = state {
                    text += " state";
                    fds.push(state.as_fd());
                    states = &states[1..];
                }
                text += "\n";
                (batch, number) = (batch + 1, number + 1);
            }
            let inode = process::inode(&connections[0].stream)?;
            let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let text = text.as_bytes();
            let send_all = || sendmsg(&self.socket, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL);
            let sent = retry_on_intr(send_all).context("--send-fd: sendmsg(SCM_RIGHTS)")?;
            // The descriptors went with the first byte.
            self.in_flight = batch;
            let rest = self.send_rest(&text[sent..]);
            self.is_over |= rest.is_err();
            let got = self.wait_until_got(inode);
            if got.is_ok() {
                connections.drain(..batch);
                self.in_flight = 0;
            }
            rest.and(got)?;
        }
        Ok(())
    }

    fn send_rest(&self, mut text: &[u8]) -> Result<()> {
        while !text.is_empty() {
            let sent = retry_on_intr(|| rustix::net::send(&self.socket, text, SendFlags::NOSIGNAL));
            text = &text[sent.context("--send-fd: send")?..];
        }
        Ok(())
    }

    /// Waits until the recipient has got the message whose first connection this is.
    fn wait_until_got(&mut self, inode: u64) -> Result<()> {
        let start = Instant::now();
        let mut nap = Duration::from_millis(1);
        while !self.is_read() {
            let is_late = start.elapsed() > PATIENCE;
            // Who has read a part of the text has the descriptors.
            let may_be_there = is_late || self.is_over || nap >= SLOW;
            if may_be_there && Sharing::find(&[inode]).is_ok_and(|others| !others.processes().is_empty()) {
                break;
            }
            if self.is_over {
                bail!("--send-fd: the recipient has closed the socket, and not read what was sent");
            }
            if is_late {
                bail!(
                    "--send-fd: the recipient has not read what was sent for {} seconds",
                    PATIENCE.as_secs()
                );
            }
            sleep(nap);
            nap = (2 * nap).min(4 * SLOW);
        }
        Ok(())
    }

    /// Whether the message has been read to its end.
    fn is_read(&mut self) -> bool {
        let is_empty = sys::unread(self.socket.as_fd()).is_ok_and(|bytes| bytes == 0);
        // The kernel sets the error before it empties the queue, and tells it once.
        self.is_over |= matches!(sockopt::socket_error(&self.socket), Ok(Err(_)));
        is_empty && !self.is_over
    }

    /// Whether the recipient has got this connection after all, the first being number 0.
    pub(super) fn has_given(&mut self, number: usize) -> bool {
        number < self.in_flight && self.is_read()
    }
}
