//! A second process, which brings things back in order when this one dies halfway.
//!
//! While a connection is read or taken, its socket is in repair mode, and useless to the process that has it. If this process
//! is killed at that moment, the keeper ends repair mode. The keeper also stops the processes that use the socket, and lets them go
//! on afterwards. It has a session of its own, so that signals from the terminal (Ctrl-C) do not reach it, and ignores those that ask it to end.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::sockopt;
use rustix::process::{Pid, WaitOptions, getpid, setsid, waitpid};
use soccr::{Flow, Paused};

use super::process::{Sharing, inode};
use super::stop::Stopped;
use super::{namespace, sys};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::silence;
use crate::users::Users;

/// Stop the processes.
const STOP: u8 = 0;
/// Socket number … is being filled: should we die now, its incomplete connection must not come to life.
const FILLING: u8 = 1;
/// Socket number … is complete again.
const FILLED: u8 = 2;
/// Let the processes go on.
const CONTINUE: u8 = 3;

/// The keeper, as this process sees it. Dropping it lets the stopped processes go on.
#[derive(Debug)]
pub struct Keeper {
    pid: Pid,
    talk: Option<UnixStream>,
    inodes: Vec<u64>,
    /// Who has the sockets, as this process sees it.
    sharing: Sharing,
}

impl Keeper {
    /// Starts the keeper of these sockets and of the processes that share them. When it ends, it removes the file, unless a connection
    /// has left: then the file may be all that there is of it.
    ///
    /// # Errors
    /// This process has started a thread already, or `fork(2)` fails.
    pub fn start(sockets: &[BorrowedFd<'_>], sharing: Sharing, file: Option<&Path>) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("socketpair")?;
        let inodes = sockets.iter().map(inode).collect::<Result<_>>()?;
        match sys::fork().context("fork")? {
            Some(pid) => {
                drop(theirs);
                let mut keeper = Self { pid, talk: Some(ours), inodes, sharing };
                keeper.confirm()?;
                Ok(keeper)
            }
            None => {
                drop(ours);
                keep(theirs, sockets, sharing, file);
                std::process::exit(0)
            }
        }
    }

    fn say(&mut self, word: u8, number: usize) -> Result<()> {
        let talk = self.talk.as_mut().ok_or_else(gone)?;
        let mut message = [word; 5];
        message[1..].copy_from_slice(&(number as u32).to_ne_bytes());
        talk.write_all(&message).map_err(unless_gone)?;
        self.confirm()
    }

    /// An empty answer says that all is well.
    fn confirm(&mut self) -> Result<()> {
        let talk = self.talk.as_mut().ok_or_else(gone)?;
        let mut length = [0; 4];
        talk.read_exact(&mut length).map_err(unless_gone)?;
        let mut text = vec![0; u32::from_ne_bytes(length) as usize];
        talk.read_exact(&mut text).map_err(unless_gone)?;
        if text.is_empty() { Ok(()) } else { Err(Error::system(String::from_utf8_lossy(&text).into_owned())) }
    }
}

impl Users for Keeper {
    fn stop(&mut self) -> Result<()> {
        self.say(STOP, 0)
    }

    fn go_on(&mut self) -> Result<()> {
        self.say(CONTINUE, 0)
    }

    fn filling(&mut self, number: usize) -> Result<()> {
        self.say(FILLING, number)
    }

    fn filled(&mut self, number: usize) -> Result<()> {
        self.say(FILLED, number)
    }

    /// Not asked of the keeper, which may be what has ended.
    fn have(&mut self, number: usize) -> Result<bool> {
        self.sharing.still_has(self.inodes[number], &[getpid(), self.pid])
    }
}

fn gone() -> Error {
    Error::system("the keeper, a second process, has ended too early")
}

fn unless_gone(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => gone(),
        _ => Error::of(ErrorKind::System, "the keeper, a second process", error),
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.talk = None;
        // When it has ended, the processes run again.
        let _ = waitpid(Some(self.pid), WaitOptions::empty());
    }
}

/// What the keeper does, from its start to its end.
fn keep(mut talk: UnixStream, sockets: &[BorrowedFd<'_>], mut sharing: Sharing, file: Option<&Path>) {
    let _ = setsid();
    // Whoever asks both processes to end would end the wrong one first: this one ends when the other has.
    let _ = [libc::SIGHUP, libc::SIGINT, libc::SIGTERM].map(sys::ignore);
    // A socket that is in repair mode already is somebody else's affair.
    let is_in_repair = |socket: &BorrowedFd<'_>| Paused::take_over(*socket).map(Paused::leave_paused).is_ok();
    let paused_before: Vec<bool> = sockets.iter().map(is_in_repair).collect();
    let has_connection: Vec<bool> = sockets.iter().map(is_connected).collect();
    // Repair mode overwrites SO_REUSEADDR.
    let reuse: Vec<_> = sockets.iter().map(sockopt::socket_reuseaddr).collect();
    let mut filling = vec![false; sockets.len()];
    let mut stopped = None;
    if answer(&mut talk, Ok(())).is_ok() {
        let mut message = [0; 5];
        while talk.read_exact(&mut message).is_ok() {
            let number = u32::from_ne_bytes([message[1], message[2], message[3], message[4]]) as usize;
            let outcome = match (message[0], filling.get_mut(number)) {
                (STOP, _) if stopped.is_some() => Ok(()),
                (STOP, _) => Stopped::stop(&mut sharing).map(|now| stopped = Some(now)),
                (CONTINUE, _) => {
                    stopped = None;
                    Ok(())
                }
                (word @ (FILLING | FILLED), Some(filling)) => {
                    *filling = word == FILLING;
                    Ok(())
                }
                _ => Err(Error::system("the keeper does not know what to do")),
            };
            if answer(&mut talk, outcome).is_err() {
                break;
            }
        }
    }
    let ours = paused_before.into_iter().map(|before| !before);
    for (((socket, filling), reuse), _) in
        sockets.iter().zip(filling).zip(reuse).zip(ours).filter(|(_, ours)| *ours)
    {
        // This fails where the socket is not in repair mode.
        let Ok(paused) = Paused::take_over(socket.as_fd()) else { continue };
        let _ = if filling { paused.detach() } else { paused.resume() };
        let _ = reuse.map(|reuse| sockopt::set_socket_reuseaddr(socket, reuse));
    }
    // Connections that are still here have not left, but a source that died cannot say so.
    let here: Vec<Flow> = sockets.iter().filter_map(|socket| Flow::of(socket).ok()).collect();
    let has_left = sockets.iter().zip(has_connection).any(|(socket, had)| had && !is_connected(socket));
    if let Some(file) = file.filter(|_| !has_left) {
        // It has been renamed, or the process that wrote it was killed.
        let _ = std::fs::remove_file(file);
    }
    if !here.is_empty() && namespace::enter_of(sockets[0]).is_ok() {
        let _ = silence::lift(&here);
        let _ = soccr::steer::stop(&here);
    }
    drop(stopped);
}

/// Whether the socket has a connection. In SYN_SENT no peer is known; a socket whose connection has left is in CLOSE, and poll(2) says
/// POLLHUP.
fn is_connected(socket: &BorrowedFd<'_>) -> bool {
    let mut events = [PollFd::new(socket, PollFlags::empty())];
    let polled = retry_on_intr(|| poll(&mut events, Some(&Timespec::default())));
    Flow::of(socket).is_ok() || polled.is_ok() && !events[0].revents().contains(PollFlags::HUP)
}

fn answer(talk: &mut UnixStream, outcome: Result<()>) -> std::io::Result<()> {
    let text = outcome.err().map(|error| error.to_string()).unwrap_or_default();
    let mut message = (text.len() as u32).to_ne_bytes().to_vec();
    message.extend_from_slice(text.as_bytes());
    talk.write_all(&message)
}
