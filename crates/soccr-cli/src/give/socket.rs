//! Connections through a UNIX socket, as descriptors (`SCM_RIGHTS`).

use std::io::IoSlice;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// The kernel takes no more descriptors in one message (`SCM_MAX_FD`).
const BATCH: usize = 253;

/// What has been sent is taken out of `connections`.
pub(super) fn send(socket: &UnixStream, connections: &mut Vec<TcpStream>) -> Result<()> {
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
