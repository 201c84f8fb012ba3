//! SIGHUP, SIGINT and SIGTERM, which must not end a command while connections are in its memory only.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::pipe::{PipeFlags, pipe_with};

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
