//! Connections that could not be given to anybody: each is saved in an image, and its socket is closed in silence.

use std::net::TcpStream;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::getpeername;
use soccr::lock::{Locker, Mode, SILENCE};
use soccr::{Connection, Flow, Paused};
use soccr_handover::silence;

use crate::exit::{self, Coded, Exit};
use crate::signals::Deaf;

use super::Live;

/// How long a peer may take to acknowledge what the kernel has encrypted.
const SETTLING: Duration = Duration::from_secs(2);

/// Saves each connection in the working directory, or else in the directory for temporary files. The error gives the `reason`,
/// then what became of the connections.
pub(crate) fn rescue<'a>(
    connections: impl IntoIterator<Item = (Flow, &'a TcpStream)>,
    reason: &anyhow::Error,
) -> anyhow::Error {
    rescue_all(&mut |_| false, connections.into_iter().map(|(flow, stream)| (flow, stream, false)), reason)
}

/// The same, but leaves to its new owner a connection that `is_gone`, by its number from 0. That is asked while it is paused, so that nobody
/// else can have read or written before a connection is saved.
pub(crate) fn rescue_unless(
    is_gone: &mut dyn FnMut(usize) -> bool,
    connections: &[Live],
    reason: &anyhow::Error,
) -> anyhow::Error {
    let all = connections.iter().map(|Live { flow, stream, has_state }| (*flow, stream, *has_state));
    rescue_all(is_gone, all, reason)
}

/// Each with its addresses, and whether it has a state that is lost.
fn rescue_all<'a>(
    is_gone: &mut dyn FnMut(usize) -> bool,
    connections: impl Iterator<Item = (Flow, &'a TcpStream, bool)>,
    reason: &anyhow::Error,
) -> anyhow::Error {
    let _deaf = Deaf::begin();
    let code = exit::code(reason);
    let (mut count, mut lost, mut ended) = (0, 0, 0);
    let mut boat = None;
    for (number, (flow, stream, has_state)) in connections.enumerate() {
        count += 1;
        let name = format!("{} {}", flow.local, flow.remote);
        match Lifeboat::aboard(&mut boat).and_then(|boat| boat.save(flow, stream, || is_gone(number))) {
            Ok(None) => {
                count -= 1;
                exit::complain(&format!("{name}: the recipient has got it after all"));
            }
            Ok(Some(path)) => {
                exit::complain(&format!("{name}: saved in {}: see `soccr restore`", path.display()));
                if has_state {
                    exit::complain(&format!(
                        "{name}: the state that its application had sent along is lost: no image has it"
                    ));
                }
            }
            Err(error) if has_ended(stream) => {
                ended += 1;
                exit::complain(&format!("{name}: it has ended, and cannot be saved: {}", exit::line(&error)));
            }
            Err(error) => {
                lost += 1;
                exit::complain(&format!("{name}: it is lost: {}", exit::line(&error)));
            }
        }
    }
    let reason = exit::line(reason);
    let (code, outcome) = match (count, lost, ended) {
        (0, ..) => (code, String::new()),
        (_, 0, 0) => (code, "; no connection is lost: each is saved in an image".to_owned()),
        (_, 0, _) => {
            (code, "; no connection is lost: each that has not ended is saved in an image".to_owned())
        }
        (count, lost, _) => (Exit::Lost, format!("; {lost} of {count} connections are lost")),
    };
    Coded(code, reason + &outcome).into()
}

/// Whether the connection is in CLOSE: its peer has reset or refused it, or both ends have closed it.
fn has_ended(stream: &TcpStream) -> bool {
    let mut events = [PollFd::new(stream, PollFlags::empty())];
    retry_on_intr(|| poll(&mut events, Some(&Timespec::default()))).is_ok()
        && events[0].revents().contains(PollFlags::HUP)
        && getpeername(stream) == Err(Errno::NOTCONN)
}

/// What saving needs, opened once for all connections.
struct Lifeboat {
    locker: Locker,
    /// The number of the last image.
    number: usize,
}

impl Lifeboat {
    fn aboard(boat: &mut Option<Self>) -> Result<&mut Self> {
        Ok(match boat {
            Some(boat) => boat,
            None => boat.insert(Self { locker: Locker::new(Mode::Drop)?, number: 0 }),
        })
    }

    /// Nothing where the connection is gone.
    fn save(
        &mut self,
        flow: Flow,
        stream: &TcpStream,
        is_gone: impl FnOnce() -> bool,
    ) -> Result<Option<PathBuf>> {
        soccr::tls::settle(stream, SETTLING)?;
        // Nothing may arrive between the image and the end of the socket; the peer sends it again.
        let _lock = self.locker.lock(&[flow])?;
        let paused = soccr::pause(stream)?.with_tls().with_peer(flow.remote);
        if is_gone() {
            return Ok(None);
        }
        let path = self.write(&paused.save()?)?;
        let left = silence::begin(&[flow], SILENCE)
            .map_err(anyhow::Error::from)
            .and_then(|()| paused.detach().inspect_err(|_| drop(silence::lift(&[flow]))).map_err(Into::into));
        if let Err(error) = left {
            // The guard has let the connection go on, unless TLS records were read out of the socket: the image alone has them.
            let stuck = Paused::take_over(stream.as_fd()).map(Paused::leave_paused);
            if stuck.is_err() {
                // It ends with this process.
                let _ = std::fs::remove_file(&path);
                return Err(error);
            }
            // Without the silence, the socket would acknowledge what no image has.
            let _ = soccr::tls::discard(stream, flow);
            exit::complain(&format!(
                "{} {}: its peer may get a reset before it is restored: {}",
                flow.local,
                flow.remote,
                exit::line(&error)
            ));
        }
        Ok(Some(path))
    }

    fn write(&mut self, connection: &Connection) -> Result<PathBuf> {
        let here = std::env::current_dir().unwrap_or_default();
        let mut failure = None;
        for directory in [here, std::env::temp_dir()] {
            let path = loop {
                self.number += 1;
                let name = format!("soccr-rescued-{}-{}.soccr", std::process::id(), self.number);
                let path = directory.join(name);
                if !path.exists() {
                    break path;
                }
            };
            match soccr_image::save_file(&path, connection) {
                Ok(()) => return Ok(path),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.context("there is nowhere to save it")?.into())
    }
}
