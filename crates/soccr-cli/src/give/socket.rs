//! Connections through a UNIX socket, as descriptors (`SCM_RIGHTS`).

use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use rustix::io::retry_on_intr;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::Live;
use super::state::State;

/// The kernel takes no more descriptors in one message (`SCM_MAX_FD`).
const BATCH: usize = 253;

/// Takes the connections that have been sent out of `connections`.
pub(super) fn send(socket: &UnixStream, connections: &mut Vec<Live>, mut states: &[State]) -> Result<()> {
    let all = connections.len();
    while !connections.is_empty() {
        let (mut text, mut fds, mut batch) = (String::new(), Vec::new(), 0);
        let mut number = all - connections.len();
        for Live { flow, stream } in &*connections {
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
        let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let text = text.as_bytes();
        let send_all = || sendmsg(socket, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL);
        let sent = retry_on_intr(send_all).context("--send-fd: sendmsg(SCM_RIGHTS)")?;
        // The descriptors went with the first byte: they are the recipient's, whatever becomes of the rest of the text.
        connections.drain(..batch);
        let mut rest = &text[sent..];
        while !rest.is_empty() {
            let sent = retry_on_intr(|| rustix::net::send(socket, rest, SendFlags::NOSIGNAL));
            let sent = sent.context("--send-fd: send")?;
            rest = &rest[sent..];
        }
    }
    Ok(())
}
