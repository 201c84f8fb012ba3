//! SIGHUP, SIGINT and SIGTERM, which must not end a command while connections are in its memory only; and what must not stop it while
//! others stand still for it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::pipe::{PipeFlags, pipe_with};
use soccr_handover::Users;

use crate::sys;

/// SIGHUP, SIGINT and SIGTERM make it readable, instead of ending the process.
#[derive(Debug)]
pub(crate) struct Bell {
    bell: OwnedFd,
    _rope: OwnedFd,
    before: [sys::Disposition; 3],
}

impl Bell {
    /// Set once in the life of a process.
    pub(crate) fn hang() -> Result<Self> {
        let (bell, rope) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).context("pipe2")?;
        let before = sys::ENDING.map(|signal| sys::catch(signal, rope.as_fd()));
        Ok(Self { bell, _rope: rope, before })
    }

    /// From now on the signals are ignored.
    pub(crate) fn deafen(self) -> Deaf {
        let _ = sys::ENDING.map(sys::ignore);
        Deaf { before: self.before }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// SIGHUP, SIGINT and SIGTERM are ignored as long as it lives.
#[derive(Debug)]
#[must_use = "dropping it heeds the signals at once"]
pub(crate) struct Deaf {
    before: [sys::Disposition; 3],
}

impl Deaf {
    /// To be called when connections are about to be in the memory of this process only.
    pub(crate) fn begin() -> Self {
        Self { before: sys::ENDING.map(sys::ignore) }
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        for (signal, before) in sys::ENDING.into_iter().zip(self.before) {
            sys::heed(signal, before);
        }
    }
}

/// Users of connections. While they are stopped, the terminal cannot stop this command (Ctrl-Z): they would stand still until somebody
/// makes it go on.
pub(crate) struct Unstoppable<U> {
    users: U,
    before: Option<[sys::Disposition; 3]>,
}

impl<U> Unstoppable<U> {
    pub(crate) fn new(users: U) -> Self {
        Self { users, before: None }
    }

    fn heed(&mut self) {
        for (signal, before) in sys::STOPPING.into_iter().zip(self.before.take().into_iter().flatten()) {
            sys::heed(signal, before);
        }
    }
}

impl<U: Users> Users for Unstoppable<U> {
    fn stop(&mut self) -> soccr_handover::Result<()> {
        self.before.get_or_insert_with(|| sys::STOPPING.map(sys::ignore));
        self.users.stop()
    }

    fn go_on(&mut self) -> soccr_handover::Result<()> {
        self.users.go_on()?;
        self.heed();
        Ok(())
    }

    fn filling(&mut self, number: usize) -> soccr_handover::Result<()> {
        self.users.filling(number)
    }

    fn have(&mut self, number: usize) -> soccr_handover::Result<bool> {
        self.users.have(number)
    }

    fn filled(&mut self, number: usize) -> soccr_handover::Result<()> {
        self.users.filled(number)
    }
}
